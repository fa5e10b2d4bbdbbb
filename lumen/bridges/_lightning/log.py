"""`self.log` without a Trainer: what a module logs in one call, as typed values that merge."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lumen.core import batching
from lumen.core.metrics import Max, Mean, Min, Sum
from lumen.core.metrics import Metric as LumenMetric
from lumen.errors import BatchError, MetricError
from lumen.metrics.torchmetrics import MetricValue, TorchMetric

_REDUCTIONS: dict[Any, str] = {torch.mean: "mean", torch.sum: "sum", torch.max: "max", torch.min: "min"}
_REDUCTIONS |= {torch.amax: "max", torch.amin: "min", max: "max", min: "min", sum: "sum"}

_JOINS: dict[str, Callable[[Tensor], LumenMetric]] = {"sum": Sum.of, "max": Max.of, "min": Min.of}


class Record:
    """What one call of a module's step has logged."""

    def __init__(self, batch: Any, index: Any) -> None:
        self.batch = batch
        self.index = index
        self.values: dict[str, LumenMetric] = {}
        self.seen: dict[str, MetricValue] = {}  # what each metric of the module was updated with

    def log(self, name: str, value: Any, reduce_fx: str | Callable[..., Any], batch_size: int | None) -> None:
        """Keep `value` under `name`."""
        if isinstance(value, Recorded):
            self.values[name] = value.seen(name)
        elif isinstance(value, Mapping):
            raise MetricError(f"self.log({name!r}, ...) got a dict; write self.log_dict(...)")
        else:
            number = torch.as_tensor(value).detach()
            if number.numel() != 1:
                raise MetricError(
                    f"self.log({name!r}, ...) takes a number or a tensor with one element, not one of shape"
                    f" {tuple(number.shape)}. Write value.mean()."
                )
            self.values[name] = self._typed(name, number.reshape(()), reduce_fx, batch_size)

    def _typed(self, name: str, number: Tensor, reduce_fx: Any, batch_size: int | None) -> LumenMetric:
        kind = reduce_fx if isinstance(reduce_fx, str) else _REDUCTIONS.get(reduce_fx, reduce_fx)
        if kind == "mean":
            size = self._rows() if batch_size is None else batch_size
            return Mean.of(number, torch.as_tensor(size))
        if kind in _JOINS:
            return _JOINS[kind](number)
        raise MetricError(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}) cannot be merged over batches and processes; give 'mean',"
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
    """Collect what is logged inside."""
    record = Record(batch, index)
    token = _CURRENT.set(record)
    try:
        yield record
    finally:
        _CURRENT.reset(token)


def current(what: str) -> Record:
    """The record of the call in progress."""
    record = _CURRENT.get()
    if record is None:
        raise MetricError(f"{what} works within training_step, validation_step and test_step; nothing else is logged.")
    return record


class Recorded(nn.Module):
    """In place of a torchmetrics metric of the module: what it is given in a call goes into the record."""

    def __init__(self, name: str, metric: TorchMetric) -> None:
        super().__init__()
        self.name = name
        self.metric = metric

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in a batch."""
        seen = current(f"{self.name}.update").seen
        value = self.metric.of(*args, **kwargs)
        seen[self.name] = seen[self.name].merge(value) if self.name in seen else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take in a batch, and give its own value."""
        self.update(*args, **kwargs)
        return self.metric.of(*args, **kwargs).compute()

    def seen(self, logged: str) -> MetricValue:
        """What this call has given to the metric."""
        seen = current("self.log").seen
        if self.name not in seen:
            raise MetricError(
                f"self.log({logged!r}, self.{self.name}) comes before the metric has seen this batch. Write before it:"
                f" self.{self.name}.update(preds, target)"
            )
        return seen[self.name]

    def compute(self) -> Any:
        """Refused: there is no epoch inside a step."""
        raise MetricError(
            f"self.{self.name}.compute() asks for more than this batch, which a pure step does not hold. Log the metric"
            f" itself, and its value is merged: self.log({self.name!r}, self.{self.name})"
        )

    def reset(self) -> None:
        """Refused: there is nothing to reset."""
        raise MetricError(f"self.{self.name}.reset() has nothing to reset: nothing outlives a step. Leave it out.")


def record_metrics(module: nn.Module) -> None:
    """Put a `Recorded` in the place of each torchmetrics metric of `module`."""
    from torchmetrics import Metric, MetricCollection

    metrics = (Metric, MetricCollection)
    for prefix, parent in [*module.named_modules()]:
        for key, child in parent._modules.items():
            if isinstance(child, metrics) and not isinstance(parent, metrics):
                name = f"{prefix}.{key}" if prefix else key
                if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
                    raise MetricError(
                        f"the metric {name!r} holds a model of its own, which would be trained and saved with this one."
                        " Keep it outside of the module, with lm.metrics.from_torchmetrics, and measure in a Validate."
                    )
                parent._modules[key] = Recorded(name, TorchMetric(child))
