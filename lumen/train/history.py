"""`History`: the numbers that one call of `fit` logged, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lumen.train.curves import Extremes

_POINTS = 400  # for each name; beyond that every other point is dropped

Point = tuple[int, int, float]  # the index of the report, its step, the number


class History:
    """The numbers that one call of `fit` logged, by name.

    For each name it keeps at most a few hundred, evenly spaced over the run, and always the last, the lowest and the
    highest. `history[name]` returns the steps and the numbers, `history.extremes(name)` those three with their steps,
    and `history.best(name)` the best.

    Args:
        better: whether the lowest ("min") or the highest ("max") is the best, for metrics whose name does not say it.

    >>> history = History()
    >>> for step in range(10_000):
    ...     history.add(step, {"val/loss": (step - 777) ** 2})
    >>> steps, losses = history["val/loss"]
    >>> len(steps) < 500, steps[-1], history.best("val/loss")
    (True, 9999, (777, 0))
    """

    def __init__(self, better: Mapping[str, str] | None = None) -> None:
        self._better = dict(better or {})
        self._curves: dict[str, _Curve] = {}

    @property
    def names(self) -> list[str]:
        """All names that were logged, in the order of their first appearance."""
        return list(self._curves)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers that were logged at a step."""
        for name, value in numbers.items():
            curve = self._curves.get(name)
            if curve is None:
                curve = self._curves[name] = _Curve()
            curve.add(step, value)

    def __getitem__(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which `name` was logged, and its numbers; raises KeyError that lists the names."""
        points = self._curve(name).points()
        return [step for _, step, _ in points], [value for _, _, value in points]

    def extremes(self, name: str) -> Extremes:
        """The last, the lowest and the highest number, each with its step; raises KeyError as `history[name]` does."""
        return self._curve(name).extremes()

    def best(self, name: str) -> tuple[int, float] | None:
        """The step and the number of the best; None if no number was finite, or if it is unknown which is better.

        It is known for the metric that `lm.Checkpointer(…, monitor=…)` names, and for losses, errors and accuracies.
        """
        extremes, mode = self.extremes(name), better(name, self._better)
        point = extremes.lowest if mode == "min" else extremes.highest if mode == "max" else None
        return None if point is None else (int(point[0]), point[1])

    def _curve(self, name: str) -> _Curve:
        if name not in self._curves:
            raise KeyError(f"{name!r} was not logged; logged were {', '.join(self._curves) or 'no numbers'}")
        return self._curves[name]


class _Curve:
    """The numbers of one name."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._stride = 1  # the number of reports from one kept point to the next
        self._count = 0
        self._gaps = 0
        self._last: Point | None = None
        self._lowest: Point | None = None
        self._highest: Point | None = None

    def add(self, step: int, value: float) -> None:
        point = self._last = (self._count, step, value)
        if self._count % self._stride == 0:
            self._points.append(point)
            if len(self._points) > _POINTS:
                del self._points[1::2]
                self._stride *= 2
        self._count += 1
        if not math.isfinite(value):
            self._gaps += 1
            return
        if self._lowest is None or value < self._lowest[2]:
            self._lowest = point
        if self._highest is None or value > self._highest[2]:
            self._highest = point

    def points(self) -> list[Point]:
        extremes = [point for point in (self._lowest, self._highest, self._last) if point is not None]
        by_index = {point[0]: point for point in [*self._points, *extremes]}
        return [by_index[index] for index in sorted(by_index)]

    def extremes(self) -> Extremes:
        last, lowest, highest = (None if p is None else p[1:] for p in (self._last, self._lowest, self._highest))
        assert last is not None
        return Extremes(last, lowest, highest, self._gaps)


def better(name: str, modes: Mapping[str, str]) -> str | None:
    """Whether the lowest ("min") or the highest ("max") value of a metric is its best; None if that is unknown.

    >>> better("val/loss", {}), better("val/accuracy", {}), better("lr", {}), better("gap", {"gap": "min"})
    ('min', 'max', None, 'min')
    """
    word = name.rpartition("/")[2].lower()
    if name in modes:
        return modes[name]
    if "loss" in word or "perplexity" in word or "error" in word:
        return "min"
    return "max" if "accuracy" in word or word in ("acc", "f1", "auc", "auroc", "bleu") else None
