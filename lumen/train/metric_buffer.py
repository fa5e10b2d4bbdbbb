"""`MetricAccumulator`: metrics that stay on the device from step to step until the host reads them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.metrics import compute_metrics, merge_metrics
from lumen.errors import InexactWarning
from lumen.optim._numerics import scalar_dtype
from lumen.train.byte_layout import Entry
from lumen.train.metric_entries import from_entry, kinds_of, pack, to_entry, unpack
from lumen.train.metric_merge import MetricMerger

_MERGE_AFTER = 256  # steps; bounds the memory between two readings
_MAX_NUMBERS = 64  # of one metric


class MetricAccumulator:
    """Collects the metrics of steps; `read` merges them and moves all numbers to the host in one transfer."""

    def __init__(self) -> None:
        self._unmerged: list[Any] = []
        self._newest: Any = None  # as the step returned it: merged metrics do not show their kinds
        self._saved: list[Entry] = []
        self._saved_kinds: dict[str, str] = {}

    def add(self, metrics: Any) -> None:
        """Add the metrics of one step, without computing anything."""
        if self._saved:  # their structure is known only now
            self._unmerged = [from_entry(entry, metrics) for entry in self._saved]
            self._saved = []
        self._unmerged.append(metrics)
        self._newest = metrics
        if len(self._unmerged) >= _MERGE_AFTER:
            self._unmerged = [merge_metrics(self._unmerged)]

    def __bool__(self) -> bool:
        return bool(self._unmerged)

    def read(self, prefix: str = "", merger: MetricMerger | None = None, key: str = "") -> dict[str, float]:
        """Return the merged numbers by name, and forget them; with a `merger` they are those of all ranks.

        `key` identifies them among ranks, by default `prefix`. A metric that is a vector (one entry for each lane of an
        ensemble) becomes `name/0`, `name/1`, …
        """
        unmerged, self._unmerged, self._newest = self._unmerged, [], None
        merged = merge_metrics(unmerged) if unmerged else None

        def to_numbers(metrics: Any) -> dict[str, float]:
            return to_floats(compute_metrics(metrics), prefix)

        if merger is not None:
            return merger.merge(key or prefix, merged, to_numbers)
        return {} if merged is None else to_numbers(merged)

    def state_dict(self) -> dict[str, Any]:
        """The metrics, unmerged: sums of floats depend on their order, which a resume must not change."""
        if self._saved:
            return pack(self._saved, self._saved_kinds)
        return pack([to_entry(metrics) for metrics in self._unmerged], kinds_of(self._newest))

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Restore one or several results of `state_dict`, also as `lm.checkpoint.load` returns them."""
        self._unmerged, self._newest = [], None
        self._saved = [entry for state in states for entry in unpack(state)]
        self._saved_kinds = next((dict(state["kinds"]) for state in states if state.get("kinds")), {})


_REDUCE = "Reduce it in the step, to a mean or its quantiles, say."


def to_floats(metrics: Any, prefix: str = "", advice: str = _REDUCE) -> dict[str, float]:
    """The numbers of a metrics tree by name, moved to the host in one transfer.

    It warns, with the `advice`, of a tensor that has too many numbers to be logged.
    """
    named = {f"{prefix}{name}": torch.as_tensor(leaf).detach() for name, leaf in _named(metrics)}
    flat: dict[str, Tensor] = {}
    for name, value in named.items():
        if value.dim() == 0:
            flat[name] = value
        elif value.numel() <= _MAX_NUMBERS:
            flat.update({f"{name}/{i}": number for i, number in enumerate(value.flatten())})
        else:
            warnings.warn(
                f"the metric {name!r} has {value.numel()} numbers, more than the {_MAX_NUMBERS} that are logged one by"
                f" one, so it is left out. {advice}",
                InexactWarning,
                stacklevel=2,
            )
    if not flat:
        return {}
    return dict(zip(flat, _numbers([*flat.values()]), strict=True))


def _numbers(scalars: list[Tensor]) -> list[float]:
    """0-d tensors as numbers, in one transfer, or in two from a device without float64."""
    if all(scalar_dtype(scalar.device) == torch.float64 for scalar in scalars):
        return torch.stack([scalar.to(torch.float64) for scalar in scalars]).tolist()
    numbers = [0.0] * len(scalars)
    for dtype, floating in ((torch.float32, True), (torch.int64, False)):  # a count may need more than 24 bits
        indices = [i for i, scalar in enumerate(scalars) if scalar.is_floating_point() is floating]
        values = torch.stack([scalars[i].to(dtype) for i in indices]).tolist() if indices else []
        for i, value in zip(indices, values, strict=True):
            numbers[i] = float(value)
    return numbers


def _named(metrics: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(metrics, Mapping):
        return [pair for key, value in metrics.items() for pair in _named(value, f"{path}/{key}" if path else str(key))]
    leaves = tree.leaves(metrics)
    if len(leaves) == 1 and leaves[0] is metrics:
        return [(path or "value", metrics)]
    return [(f"{path}/{i}" if path else str(i), leaf) for i, leaf in enumerate(leaves)]
