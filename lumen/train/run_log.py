"""`RunLogger`: the numbers of a run, from the step's metrics to sinks, display and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumen.checkpoint import json_tree
from lumen.optim import learning_rate
from lumen.optim._combine import group_rates
from lumen.train.clock import Clock
from lumen.train.history import History
from lumen.train.metric_buffer import MetricAccumulator, to_floats
from lumen.train.metric_merge import MetricMerger
from lumen.train.progress import Progress
from lumen.train.sink_group import SinkGroup

_TOO_MANY = "lm.optim.learning_rate(result.state.opt_state) has them all."


def learning_rates(opt_state: Any) -> dict[str, float]:
    """The learning rates of an optimizer's state, by the names that they are logged under.

    `lr` is that of an optimizer, or of the first part of a `partition`; where several parts have one, they are `lr/0`,
    `lr/1`, …. In an ensemble each lane has its own: `lr/0`, `lr/1`, …, and those of a partition `lr/PART/LANE`.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.partition({"*.bias": lm.optim.sgd(0.5)}, default=lm.optim.sgd(0.25))
    >>> learning_rates(tx.init({"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}))
    {'lr': 0.5, 'lr/0': 0.5, 'lr/1': 0.25}
    """
    lr = learning_rate(opt_state)
    if lr is None:
        return {}
    of_groups = {f"lr/{i}": rate for i, rate in enumerate(group_rates(opt_state)) if rate is not None}
    if len(of_groups) <= 1:
        of_groups = {}
    by_lane = lr.dim() > 0
    rates = {**({} if by_lane and of_groups else {"lr": lr}), **of_groups}
    return to_floats(rates, advice=_TOO_MANY)


class RunLogger:
    """Keeps the metrics of steps until they are logged, and the newest number of each name.

    `newest` holds all numbers by name, `fresh` those that were published at the clock's present step, and `history`
    what was published in this fit.
    """

    def __init__(
        self,
        sinks: SinkGroup,
        progress: Progress,
        clock: Clock,
        peak: float | None,
        merger: MetricMerger,
        history: History,
    ) -> None:
        self.meter = MetricAccumulator()
        self.newest: dict[str, float] = {}
        self.flops_per_step: float | None = None
        self.sinks = sinks
        self.progress = progress
        self._clock = clock
        self._peak = peak
        self._merger = merger
        self.history = history
        self._fresh: tuple[int, dict[str, float]] = (-1, {})
        self.mark()

    @property
    def fresh(self) -> dict[str, float]:
        """The numbers of this very step: a checkpoint is judged by no others."""
        step, values = self._fresh
        return values if step == self._clock.step else {}

    def mark(self) -> None:
        """Measure throughput from here: what came before was no training."""
        self._since = self._now()

    def training(self, state: Any) -> dict[str, float]:
        """The merged metrics of the steps since the last call, with throughput and learning rate."""
        if not self.meter:
            return {}
        values = self.meter.read("train/", self._merger)
        values.update(self._throughput())
        self.mark()
        values.update(learning_rates(getattr(state, "opt_state", None)))
        return values

    def publish(self, values: Mapping[str, Any]) -> None:
        """Send values to the sinks and the display; numbers are remembered by name."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.newest.update(numbers)
        self.history.add(self._clock.step, numbers)
        self._fresh = (self._clock.step, {**self.fresh, **numbers})
        self.sinks.log(self._clock.step, {"epoch": self._clock.epoch, **values})
        self.progress.show(self._clock, numbers)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the meter: plain data."""
        return {
            "metrics": {name: json_tree.number(value) for name, value in self.newest.items()},
            "sinks": self.sinks.positions(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, and cut off what the sinks took in after it."""
        self.newest = {name: float(value) for name, value in state["metrics"].items()}
        self.sinks.rewind(state["sinks"])
        self.mark()

    def _now(self) -> tuple[int, int, int, float]:
        return self._clock.step, self._clock.rows, self._clock.tokens, self._clock.seconds

    def _throughput(self) -> dict[str, float]:
        steps, rows, tokens, seconds = (now - then for now, then in zip(self._now(), self._since, strict=True))
        if not steps or seconds <= 0:
            return {}
        found = {"steps_per_second": steps / seconds}
        if rows:
            found["rows_per_second"] = rows / seconds
        if tokens:
            found["tokens_per_second"] = tokens / seconds
        if self.flops_per_step and self._peak:
            found["mfu"] = self.flops_per_step * steps / seconds / self._peak
        return found
