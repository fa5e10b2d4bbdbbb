"""Retention: which checkpoints of a run to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lumen.core.annotations import integer_of
from lumen.errors import HyperparameterError


@dataclass(frozen=True)
class Retention:
    """Keep the newest `keep` (None: all), the best `keep_best` by `monitor`, and each step that `keep_every` divides.

    A tie goes to the later step, which has seen more data (Lightning keeps the earlier one). NaN is never best.

    >>> saved = {step: {"loss": loss} for step, loss in enumerate([10, 9, 2.8, 5, 2.5])}
    >>> Retention(monitor="loss", mode="min", keep_best=2).steps_to_keep(saved)
    {2, 4}
    """

    keep: int | None = 1
    monitor: str | None = None
    mode: str = "min"
    keep_best: int = 1
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep", "keep_best", "keep_every"):
            value = getattr(self, name)
            if not (value is None and name != "keep_best") and integer_of(value, low=1) is None:
                raise HyperparameterError(f"{name} takes an int from 1 up, got {value!r}.")
        if not isinstance(self.monitor, str | None):
            raise HyperparameterError(f"monitor takes the name of a metric, such as 'val/loss', got {self.monitor!r}.")
        if self.mode not in ("min", "max"):
            raise HyperparameterError(f"mode={self.mode!r} is unknown; give 'min' or 'max'.")

    def steps_to_keep(self, saved: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps to keep, of those saved with these metrics; always includes the newest."""
        steps = sorted(saved)
        newest = steps if self.keep is None else steps[-self.keep :]
        regular = [step for step in steps if self.keep_every and step % self.keep_every == 0]
        return {*newest, *regular, *self.ranked(saved)[: self.keep_best]}

    def ranked(self, saved: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps that were saved with the metric, the best first."""
        if self.monitor is None:
            return []
        sign = 1 if self.mode == "min" else -1
        values = {step: metrics[self.monitor] for step, metrics in saved.items() if self.monitor in metrics}
        candidates = [step for step, value in values.items() if not math.isnan(value)]
        return sorted(candidates, key=lambda step: (sign * values[step], -step))

    def would_keep(self, saved: Mapping[int, Mapping[str, float]], metrics: Mapping[str, float]) -> bool:
        """Whether one more step, with these metrics, would be among the best."""
        newest = max(saved, default=-1) + 1
        return newest in self.ranked({**saved, newest: metrics})[: self.keep_best]
