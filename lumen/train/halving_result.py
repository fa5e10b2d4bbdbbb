"""`HalvingResult`: the trials of a search, and the best one's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lumen.core.step import Step
from lumen.sinks.format import short
from lumen.train.halving_rungs import promoted


@dataclass(frozen=True)
class Trial:
    """One trial of `lm.successive_halving`.

    `values` are those that `lm.sweep` gave it, `steps` how long it was trained, `rung` the last rung that it reached,
    from 0, and `metrics` the value of the monitored metric at each of its rungs.
    """

    number: int
    values: Mapping[str, Any]
    rung: int
    steps: int
    metrics: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class HalvingResult:
    """The result of `lm.successive_halving`: all `trials` by number, the `best` of them, and its `state`.

    The state is that of one run, without a dim of lanes. It still has the slots of the transforms inside `lm.sweep`,
    and can be trained on with the same transforms without the sweep. `export()` returns the plain state. `rungs` has
    the steps at which trials were compared by the metric `monitor`. `table()` shows all trials as text.
    """

    trials: tuple[Trial, ...]
    best: Trial
    rungs: tuple[int, ...]
    monitor: str
    mode: str
    state: Any = field(compare=False)
    step: Step = field(compare=False)

    def __repr__(self) -> str:
        values = "".join(f", {name}={_text(value)}" for name, value in self.best.values.items())
        return (
            f"HalvingResult({self.monitor} {short(self.best.metrics[-1])} after {self.best.steps} steps of trial"
            f" {self.best.number}{values}; {len(self.trials)} trials)"
        )

    def export(self) -> Any:
        """The plain state of the best trial: without slots."""
        return self.step.export(self.state)

    def ranked(self) -> list[Trial]:
        """The trials, best first: those that came further come first, and those of one rung by their metric there."""
        by_rung = [[trial for trial in self.trials if trial.rung == rung] for rung in reversed(range(len(self.rungs)))]
        order = [
            number
            for trials in by_rung
            for number in promoted({t.number: t.metrics[-1] for t in trials}, len(trials), self.mode)
        ]
        return [self.trials[number] for number in order]

    def table(self) -> str:
        """The trials as a table, best first, with their values and the metric at each rung."""
        names = list(self.best.values)
        rows = [["trial", *names, *(f"step {step}" for step in self.rungs)]]
        for trial in self.ranked():
            numbers = [short(value) for value in trial.metrics]
            blank = [""] * (len(self.rungs) - len(numbers))
            rows.append([str(trial.number), *(_text(trial.values[name]) for name in names), *numbers, *blank])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.rjust, row, widths)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def _text(value: Any) -> str:
    try:
        return short(float(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a tensor of several numbers, or infinity
        return f"{value!r:.20}"
