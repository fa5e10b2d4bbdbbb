"""`Meter`: metrics kept on the device from step to step, read by the host only when they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.values import compute_metrics, merge_metrics
from lumen.errors import InexactWarning

_MERGE_AFTER = 256  # bounds what is held between two readings
_MANY = 64


class Meter:
    """Collects the metrics of steps; `read` merges them and moves all numbers to the host in one transfer."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def add(self, metrics: Any) -> None:
        """Take in one step's metrics; nothing is computed."""
        self._held.append(metrics)
        if len(self._held) >= _MERGE_AFTER:
            self._held = [merge_metrics(self._held)]

    def __bool__(self) -> bool:
        return bool(self._held)

    def read(self, prefix: str = "") -> dict[str, float]:
        """The merged numbers by name, and start anew.

        A metric that is a vector (one entry for each lane of an ensemble) becomes `name/0`, `name/1`, …
        """
        held, self._held = self._held, []
        return to_floats(compute_metrics(merge_metrics(held)), prefix) if held else {}


def to_floats(metrics: Any, prefix: str = "") -> dict[str, float]:
    """Numbers of a metrics tree by their names, moved to the host in one transfer."""
    named = {f"{prefix}{name}": torch.as_tensor(leaf).detach() for name, leaf in _named(metrics)}
    flat: dict[str, Tensor] = {}
    for name, value in named.items():
        if value.dim() == 0:
            flat[name] = value
        elif value.numel() <= _MANY:
            flat.update({f"{name}/{i}": each for i, each in enumerate(value.flatten())})
        else:
            warnings.warn(
                f"the metric {name!r} has {value.numel()} numbers, more than the {_MANY} that are logged one by one,"
                " so it is left out. Reduce it in the step, to a mean or its quantiles, say.",
                InexactWarning,
                stacklevel=2,
            )
    if not flat:
        return {}
    numbers = torch.stack([value.to(torch.float64) for value in flat.values()]).tolist()
    return dict(zip(flat, numbers, strict=True))


def _named(metrics: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(metrics, Mapping):
        return [pair for key, value in metrics.items() for pair in _named(value, f"{path}/{key}" if path else str(key))]
    leaves = tree.leaves(metrics)
    if len(leaves) == 1 and leaves[0] is metrics:
        return [(path or "value", metrics)]
    return [(f"{path}/{i}" if path else str(i), leaf) for i, leaf in enumerate(leaves)]
