"""Metrics as named tensors, for checkpoints and other ranks, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.checkpoint import listed
from lumen.core.metrics import GlobalMean, Mean, as_value, is_value
from lumen.metrics.torchmetrics import MetricValue
from lumen.train.byte_layout import Entry

_GLOBAL, _PLAIN = "global", "plain"  # kinds of metrics, in checkpoints


def to_entry(metrics: Any) -> Entry:
    """The tensors of each metric, by its name."""
    return {name: _tensors_of(value) for name, value in _named_values(metrics)}


def from_entry(entry: Entry, like: Any) -> Any:
    """The metrics of an entry of `to_entry`, in the structure of `like`."""
    names = iter(tree.paths(like, is_leaf=is_value))

    def rebuild(value: Any) -> Any:
        saved = entry[next(names) or "value"]
        device = next((leaf.device for leaf in tree.tensors(value)), None)
        tensors = {key: tensor.to(device) for key, tensor in saved.items()}
        if isinstance(value, MetricValue):
            return value.metric.unpack(tensors)
        if not is_value(value) and len(tensors) > 1:  # merged plain numbers
            return Mean(tensors["0"], tensors["1"])
        return tree.unflatten(tree.structure(value), [tensors[str(i)] for i in range(len(tensors))])

    return tree.map(rebuild, like, is_leaf=is_value)


def kinds_of(metrics: Any) -> dict[str, str]:
    """The kinds of metrics that are not of a rank's own rows, by name: means over all rows, and plain numbers."""
    kinds = {name: _kind_of(value) for name, value in _named_values(metrics)}
    return {name: kind for name, kind in kinds.items() if kind}


def pack(entries: Sequence[Entry], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Entries and the kinds of their metrics as a tree for a checkpoint; empty without entries."""
    if not entries:
        return {}
    return {**_columns(entries), **({"kinds": dict(kinds)} if kinds else {})}


def unpack(state: Mapping[str, Any]) -> list[Entry]:
    """The entries of a tree of `pack`, also as `lm.checkpoint.load` returns it."""
    columns: Mapping[str, Mapping[str, Tensor]] = state.get("columns", {})
    count = next((len(column) for tensors in columns.values() for column in tensors.values()), 0)
    rows = [
        {name: {key: column[i] for key, column in tensors.items()} for name, tensors in columns.items()}
        for i in range(count)
    ]
    return [*listed(state.get("entries", ())), *rows]


def reweight(states: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Convert the metrics of several ranks, so that one rank of a world of another size can continue from them.

    Metrics of a rank's own rows do not change. A `GlobalMean` is the same on all ranks, and counts once. Plain numbers
    are one for each step and rank: they are rescaled to weigh as much as those of `world_size` ranks.
    """
    share = world_size / max(1, len(states))
    reweighted = []
    for rank, state in enumerate(states):
        kinds = state.get("kinds", {})
        entries = [
            {name: _reweight(tensors, kinds.get(name), rank == 0, share) for name, tensors in entry.items()}
            for entry in unpack(state)
        ]
        reweighted.append({"entries": entries, "kinds": kinds})
    return reweighted


def _reweight(tensors: Mapping[str, Tensor], kind: str | None, counts: bool, share: float) -> Mapping[str, Tensor]:
    if kind == _GLOBAL and not counts:
        return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    if kind == _PLAIN:
        mean = Mean(tensors["0"], tensors["1"]) if "1" in tensors else as_value(tensors["0"])
        return {str(i): leaf * share for i, leaf in enumerate(tree.leaves(mean))}
    return tensors


def _named_values(metrics: Any) -> list[tuple[str, Any]]:
    names, values = tree.paths(metrics, is_leaf=is_value), tree.leaves(metrics, is_leaf=is_value)
    return [(name or "value", value) for name, value in zip(names, values, strict=True)]


def _tensors_of(value: Any) -> dict[str, Tensor]:
    if isinstance(value, MetricValue):
        return dict(value.metric.pack(value))
    return {str(i): torch.as_tensor(leaf) for i, leaf in enumerate(tree.leaves(value))}


def _kind_of(value: Any) -> str:
    if isinstance(value, GlobalMean):
        return _GLOBAL
    return "" if is_value(value) else _PLAIN


def _columns(entries: Sequence[Entry]) -> dict[str, Any]:
    if any(_shapes(entry) != _shapes(entries[0]) for entry in entries):
        return {"entries": list(entries)}
    columns = {
        name: {key: torch.stack([entry[name][key] for entry in entries]) for key in tensors}
        for name, tensors in entries[0].items()
    }
    return {"columns": columns}  # a few arrays rather than one for each number, as each array is a file


def _shapes(entry: Entry) -> Any:
    return {name: {key: (x.shape, x.dtype) for key, x in tensors.items()} for name, tensors in entry.items()}
