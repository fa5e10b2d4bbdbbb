"""`MetricAccumulator`: metrics that stay on the device from step to step until the host reads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.metrics import PerEpoch, compute_metrics, merge_metrics
from lumen.errors import InexactWarning
from lumen.optim._numerics import scalar_dtype
from lumen.train.byte_layout import Entry
from lumen.train.metric_entries import by_kind, kinds_of, pack, split_known, to_entry, unpack
from lumen.train.metric_merge import MetricMerger

_MERGE_AFTER = 256  # steps; bounds the memory between two readings
_MAX_NUMBERS = 64  # of one metric


class MetricAccumulator:
    """Collects the metrics of steps; `read` merges them and moves all numbers to the host in one transfer."""

    def __init__(self) -> None:
        self._unmerged: list[Any] = []
        self._kinds: dict[str, str] = {}  # of metrics that were merged or saved, and do not show it any more
        self._saved: list[Entry] = []  # what is left of a checkpoint
        self._publishes_saved = True
        self._without_epoch = 0  # the number of first entries without an `lm.PerEpoch`

    def add(self, metrics: Any) -> None:
        """Add the metrics of one step, without computing anything."""
        if self._saved:
            self._restore(metrics)
        self._unmerged.append(metrics)
        if len(self._unmerged) >= _MERGE_AFTER:
            self._kinds = {**kinds_of(self._unmerged), **self._kinds}
            self._unmerged, self._without_epoch = [merge_metrics(self._unmerged)], 0

    def __bool__(self) -> bool:
        return bool(self._unmerged)

    def merged(self) -> Any:
        """The merged metrics, or None without any."""
        if self._unmerged:
            self.restore()
        return merge_metrics(self._unmerged) if self._unmerged else None

    def take(self) -> Any:
        """Return the merged metrics, or None without any, and forget them."""
        metrics = self.merged()
        self._unmerged, self._without_epoch = [], 0
        self._kinds = self._kinds if self._saved else {}
        return metrics

    def take_epoch(self) -> list[dict[str, Any]]:
        """Return the `lm.PerEpoch` metrics alone, unmerged, and forget them."""
        taken = []
        for index in range(self._without_epoch, len(self._unmerged)):
            self._unmerged[index], per_epoch = split_epoch(self._unmerged[index])
            taken += [per_epoch] * bool(per_epoch)
        self._without_epoch = len(self._unmerged)
        return taken

    def read(self, prefix: str = "", merger: MetricMerger | None = None, key: str = "") -> dict[str, float]:
        """Return the merged numbers by name, and forget them; with a `merger` they are those of all ranks.

        `key` identifies them among ranks, by default `prefix`. A metric that is a vector (one entry for each lane of an
        ensemble) becomes `name/0`, `name/1`, …
        """
        return to_numbers(self.take(), prefix, merger, key)

    def state_dict(self) -> dict[str, Any]:
        """The metrics, unmerged: sums of floats depend on their order, which a resume must not change."""
        kinds = {**kinds_of(self._unmerged), **self._kinds}
        return pack([*self._saved, *map(to_entry, self._unmerged)], kinds)

    def load_state_dict(self, *states: Mapping[str, Any], on_all_ranks: bool = True) -> None:
        """Restore one or several results of `state_dict`, also as `lm.checkpoint.load` returns them.

        `on_all_ranks` says whether each rank restores metrics of the same names.
        """
        self._unmerged, self._without_epoch = [], 0
        self._saved = [entry for state in states for entry in unpack(state)]
        self._kinds = next((dict(state["kinds"]) for state in states if state.get("kinds")), {})
        self._publishes_saved = on_all_ranks

    def _restore(self, metrics: Any) -> None:
        """Restore what a checkpoint has of the names of `metrics`, whose structure is known only now."""
        restored, self._saved = zip_lists(split_known(entry, metrics) for entry in self._saved)
        self._put_first(restored)

    def restore(self) -> None:
        """Restore the metrics of a checkpoint that no step has returned since, as far as their kinds are known."""
        if not (self._saved and self._publishes_saved):
            return
        first = tree.first_tensor(self._unmerged)
        device = None if first is None else first.device
        restored, self._saved = zip_lists(by_kind(entry, self._kinds, device) for entry in self._saved)
        self._put_first(restored)

    def drop_saved(self) -> list[str]:
        """Forget the metrics of a checkpoint that could not be restored; returns their names."""
        names = sorted({name for entry in self._saved for name in entry})
        self._saved = []
        return names

    def _put_first(self, restored: list[Any]) -> None:
        self._saved = [entry for entry in self._saved if entry]
        self._unmerged = [metrics for metrics in restored if type(metrics) is not dict or metrics] + self._unmerged
        self._without_epoch = 0


class EpochMetrics:
    """The `lm.PerEpoch` metrics of the epoch so far, and the names of all of them in this run."""

    def __init__(self) -> None:
        self.accumulator = MetricAccumulator()
        self.names: set[str] = set()

    def add(self, metrics: dict[str, Any], prefix: str) -> None:
        """Add the values of a logging window, or of a step."""
        if metrics:
            self.accumulator.add(metrics)
            self.names.update(f"{prefix}{name}" for name in metrics)


def zip_lists(pairs: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """The first and the second entries of pairs."""
    both = list(pairs)
    return [first for first, _ in both], [second for _, second in both]


def split_epoch(metrics: Any) -> tuple[Any, dict[str, Any]]:
    """Metrics without the `lm.PerEpoch` ones in their dicts, and the values of those by name.

    >>> import lumen as lm, torch
    >>> split_epoch({"loss": 1.0, "epoch_loss": lm.PerEpoch(lm.Last(torch.tensor(2)))})
    ({'loss': 1.0}, {'epoch_loss': Last(value=tensor(2))})
    """
    if type(metrics) is not dict or not any(isinstance(value, PerEpoch | dict) for value in metrics.values()):
        return metrics, {}
    rest, per_epoch = {}, {}
    for name, value in metrics.items():
        if isinstance(value, PerEpoch):
            per_epoch[name] = value.value
            continue
        rest[name], below = split_epoch(value)
        per_epoch |= {f"{name}/{key}": item for key, item in below.items()}
    return rest, per_epoch


def to_numbers(metrics: Any, prefix: str, merger: MetricMerger | None, key: str = "") -> dict[str, float]:
    """The numbers of merged metrics by name; with a `merger` those of all ranks, None where this one has no metrics."""

    def compute(metrics: Any) -> dict[str, float]:
        return to_floats(compute_metrics(metrics), prefix)

    if merger is not None:
        return merger.merge(key or prefix, metrics, compute)
    return {} if metrics is None else compute(metrics)


_REDUCE = "Reduce it in the step, to a mean or its quantiles, say."


def to_floats(metrics: Any, prefix: str = "", advice: str = _REDUCE) -> dict[str, float]:
    """The numbers of a metrics tree by name, moved to the host in one transfer from each device.

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
    """0-d tensors as numbers, in one transfer from each device, or in two from one without float64."""
    numbers = [0.0] * len(scalars)
    for dtype, indices in _transfers(scalars):
        values = torch.stack([scalars[i].to(dtype) for i in indices]).tolist()
        for i, value in zip(indices, values, strict=True):
            numbers[i] = float(value)
    return numbers


def _transfers(scalars: list[Tensor]) -> Iterator[tuple[torch.dtype, list[int]]]:
    """Which scalars can be stacked, and in which dtype: those on one device."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, scalar in enumerate(scalars):
        dtype = scalar_dtype(scalar.device)
        if dtype != torch.float64 and not scalar.is_floating_point():  # a count may need more than 24 bits
            dtype = torch.int64
        groups.setdefault((scalar.device, dtype), []).append(i)
    for (_, dtype), indices in groups.items():
        yield dtype, indices


def _named(metrics: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(metrics, Mapping):
        return [pair for key, value in metrics.items() for pair in _named(value, f"{path}/{key}" if path else str(key))]
    leaves = tree.leaves(metrics)
    if len(leaves) == 1 and leaves[0] is metrics:
        return [(path or "value", metrics)]
    return [(f"{path}/{i}" if path else str(i), leaf) for i, leaf in enumerate(leaves)]
