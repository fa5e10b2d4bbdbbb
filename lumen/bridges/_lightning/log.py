"""`self.log` without a Trainer: record the values of one call as metrics that merge."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat, batching
from lumen.core.metrics import Max, Mean, Min, Sum
from lumen.core.metrics import Metric as LumenMetric
from lumen.errors import BatchError, MetricError
from lumen.metrics.torchmetrics import MetricValue, TorchMetric

_REDUCTIONS: dict[Any, str] = {torch.mean: "mean", torch.sum: "sum", torch.max: "max", torch.min: "min"}
_REDUCTIONS |= {torch.amax: "max", torch.amin: "min", max: "max", min: "min", sum: "sum"}

_JOINS: dict[str, Callable[[Tensor], LumenMetric]] = {"sum": Sum.of, "max": Max.of, "min": Min.of}


class Record:
    """The values logged in one call of a module's step."""

    def __init__(self, batch: Any, index: Any) -> None:
        self.batch = batch
        self.index = index
        self.values: dict[str, LumenMetric] = {}
        self.metrics: dict[str, MetricValue] = {}  # the updates of each metric of the module

    def log(self, name: str, value: Any, reduce_fx: str | Callable[..., Any], batch_size: int | None) -> None:
        """Record `value` under `name`."""
        if isinstance(value, Recorded):
            self.values[name] = value.value_in_call(name)
        elif isinstance(value, Mapping):
            raise MetricError(f"self.log({name!r}, ...) got a dict; write self.log_dict(...)")
        else:
            number = torch.as_tensor(value).detach()
            if number.numel() != 1:
                raise MetricError(
                    f"self.log({name!r}, ...) takes a number or a tensor with one element, got shape"
                    f" {tuple(number.shape)}. Write value.mean()."
                )
            self.values[name] = self._to_metric(name, number.reshape(()), reduce_fx, batch_size)

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
def recording(batch: Any, index: Any) -> Iterator[Record]:
    """Record the values logged inside the context."""
    record = Record(batch, index)
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


def record_metrics(module: nn.Module) -> None:
    """Replace each torchmetrics metric of `module` with a `Recorded`."""
    from torchmetrics import Metric, MetricCollection

    metrics = (Metric, MetricCollection)
    for prefix, parent in [*module.named_modules()]:
        for key, child in _torch_compat.own_modules(parent).items():
            if isinstance(child, metrics) and not isinstance(parent, metrics):
                name = f"{prefix}.{key}" if prefix else key
                if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
                    raise MetricError(
                        f"the metric {name!r} contains a model, which would be trained and saved with this module."
                        " Keep it outside the module, with lm.metrics.from_torchmetrics, and measure in a Validate."
                    )
                _torch_compat.own_modules(parent)[key] = Recorded(name, TorchMetric(child))
