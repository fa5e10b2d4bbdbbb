"""A metric object as a template: cheap working copies of it, and the table of its states.

A `torchmetrics.Metric` accumulates in its own attributes. Here one private copy stays empty, and each call uses and
discards a shallow copy of it: nothing is shared, so threads and nested calls are safe.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.errors import MetricError

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

FOLDS = ("sum", "max", "min")
# Attributes that torchmetrics itself writes; any other change is hidden state of the metric.
_BOOKKEEPING = frozenset(
    {
        "update",
        "compute",
        "_update_count",
        "_computed",
        "_cache",
        "_is_synced",
        "_forward_cache",
        _torch_compat.MODULES,
        _torch_compat.BUFFERS,
    }
    | {"_device", "_state_is_copy"}
)
_LABELS = (str, torch.dtype, torch.device)

Note = tuple[int, str, Any]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One state of one metric, and how it merges.

    `join` is "sum", "max" or "min" if two tensors reduce to one immediately; "list" if the elements are concatenated;
    and "mean", "cat", "none" or "custom" if the tensors are collected until they are needed, as torchmetrics does when
    it gathers them from processes.
    """

    key: str
    node: int
    name: str
    join: str
    default: Tensor | None
    reduce: Callable[[Any], Any] | None

    @property
    def folds(self) -> bool:
        """Whether two tensors reduce to one immediately."""
        return self.join in FOLDS

    def reduce_collected(self, tensors: tuple[Tensor, ...], device: torch.device) -> Tensor:
        """Reduce the collected tensors to the one that `compute` reads."""
        if not tensors:
            assert self.default is not None
            return self.default.to(device, copy=True)
        if len(tensors) == 1:
            return tensors[0].clone()
        if self.join == "cat":
            return torch.cat(tensors)
        stacked = torch.stack(tensors)
        return stacked if self.reduce is None else self.reduce(stacked)


@dataclass(slots=True)
class _Node:
    """A module of the template that is copied for each call: a metric, or a container of metrics."""

    module: Any
    path: str
    is_metric: bool
    children: dict[str, int]
    containers: tuple[str, ...]


class MetricTemplate:
    """An empty, private copy of a metric on one device."""

    def __init__(self, metric: Metric | MetricCollection, device: torch.device | None = None) -> None:
        self.metric = _private_copy(metric, device)
        self.nodes = _nodes(self.metric)
        self.state_specs = tuple(_state_specs(self.nodes))
        metrics = [node.module for node in self.nodes if node.is_metric]
        self.device: torch.device = metrics[0].device if metrics else torch.device("cpu")

    def instantiate(self, updates: int, notes: tuple[Note, ...] = ()) -> list[Any]:
        """Linked shallow copies of all nodes with an update count of `updates`, the root first."""
        copies: list[Any] = [object.__new__(type(node.module)) for node in self.nodes]
        for module, node in zip(copies, self.nodes, strict=True):
            attributes = module.__dict__
            attributes.update(node.module.__dict__)
            attributes[_torch_compat.MODULES] = {
                **_torch_compat.own_modules(node.module),
                **{name: copies[i] for name, i in node.children.items()},
            }
            attributes[_torch_compat.BUFFERS] = dict(_torch_compat.own_buffers(node.module))
            for name in node.containers:
                attributes[name] = copy.copy(attributes[name])
            if node.is_metric:
                kind = type(module)
                attributes["update"] = module._wrap_update(kind.update.__get__(module))
                attributes["compute"] = module._wrap_compute(kind.compute.__get__(module))
                attributes["_update_count"] = updates
        for index, name, value in notes:
            copies[index].__dict__[name] = value
        return copies

    def release(self, copies: list[Any]) -> tuple[Note, ...]:
        """Clear the copies, and return the labels that a metric has stored outside its states.

        Raises `MetricError` if it has stored anything else there, which could not be merged.
        """
        notes: list[Note] = []
        for index, (module, node) in enumerate(zip(copies, self.nodes, strict=True)):
            for name in _changed_attributes(module, node, self.state_specs):
                value = getattr(module, name)
                if value is not None and not isinstance(value, _LABELS):
                    raise _hidden_state_error(node, name, value)
                notes.append((index, name, value))
        for module in copies:
            module.__dict__.clear()  # break the reference cycle of a copy and its wrapped methods
        return tuple(notes)


def _private_copy(metric: Any, device: torch.device | None) -> Any:
    from torchmetrics import Metric, MetricCollection

    template = copy.deepcopy(metric)
    template.reset()
    if device is not None:
        template.to(device)
    for module in template.modules():
        if isinstance(module, Metric):
            module._to_sync = module.sync_on_compute = False  # the Runner merges the ranks, not compute
        if isinstance(module, MetricCollection) and not module._groups_checked:
            # torchmetrics groups metrics whose states are equal after one batch, which may be a coincidence.
            module._enable_compute_groups = False
            module._groups = {}
    return template


def _nodes(root: nn.Module) -> list[_Node]:
    from torchmetrics import Metric, MetricCollection

    modules = [
        (path, module) for path, module in root.named_modules() if any(isinstance(m, Metric) for m in module.modules())
    ]
    if not modules:
        modules = [("", root)]
    index = {id(module): i for i, (_, module) in enumerate(modules)}
    nodes = []
    for path, module in modules:
        is_metric = isinstance(module, Metric)
        children = {
            name: index[id(child)] for name, child in _torch_compat.own_modules(module).items() if id(child) in index
        }
        state_names = {*module._defaults, "_defaults", "_reductions", "_persistent"} if is_metric else set()
        if isinstance(module, MetricCollection):
            state_names |= {"_groups"}
        containers = tuple(
            name
            for name, value in module.__dict__.items()
            if type(value) in (list, dict, set) and name not in state_names and not _is_module_attribute(name)
        )
        nodes.append(_Node(module, path, is_metric, children, containers))
    return nodes


def _is_module_attribute(name: str) -> bool:
    """Whether `nn.Module` itself defines the attribute: its hooks, and its tables of modules and buffers."""
    return name in _EMPTY_MODULE


_EMPTY_MODULE = frozenset(nn.Module().__dict__)


def _state_specs(nodes: list[_Node]) -> Iterator[StateSpec]:
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
            yield StateSpec(key, i, name, join, None if is_list else default, reduce)


def _followers(nodes: list[_Node]) -> set[int]:
    """The metrics that share the states of another: all but the first of each compute group of a collection."""
    from torchmetrics import MetricCollection

    indices: set[int] = set()
    for node in nodes:
        if isinstance(node.module, MetricCollection) and node.module._groups_checked:
            groups = node.module._groups.values()
            indices |= {node.children[str(name)] for group in groups for name in group[1:]}
    return indices


def _changed_attributes(module: Any, node: _Node, state_specs: tuple[StateSpec, ...]) -> Iterator[str]:
    before, after = node.module.__dict__, module.__dict__
    for name, value in after.items():
        if before.get(name, module) is value or name in _BOOKKEEPING:
            continue
        if name in node.containers and len(value) == len(before[name]):
            continue
        if node.is_metric and name in node.module._defaults:
            continue
        yield name
    buffers = _torch_compat.own_buffers(node.module)
    yield from (name for name, value in after[_torch_compat.BUFFERS].items() if buffers.get(name) is not value)


def _hidden_state_error(node: _Node, name: str, value: Any) -> MetricError:
    kind = type(node.module).__name__
    return MetricError(
        f"{kind} keeps {name!r} (a {type(value).__name__}) outside its states, so its values from several batches"
        f" cannot be merged. Only text and dtypes are allowed outside states. In a custom metric, write"
        f" self.add_state({name!r}, default, dist_reduce_fx=...) in __init__; pass a torchmetrics class all that it"
        " needs, such as num_classes, at construction; wrap the plain metric, not a MinMaxMetric or Running."
    )
