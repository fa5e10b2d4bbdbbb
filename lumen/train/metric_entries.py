"""Metrics as named tensors, for checkpoints and other ranks, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.checkpoint import listed
from lumen.core.metrics import GlobalMean, Last, Max, Mean, Min, PerEpoch, Sum, as_value, is_value
from lumen.errors import MetricError
from lumen.metrics.torchmetrics import MetricValue
from lumen.train.byte_layout import Entry

# Kinds of metrics, in checkpoints. Those of custom metrics are empty: only the metric itself knows how to restore them.
_GLOBAL, _PLAIN = "global", "plain"
_EPOCH = "epoch:"  # a prefix of those of an `lm.PerEpoch`
# Prefixes of those in a dict within the dict, and of metrics that are no dict: only a step shows their structure.
_NESTED, _FIXED = "nested:", "fixed:"
_TYPES = {"mean": Mean, _GLOBAL: GlobalMean, "sum": Sum, "max": Max, "min": Min, "last": Last}
_KINDS = {kind: name for name, kind in _TYPES.items()}
_ABSENT = object()


def to_entry(metrics: Any) -> Entry:
    """The tensors of each metric, by its name."""
    return {name: _tensors_of(value) for name, value in _named_values(metrics)}


def from_entry(entry: Entry, like: Any) -> Any:
    """The metrics of an entry of `to_entry`, in the structure of `like`."""
    names = iter(tree.paths(like, is_leaf=is_value))

    def rebuild(value: Any) -> Any:
        return _rebuild(entry[next(names) or "value"], value)

    return tree.map(rebuild, like, is_leaf=is_value)


def split_known(entry: Entry, like: Any) -> tuple[Any, Entry]:
    """The metrics of an entry whose names are among those of `like`, in its structure, and the rest of the entry.

    Names come and go in dicts alone. Raises `MetricError` where another structure lacks one.
    """
    names = [name or "value" for name in tree.paths(like, is_leaf=is_value)]
    indices = iter(names)
    known = _without_absent(tree.map(lambda x: x if next(indices) in entry else _ABSENT, like, is_leaf=is_value))
    if known is _ABSENT and type(like) is dict:
        return {}, entry
    if any(leaf is _ABSENT for leaf in tree.leaves(known, is_leaf=is_value)):
        raise MetricError(
            f"the step returns the metrics {', '.join(map(repr, names))}, and those of the checkpoint, which are to be"
            f" merged with them, are {', '.join(map(repr, entry))}. Return a dict, whose names may come and go."
        )
    return from_entry(entry, known), {name: tensors for name, tensors in entry.items() if name not in names}


def by_kind(entry: Entry, kinds: Mapping[str, str], device: torch.device | None) -> tuple[dict[str, Any], Entry]:
    """The metrics of an entry whose `kinds` say how to restore them, by name, and the rest of the entry."""
    values: dict[str, Any] = {}
    rest = {}
    for name, tensors in entry.items():
        kind = kinds.get(name, "")
        base = _base(kind)
        keys = re.findall(r"[^\[\]]+", name) if kind.startswith(_NESTED) else [name]
        if kind.startswith(_FIXED) or (base not in _TYPES and base != _PLAIN):
            rest[name] = tensors
            continue
        leaves = [tensors[str(i)].to(device) for i in range(len(tensors))]
        value = _TYPES.get(base, Mean)(*leaves) if base in _TYPES or len(leaves) > 1 else as_value(leaves[0])
        parent = values
        for key in keys[:-1]:
            parent = parent.setdefault(key, {})
        parent[keys[-1]] = PerEpoch(value) if _EPOCH in kind else value
    return values, rest


def _base(kind: str) -> str:
    return kind.rpartition(":")[2]


def _rebuild(saved: Mapping[str, Tensor], value: Any) -> Any:
    if isinstance(value, PerEpoch):
        return PerEpoch(_rebuild(saved, value.value))
    device = next((leaf.device for leaf in tree.tensors(value)), None)
    tensors = {key: tensor.to(device) for key, tensor in saved.items()}
    if isinstance(value, MetricValue):
        return value.metric.unpack(tensors)
    if not is_value(value) and len(tensors) > 1:  # merged plain numbers
        return Mean(tensors["0"], tensors["1"])
    return tree.unflatten(tree.structure(value), [tensors[str(i)] for i in range(len(tensors))])


def _without_absent(node: Any) -> Any:
    if type(node) is not dict or not node:
        return node
    present = {key: child for key, value in node.items() if (child := _without_absent(value)) is not _ABSENT}
    return present or _ABSENT


def kinds_of(steps: Sequence[Any]) -> dict[str, str]:
    """How to restore the metrics of several steps, by name, and whether they are of a rank's own rows."""
    kinds: dict[str, str] = {}
    seen: set[Any] = set()
    for metrics in steps:
        names = metrics.keys() if type(metrics) is dict else {None}
        if not names <= seen:
            seen |= names
            top = {str(name) for name in names}
            for name, value in _named_values(metrics):
                prefix = _FIXED if None in names else "" if name in top else _NESTED
                if name not in kinds and (kind := _kind_of(value)):
                    kinds[name] = prefix + kind
    return kinds


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
            {name: _reweight(tensors, _base(kinds.get(name, "")), rank == 0, share) for name, tensors in entry.items()}
            for entry in unpack(state)
        ]
        reweighted.append({"entries": entries, "kinds": kinds})
    return reweighted


def _reweight(tensors: Mapping[str, Tensor], kind: str, counts: bool, share: float) -> Mapping[str, Tensor]:
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
    if isinstance(value, PerEpoch):
        return _tensors_of(value.value)
    if isinstance(value, MetricValue):
        return dict(value.metric.pack(value))
    return {str(i): torch.as_tensor(leaf) for i, leaf in enumerate(tree.leaves(value))}


def _kind_of(value: Any) -> str:
    if isinstance(value, PerEpoch):
        kind = _kind_of(value.value)
        return kind and _EPOCH + kind
    return _KINDS.get(type(value), "") if is_value(value) else _PLAIN


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
