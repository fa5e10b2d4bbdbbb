"""A metric object as a template: cheap live copies of it, and the table of its states.

A `torchmetrics.Metric` keeps what it has seen in attributes of its own. Here one private copy is kept empty, and each
call works on a shallow copy of that, which is thrown away: nothing is shared, so threads and nested calls are safe.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lumen.errors import MetricError

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

FOLDS = ("sum", "max", "min")
# What torchmetrics itself writes while it runs; everything else that changes is memory of the metric's own.
_BOOKKEEPING = frozenset(
    {
        "update",
        "compute",
        "_update_count",
        "_computed",
        "_cache",
        "_is_synced",
        "_forward_cache",
        "_modules",
        "_buffers",
    }
    | {"_device", "_state_is_copy"}
)
_LABELS = (str, torch.dtype, torch.device)

Note = tuple[int, str, Any]


@dataclass(frozen=True, slots=True)
class Slot:
    """One state of one metric, and how its parts join.

    `join` is "sum", "max" or "min" where two parts fold into one at once; "list" where their elements are put in a
    row; and "mean", "cat", "none" or "custom" where tensors are kept side by side until they are needed, as they are
    when torchmetrics gathers them from processes.
    """

    key: str
    node: int
    name: str
    join: str
    default: Tensor | None
    reduce: Callable[[Any], Any] | None

    @property
    def folds(self) -> bool:
        """Whether two parts become one tensor."""
        return self.join in FOLDS

    def whole(self, parts: tuple[Tensor, ...], device: torch.device) -> Tensor:
        """The one tensor that `compute` is to see for parts kept side by side."""
        if not parts:
            assert self.default is not None
            return self.default.to(device, copy=True)
        if len(parts) == 1:
            return parts[0].clone()
        if self.join == "cat":
            return torch.cat(parts)
        stacked = torch.stack(parts)
        return stacked if self.reduce is None else self.reduce(stacked)


@dataclass(slots=True)
class _Node:
    """A module of the template that is copied for each call: a metric, or one that holds metrics."""

    module: Any
    path: str
    is_metric: bool
    children: dict[str, int]
    containers: tuple[str, ...]


class Skeleton:
    """An empty, private copy of a metric on one device."""

    def __init__(self, metric: Metric | MetricCollection, device: torch.device | None = None) -> None:
        self.metric = _private_copy(metric, device)
        self.nodes = _nodes(self.metric)
        self.slots = tuple(_slots(self.nodes))
        metrics = [node.module for node in self.nodes if node.is_metric]
        self.device: torch.device = metrics[0].device if metrics else torch.device("cpu")

    def live(self, updates: int, notes: tuple[Note, ...] = ()) -> list[Any]:
        """Shallow copies of all nodes, linked to each other, that have seen `updates` updates; the root comes first."""
        shells: list[Any] = [object.__new__(type(node.module)) for node in self.nodes]
        for shell, node in zip(shells, self.nodes, strict=True):
            contents = shell.__dict__
            contents.update(node.module.__dict__)
            contents["_modules"] = {**node.module._modules, **{name: shells[i] for name, i in node.children.items()}}
            contents["_buffers"] = dict(node.module._buffers)
            for name in node.containers:
                contents[name] = copy.copy(contents[name])
            if node.is_metric:
                kind = type(shell)
                contents["update"] = shell._wrap_update(kind.update.__get__(shell))
                contents["compute"] = shell._wrap_compute(kind.compute.__get__(shell))
                contents["_update_count"] = updates
        for index, name, value in notes:
            shells[index].__dict__[name] = value
        return shells

    def retire(self, shells: list[Any]) -> tuple[Note, ...]:
        """End the copies, and return the labels that a metric has put beside its states.

        Raises `MetricError` where it has put anything there that would have to merge.
        """
        found: list[Note] = []
        for index, (shell, node) in enumerate(zip(shells, self.nodes, strict=True)):
            for name in _changed(shell, node, self.slots):
                value = getattr(shell, name)
                if value is not None and not isinstance(value, _LABELS):
                    raise _hidden(node, name, value)
                found.append((index, name, value))
        for shell in shells:
            shell.__dict__.clear()  # a copy and its wrapped methods hold each other; leave nothing to the collector
        return tuple(found)


def _private_copy(metric: Any, device: torch.device | None) -> Any:
    from torchmetrics import Metric, MetricCollection

    own = copy.deepcopy(metric)
    own.reset()
    if device is not None:
        own.to(device)
    for each in own.modules():
        if isinstance(each, Metric):
            each._to_sync = each.sync_on_compute = False  # ranks are merged by the Runner, not by a compute
        if isinstance(each, MetricCollection) and not each._groups_checked:
            # torchmetrics would find groups by comparing states after one batch, so that chance could form them.
            each._enable_compute_groups = False
            each._groups = {}
    return own


def _nodes(root: nn.Module) -> list[_Node]:
    from torchmetrics import Metric, MetricCollection

    named = [(path, each) for path, each in root.named_modules() if any(isinstance(m, Metric) for m in each.modules())]
    if not named:
        named = [("", root)]
    index = {id(each): i for i, (_, each) in enumerate(named)}
    nodes = []
    for path, each in named:
        is_metric = isinstance(each, Metric)
        children = {name: index[id(child)] for name, child in each._modules.items() if id(child) in index}
        owned = {*each._defaults, "_defaults", "_reductions", "_persistent"} if is_metric else set()
        if isinstance(each, MetricCollection):
            owned |= {"_groups"}
        containers = tuple(
            name
            for name, value in each.__dict__.items()
            if type(value) in (list, dict, set) and name not in owned and not _is_modules_own(name)
        )
        nodes.append(_Node(each, path, is_metric, children, containers))
    return nodes


def _is_modules_own(name: str) -> bool:
    """Whether `nn.Module` itself has the attribute: its hooks, and its tables of modules and buffers."""
    return name in _EMPTY_MODULE


_EMPTY_MODULE = frozenset(nn.Module().__dict__)


def _slots(nodes: list[_Node]) -> Iterator[Slot]:
    from torchmetrics.utilities import data

    joins = {
        data.dim_zero_sum: "sum",
        data.dim_zero_max: "max",
        data.dim_zero_min: "min",
        data.dim_zero_mean: "mean",
        data.dim_zero_cat: "cat",
        None: "none",
    }
    followers = _followers(nodes)
    for i, node in enumerate(nodes):
        if not node.is_metric or i in followers:
            continue
        metric: Any = node.module
        for name, default in metric._defaults.items():
            reduce = metric._reductions[name]
            is_list = isinstance(default, list)
            join = "list" if is_list else joins.get(reduce, "custom")
            key = f"{node.path}.{name}" if node.path else name
            yield Slot(key, i, name, join, None if is_list else default, reduce)


def _followers(nodes: list[_Node]) -> set[int]:
    """The metrics whose states are those of another: all but the first of each compute group of a collection."""
    from torchmetrics import MetricCollection

    found: set[int] = set()
    for node in nodes:
        if isinstance(node.module, MetricCollection) and node.module._groups_checked:
            groups = node.module._groups.values()
            found |= {node.children[str(name)] for group in groups for name in group[1:]}
    return found


def _changed(shell: Any, node: _Node, slots: tuple[Slot, ...]) -> Iterator[str]:
    before, after = node.module.__dict__, shell.__dict__
    for name, value in after.items():
        if before.get(name, shell) is value or name in _BOOKKEEPING:
            continue
        if name in node.containers and len(value) == len(before[name]):
            continue
        if node.is_metric and name in node.module._defaults:
            continue
        yield name
    buffers = node.module._buffers
    yield from (name for name, value in after["_buffers"].items() if buffers.get(name) is not value)


def _hidden(node: _Node, name: str, value: Any) -> MetricError:
    kind = type(node.module).__name__
    return MetricError(
        f"{kind} keeps {name!r} (a {type(value).__name__}) outside its states, so what it has seen in several batches"
        f" cannot be merged. Allowed are states, and text or dtypes beside them. In a metric of your own write"
        f" self.add_state({name!r}, default, dist_reduce_fx=...) in __init__; give a torchmetrics class all that it"
        " needs to know (num_classes, say) when you make it; wrap the plain metric, not a MinMaxMetric or Running."
    )
