"""`MetricMerger`: the metrics of all ranks of a run as one set of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import distributed
from lumen.core.metrics import GlobalMean, PerEpoch, as_value, is_value, merge_metrics
from lumen.errors import MetricError
from lumen.train.byte_layout import Entry, Layout, from_bytes, layout_of, to_bytes, total_bytes
from lumen.train.distributed import ProcessGroupContext
from lumen.train.metric_entries import from_entry, to_entry


class MetricMerger:
    """Merges metrics over the ranks of `group`; in a single process it merges nothing."""

    def __init__(self, group: ProcessGroupContext) -> None:
        self.group = group
        self._layouts: dict[str, Layout] = {}

    def merge(self, key: str, metrics: Any, to_numbers: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """The result of `to_numbers` for the merged metrics of all ranks; a rank without metrics passes None.

        Of ranks with the same rows only the first counts, and a `GlobalMean`, which all ranks hold, counts once. The
        tensors are sent as bytes in one all-gather. Each rank merges them in the same order, so the numbers are bitwise
        the same. If any layout under a `key` differs from the last one, the metrics are sent as objects.
        """
        if self.group.size == 1:
            return {} if metrics is None else to_numbers(metrics)
        metrics = None if metrics is None else tree.map(as_value, metrics, is_leaf=is_value)
        entries = self._all_gather(key, None if metrics is None else to_entry(metrics))
        holders = [rank for rank, entry in enumerate(entries) if entry is not None]
        if not holders:
            return {}
        numbers: dict[str, float] = {}
        if metrics is not None:
            _check_names(entries)
            by_rank = [from_entry(entries[rank], metrics) for rank in holders if rank % distributed.row_replicas() == 0]
            # Rank 0 comes last, so that its `Last` counts.
            numbers = to_numbers(merge_metrics([*map(_without_shared, reversed(by_rank[1:])), by_rank[0]]))
        if len(holders) < self.group.size:  # a rank without metrics does not know their types
            numbers = self.group.all_gather_object(numbers)[holders[0]]
        return numbers

    def _all_gather(self, key: str, entry: Entry | None) -> list[Any]:
        layout = self._layouts.get(key)
        if layout is not None:
            entries = self._all_gather_bytes(layout, entry)
            if entries is not None:
                return entries
        entries = self.group.all_gather_object(None if entry is None else _on_host(entry))
        layouts = [None if entry is None else layout_of(entry) for entry in entries]
        if layouts[0] is not None and all(layout == layouts[0] for layout in layouts):
            self._layouts[key] = layouts[0]
        else:
            self._layouts.pop(key, None)
        return entries

    def _all_gather_bytes(self, layout: Layout, entry: Entry | None) -> list[Any] | None:
        """The entries of all ranks, or None if one has another layout, which its first byte says."""
        device = self.group.device
        row = torch.zeros(1 + total_bytes(layout), dtype=torch.uint8, device=device)
        if entry is not None and layout_of(entry) == layout:
            data = [to_bytes(entry[name][key]).to(device) for name, key, _, _ in layout]
            row[1:] = torch.cat(data) if data else row[1:]
        else:
            row[0] = 1
        rows: list[Tensor] = list(torch.empty(self.group.size, len(row), dtype=torch.uint8, device=device))
        dist.all_gather(rows, row)
        if any(torch.stack([row[0] for row in rows]).tolist()):
            return None
        return [from_bytes(layout, row[1:]) for row in rows]


def _on_host(entry: Entry) -> dict[str, dict[str, Tensor]]:
    return {name: {key: x.detach().cpu() for key, x in tensors.items()} for name, tensors in entry.items()}


def _without_shared(metrics: Any) -> Any:
    """The metrics of one rank with every `GlobalMean`, which another rank counts, set to zero."""

    def zero_shared(value: Any) -> Any:
        if isinstance(value, PerEpoch):
            return PerEpoch(zero_shared(value.value))
        return tree.map(torch.zeros_like, value) if isinstance(value, GlobalMean) else value

    return tree.map(zero_shared, metrics, is_leaf=is_value)


def _check_names(entries: Sequence[Any]) -> None:
    names_of = {rank: set(entry) for rank, entry in enumerate(entries) if entry is not None}
    first = next(iter(names_of))
    for rank, names in names_of.items():
        if names != names_of[first]:
            raise MetricError(
                f"ranks return different metrics: {sorted(names ^ names_of[first])} on rank {rank} or rank {first}"
                " only. Return the same names on all ranks, and a value of weight zero where there is nothing to count."
            )
