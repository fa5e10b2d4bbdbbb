"""`MonitoredMetric`: the metric of each lane that a search compares its trials by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from lumen.core.metrics import compute_metrics
from lumen.core.step import Step
from lumen.data.feed import is_one_shot
from lumen.errors import BatchError, StepError
from lumen.train.clock import Every
from lumen.train.device_feed import open_batches
from lumen.train.distributed import ProcessGroupContext
from lumen.train.metric_buffer import MetricAccumulator
from lumen.train.validate import Validate, accumulate_metrics, params_for

_TRAIN = "train"


class MonitoredMetric:
    """The metric `monitor`: one of a validation, or of the training steps since it was last read, merged.

    Raises `StepError` for a name that nothing in the search could give, and `BatchError` for data that can be read
    only once.
    """

    def __init__(self, monitor: str, validate: Validate | None, state: Any) -> None:
        check_monitor(monitor, validate)
        self.monitor = monitor
        self._validate = validate
        self._accumulator = MetricAccumulator()
        if validate is None:
            self._key = monitor.partition("/")[2]
            return
        prefix, data = next(item for item in validate.loaders() if monitor.startswith(f"{item[0]}/"))
        self._key = monitor[len(prefix) + 1 :]
        if is_one_shot(data):
            raise BatchError(
                f"the data of {prefix!r} is a {type(data).__name__}, which can be read once, and each rung evaluates"
                " on all of it. Give data that can be iterated again, such as an lm.Loader."
            )
        self._data = open_batches(data, state, ProcessGroupContext(state))

    def add(self, metrics: Any) -> None:
        """Add the metrics of a training step."""
        if self._validate is None:
            self._accumulator.add({"": self._find(metrics)})

    def read(self, step: Step, state: Any, lanes: int) -> list[float]:
        """The metric of each lane of `state`."""
        if self._validate is None:
            return self._numbers(self._accumulator.take()[""], lanes)
        batches = itertools.islice(self._data.epoch(0), self._validate.limit)
        evaluated = params_for(self._validate, state)
        accumulator = accumulate_metrics(self._validate.step, evaluated, batches, step.transforms)
        if not accumulator:
            raise BatchError("the data to evaluate on is empty: it gave no batch.")
        return self._numbers(self._find(accumulator.take()), lanes)

    def _find(self, metrics: Any) -> Any:
        node, rest = metrics, self._key
        while isinstance(node, Mapping):
            if rest in node:
                return node[rest]
            head, _, rest = rest.partition("/")
            node = node.get(head)
        names = ", ".join(map(repr, metrics)) if isinstance(metrics, Mapping) else type(metrics).__name__
        source = "step" if self._validate is None else "evaluation step"
        raise StepError(
            f"monitor={self.monitor!r} waits for the metric {self._key!r} of the {source}, which returns"
            f" {names or 'none'}. Name one of these, or return {self._key!r}."
        )

    def _numbers(self, value: Any, lanes: int) -> list[float]:
        values = torch.as_tensor(compute_metrics({"": value})[""]).detach().cpu()
        if values.shape != (lanes,):
            raise StepError(
                f"monitor={self.monitor!r} has the shape {list(values.shape[1:])} in each trial; trials are compared by"
                " one number. Return a mean from the step."
            )
        numbers: list[float] = values.double().tolist()
        return numbers


def check_monitor(monitor: str, validate: Validate | None) -> None:
    """Raise `StepError` unless `monitor` names a metric of the validation, or without one of the training step."""
    if validate is None:
        if not monitor.startswith(f"{_TRAIN}/"):
            raise StepError(
                f"monitor={monitor!r} names no metric of the training step, which are called 'train/…'. To compare by a"
                ' validation write validate=lm.Validate(eval_step, val_loader), and monitor="val/loss" for the metric'
                " that it returns as 'loss'."
            )
        return
    if validate.every != Every(epochs=1) or validate.last:
        raise StepError(
            "lm.successive_halving validates at each of its rungs, so every and last of the Validate say nothing."
            " Leave them out: validate=lm.Validate(eval_step, val_loader)"
        )
    names = [name for name, _ in validate.loaders()]
    if not any(monitor.startswith(f"{name}/") for name in names):
        allowed = ", ".join(f"{name}/…" for name in names)
        raise StepError(
            f"monitor={monitor!r} names no metric of the validation, which are called {allowed}. Write"
            f" monitor=\"{names[0]}/loss\" for the metric that the evaluation step returns as 'loss'; to compare by a"
            " metric of training, leave out validate."
        )
