"""`RunLogger`: passes the numbers of a run from the step's metrics to the sinks and the display."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lumen.checkpoint import json_tree
from lumen.errors import InexactWarning, printable
from lumen.optim import learning_rate
from lumen.optim._combine import group_rates
from lumen.train.clock import Clock
from lumen.train.curves import DIAGNOSTICS
from lumen.train.history import History
from lumen.train.metric_buffer import EpochMetrics, MetricAccumulator, split_epoch, to_floats, to_numbers
from lumen.train.metric_merge import MetricMerger
from lumen.train.progress import Progress
from lumen.train.rank_state import SavedMetrics
from lumen.train.sink_group import SinkGroup
from lumen.train.throughput import Throughput

_TRAIN = "train/"
_TOO_MANY = "lm.optim.learning_rate(result.state.opt_state) has them all."


def learning_rates(opt_state: Any, has_groups: bool = True) -> dict[str, float]:
    """The learning rates of an optimizer's state, by the names that they are logged under.

    `lr` is the rate of the optimizer, or of the first group of a `partition`. If several groups have one, they are also
    logged as `lr/0`, `lr/1`, …; without `has_groups` none are looked for. In an ensemble each lane has its own: `lr/0`,
    `lr/1`, …, or `lr/GROUP/LANE` under a partition.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.partition({"*.bias": lm.optim.sgd(0.5)}, default=lm.optim.sgd(0.25))
    >>> learning_rates(tx.init({"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}))
    {'lr': 0.5, 'lr/0': 0.5, 'lr/1': 0.25}
    """
    lr = learning_rate(opt_state)
    if lr is None:
        return {}
    rates_by_group = group_rates(opt_state) if has_groups else []
    by_group = {f"lr/{i}": rate for i, rate in enumerate(rates_by_group) if rate is not None}
    if len(by_group) <= 1:
        if not lr.dim():  # the usual case, read by one operation in place of five
            return {"lr": float(lr)}
        by_group = {}
    has_lanes = lr.dim() > 0
    rates = {**({} if has_lanes and by_group else {"lr": lr}), **by_group}
    return to_floats(rates, advice=_TOO_MANY)


class NewestNumbers(dict[str, float]):
    """The newest number of each name; a name that was not logged raises a `KeyError` that lists those that were."""

    def __missing__(self, name: str) -> float:
        logged = ", ".join(map(printable, self)) or "no numbers"
        full = next((other for other in self if other.rpartition("/")[2] == name), None)
        raise KeyError(
            f"{name!r} was not logged; logged were {logged}." + (f" Write metrics[{full!r}]." if full else "")
        )


class RunLogger:
    """Accumulates the metrics of steps until they are logged, and stores the newest number of each name.

    `newest` has all numbers by name, `current` those that were published at the clock's step, and `history` those of
    this call of `fit`. `accumulator` has the metrics since the last logging point, `epoch_metrics` the
    `lm.PerEpoch` ones before it, of this epoch.
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
        self.accumulator = MetricAccumulator()
        self.epoch_metrics = EpochMetrics()
        self.newest: dict[str, float] = NewestNumbers()
        self.sinks = sinks
        self.progress = progress
        self._clock = clock
        self._merger = merger
        self.history = history
        self._current: tuple[int, dict[str, float]] = (-1, {})
        self._has_groups: bool | None = None  # of the optimizer, whose state keeps its tree from step to step
        self.throughput = Throughput(clock, peak)

    @property
    def current(self) -> dict[str, float]:
        """The numbers that were published at this step. Only these decide whether a checkpoint is the best."""
        step, values = self._current
        return values if step == self._clock.step else {}

    def training(self, state: Any) -> dict[str, float]:
        """The merged metrics of the steps since the last call, with throughput and learning rates."""
        if not self.accumulator:
            return {}
        metrics, per_epoch = split_epoch(self.accumulator.take())
        self.epoch_metrics.add(per_epoch, _TRAIN)
        values = to_numbers(metrics, _TRAIN, self._merger)
        values.update(self.throughput.rates())
        self.throughput.restart()
        opt_state = getattr(state, "opt_state", None)
        if self._has_groups is None:
            self._has_groups = bool(group_rates(opt_state))
        values.update(learning_rates(opt_state, self._has_groups))
        return values

    def epoch(self, complete: bool = True) -> dict[str, float]:
        """The `lm.PerEpoch` metrics of the epoch, which they forget if it is `complete`; all ranks call this."""
        self.accumulator.restore()
        for per_epoch in self.accumulator.take_epoch():
            self.epoch_metrics.add(per_epoch, _TRAIN)
        accumulator = self.epoch_metrics.accumulator
        accumulator.restore()
        if not self._merger.group.any(bool(accumulator)):
            return {}
        metrics = accumulator.merged()
        if complete:
            accumulator.take()
            _warn_of_lost(accumulator.drop_saved())
        return to_numbers(metrics, _TRAIN, self._merger, key="epoch/")

    def publish(self, values: Mapping[str, Any]) -> None:
        """Send values to the sinks and the display, and store the numbers by name."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self.newest.update(numbers)
        self.history.add(self._clock.step, numbers)
        self._current = (self._clock.step, {**self.current, **numbers})
        self.sinks.log(self._clock.step, {"epoch": self._clock.epoch, **values})
        self.progress.show(self._clock, {n: value for n, value in numbers.items() if n not in DIAGNOSTICS})

    def state_dict(self) -> dict[str, Any]:
        """The newest numbers and the positions of the sinks, as plain data."""
        return {
            "metrics": {name: json_tree.number(value) for name, value in self.newest.items()},
            "sinks": self.sinks.positions(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, and remove what the sinks wrote after it."""
        self.newest = NewestNumbers({name: float(value) for name, value in state["metrics"].items()})
        self.sinks.rewind(state["sinks"])
        self.throughput.restart()

    def load_metrics(self, saved: SavedMetrics) -> None:
        """Continue from the metrics of a checkpoint."""
        self.accumulator.load_state_dict(*saved.window, on_all_ranks=saved.on_all_ranks)
        self.epoch_metrics.accumulator.load_state_dict(*saved.epoch, on_all_ranks=saved.on_all_ranks)


def _warn_of_lost(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the epoch's {', '.join(map(repr, names))} leave out the steps before this run resumed: no step since"
            " has returned them, and only the metric itself knows how to restore its values.",
            InexactWarning,
            stacklevel=2,
        )
