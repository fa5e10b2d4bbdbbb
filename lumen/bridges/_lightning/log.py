"""`self.log` without a Trainer: record the values of one call as metrics that merge."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lumen import tree
from lumen.core import _torch_compat, batching
from lumen.core.metrics import Max, Mean, Min, PerEpoch, Sum, is_value
from lumen.core.metrics import Metric as LumenMetric
from lumen.errors import BatchError, MetricError
from lumen.metrics.torchmetrics import MetricValue, TorchMetric

_REDUCTIONS: dict[Any, str] = {torch.mean: "mean", torch.sum: "sum", torch.max: "max", torch.min: "min"}
_REDUCTIONS |= {torch.amax: "max", torch.amin: "min", max: "max", min: "min", sum: "sum"}

_JOINS: dict[str, Callable[[Tensor], LumenMetric]] = {"sum": Sum.of, "max": Max.of, "min": Min.of}


class Record:
    """The values logged in one call of a module's step."""

    def __init__(self, batch: Any, index: Any, *, trains: bool = False) -> None:
        self.batch = batch
        self.index = index
        self.values: dict[str, Any] = {}
        self.metrics: dict[str, MetricValue] = {}  # the updates of each metric of the module
        self._trains = trains

    def log(
        self,
        name: str,
        value: Any,
        reduce_fx: str | Callable[..., Any],
        batch_size: int | None,
        on_step: bool | None,
        on_epoch: bool | None,
    ) -> None:
        """Record `value` under `name`: in training as `on_step` and `on_epoch` say, in an evaluation over all of it."""
        metric = self._metric(name, value, reduce_fx, batch_size)
        if not (self._trains and on_epoch):
            self.values[name] = metric
            return
        self.values[name] = tree.map(PerEpoch, metric, is_leaf=is_value)
        if on_step is not False:
            self.values[f"{name}_step"] = metric

    def _metric(self, name: str, value: Any, reduce_fx: Any, batch_size: int | None) -> Any:
        if isinstance(value, Recorded | RecordedCollection):
            return value.value_in_call(name)
        if isinstance(value, Mapping):
            raise MetricError(f"self.log({name!r}, ...) got a dict; write self.log_dict(...)")
        if isinstance(value, nn.Module):
            raise MetricError(
                f"self.log({name!r}, ...) got a {type(value).__name__} that is no attribute of the module. Assign it in"
                " __init__: self.metric = ..., or several in an nn.ModuleDict."
            )
        number = torch.as_tensor(value).detach()
        if number.numel() != 1:
            raise MetricError(
                f"self.log({name!r}, ...) takes a number or a tensor with one element, got shape"
                f" {tuple(number.shape)}. Write value.mean()."
            )
        return self._to_metric(name, number.reshape(()), reduce_fx, batch_size)

    def _to_metric(self, name: str, number: Tensor, reduce_fx: Any, batch_size: int | None) -> LumenMetric:
        kind = reduce_fx if isinstance(reduce_fx, str) else _REDUCTIONS.get(reduce_fx, reduce_fx)
        if kind == "mean":
            size = self._rows() if batch_size is None else batch_size
            return Mean.of(number, torch.as_tensor(size))
        if kind in _JOINS:
            return _JOINS[kind](number)
        raise MetricError(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}) cannot be merged over batches and processes; use 'mean',"
            " 'sum', 'max' or 'min', or log a torchmetrics metric."
        )

    def _rows(self) -> int:
        try:
            return batching.count(self.batch)
        except BatchError:
            return 1


_CURRENT: contextvars.ContextVar[Record | None] = contextvars.ContextVar("lightning_record", default=None)


@contextmanager
def recording(batch: Any, index: Any, *, trains: bool = False) -> Iterator[Record]:
    """Record the values logged inside the context; `trains` says whether it is a training step."""
    record = Record(batch, index, trains=trains)
    token = _CURRENT.set(record)
    try:
        yield record
    finally:
        _CURRENT.reset(token)


def current(caller: str) -> Record:
    """The record of the call in progress."""
    record = _CURRENT.get()
    if record is None:
        raise MetricError(f"{caller} works only within training_step, validation_step and test_step.")
    return record


class Recorded(nn.Module):
    """Replaces a torchmetrics metric of the module: its updates in a call go into the record."""

    def __init__(self, name: str, metric: TorchMetric) -> None:
        super().__init__()
        self.name = name
        self.metric = metric

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Update the metric with a batch."""
        metrics = current(f"{self.name}.update").metrics
        value = self.metric.of(*args, **kwargs)
        metrics[self.name] = metrics[self.name].merge(value) if self.name in metrics else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Update the metric with a batch, and return the value of that batch."""
        self.update(*args, **kwargs)
        return self.metric.of(*args, **kwargs).compute()

    def value_in_call(self, logged_name: str) -> MetricValue:
        """The metric's updates in this call."""
        metrics = current("self.log").metrics
        if self.name not in metrics:
            raise MetricError(
                f"self.log({logged_name!r}, self.{self.name}) comes before the metric's update with this batch."
                f" Write first: self.{self.name}.update(preds, target)"
            )
        return metrics[self.name]

    def compute(self) -> Any:
        """Raise `MetricError`: there is no epoch inside a step."""
        raise MetricError(
            f"self.{self.name}.compute() needs more than this batch, which a pure step does not have. Log the metric"
            f" itself, so that its value is merged: self.log({self.name!r}, self.{self.name})"
        )

    def reset(self) -> None:
        """Raise `MetricError`: there is nothing to reset."""
        raise MetricError(
            f"self.{self.name}.reset() has nothing to reset: metrics do not persist across steps. Remove it."
        )


class RecordedCollection(nn.Module):
    """Replaces a MetricCollection of the module: a `Recorded` for each of its metrics."""

    def __init__(self, name: str, collection: Any) -> None:
        super().__init__()
        self._name = name
        self._collection = TorchMetric(collection)
        self._filters = {key: metric._filter_kwargs for key, metric in collection.items(keep_base=True)}
        self._names = dict(zip(collection.keys(keep_base=True), collection.keys(), strict=True))
        for key, metric in collection.items(keep_base=True):
            self.add_module(key, Recorded(f"{name}.{key}", TorchMetric(metric)))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Update each metric with a batch."""
        for key, metric in self.items(keep_base=True):
            metric.update(*args, **self._filters[key](**kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Update each metric with a batch, and return the values of that batch by name."""
        self.update(*args, **kwargs)
        return self._collection.of(*args, **kwargs).compute()

    def items(self, keep_base: bool = False, copy_state: bool = True) -> ItemsView[str, Any]:
        """The metrics by name, with the prefix and postfix of the collection unless `keep_base` is true."""
        members = _torch_compat.own_modules(self)
        return {key if keep_base else self._names[key]: metric for key, metric in members.items()}.items()

    def keys(self, keep_base: bool = False) -> KeysView[str]:
        """The names of the metrics."""
        return dict(self.items(keep_base)).keys()

    def values(self, copy_state: bool = True) -> ValuesView[Any]:
        """The metrics."""
        return dict(self.items()).values()

    def __getitem__(self, key: str, copy_state: bool = True) -> Any:
        members = dict(self.items(keep_base=True)) | dict(self.items())
        return members[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._names)

    def value_in_call(self, logged_name: str) -> dict[str, MetricValue]:
        """The updates of each metric in this call."""
        return {key: metric.value_in_call(logged_name) for key, metric in self.items()}

    def compute(self) -> Any:
        """Raise `MetricError`: there is no epoch inside a step."""
        raise MetricError(
            f"self.{self._name}.compute() needs more than this batch, which a pure step does not have. Log the"
            f" collection itself, so that its values are merged: self.log_dict(self.{self._name})"
        )

    def reset(self) -> None:
        """Raise `MetricError`: there is nothing to reset."""
        raise MetricError(
            f"self.{self._name}.reset() has nothing to reset: metrics do not persist across steps. Remove it."
        )


def record_metrics(module: nn.Module) -> None:
    """Replace each torchmetrics metric of `module` with a `Recorded`, and each collection of them."""
    from torchmetrics import Metric, MetricCollection

    metrics = (Metric, MetricCollection)
    replaced: dict[int, nn.Module] = {}  # a metric may be assigned to several attributes
    for prefix, parent in [*module.named_modules()]:
        for key, child in _torch_compat.own_modules(parent).items():
            if isinstance(child, metrics) and not isinstance(parent, metrics):
                name = f"{prefix}.{key}" if prefix else key
                if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
                    raise MetricError(
                        f"the metric {name!r} contains a model, which would be trained and saved with this module."
                        " Keep it outside the module, with lm.metrics.from_torchmetrics, and measure in a Validate."
                    )
                if id(child) not in replaced:
                    is_metric = isinstance(child, Metric)
                    replaced[id(child)] = (
                        Recorded(name, TorchMetric(child)) if is_metric else RecordedCollection(name, child)
                    )
                _torch_compat.own_modules(parent)[key] = replaced[id(child)]
