"""`History`: the numbers that one `fit` logged, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lumen.train.curves import Extremes

_POINTS = 400  # of each name; when there are more, every other is forgotten

Kept = tuple[int, int, float]  # which report it was, its step, the number


class History:
    """The numbers that a run logged, by name: what its sinks got of them, in this call of `fit`.

    Of each name at most a few hundred are kept, evenly spread over the run; the last, the lowest and the highest are
    always among them. `history[name]` are the steps and the numbers, `history.extremes(name)` those three with their
    steps, and `history.best(name)` the best.

    Args:
        better: for metrics whose name does not tell it, whether the lowest ("min") or the highest ("max") is the best.

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
        """All that was logged, in the order of its first appearance."""
        return list(self._curves)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take in what was logged at a step."""
        for name, value in numbers.items():
            curve = self._curves.get(name)
            if curve is None:
                curve = self._curves[name] = _Curve()
            curve.add(step, value)

    def __getitem__(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which `name` was logged, and its numbers; raises KeyError with the names there are."""
        points = self._curve(name).points()
        return [step for _, step, _ in points], [value for _, _, value in points]

    def extremes(self, name: str) -> Extremes:
        """The last, the lowest and the highest number, each with its step; raises KeyError as `[name]` does."""
        return self._curve(name).extremes()

    def best(self, name: str) -> tuple[int, float] | None:
        """The step and the number of the best; None where no number was finite, or it is not known which is better.

        It is known of the metric that `lm.Checkpointer(…, best=…)` names, and of losses, errors and accuracies.
        """
        found, mode = self.extremes(name), better(name, self._better)
        point = found.lowest if mode == "min" else found.highest if mode == "max" else None
        return None if point is None else (int(point[0]), point[1])

    def _curve(self, name: str) -> _Curve:
        if name not in self._curves:
            raise KeyError(f"{name!r} was not logged; logged were {', '.join(self._curves) or 'no numbers'}")
        return self._curves[name]


class _Curve:
    """The numbers of one name."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []
        self._stride = 1  # reports from one that is kept to the next
        self._count = 0
        self._gaps = 0
        self._last: Kept | None = None
        self._lowest: Kept | None = None
        self._highest: Kept | None = None

    def add(self, step: int, value: float) -> None:
        this = self._last = (self._count, step, value)
        if self._count % self._stride == 0:
            self._kept.append(this)
            if len(self._kept) > _POINTS:
                del self._kept[1::2]
                self._stride *= 2
        self._count += 1
        if not math.isfinite(value):
            self._gaps += 1
            return
        if self._lowest is None or value < self._lowest[2]:
            self._lowest = this
        if self._highest is None or value > self._highest[2]:
            self._highest = this

    def points(self) -> list[Kept]:
        always = [each for each in (self._lowest, self._highest, self._last) if each is not None]
        return sorted({each[0]: each for each in [*self._kept, *always]}.values(), key=lambda kept: kept[0])

    def extremes(self) -> Extremes:
        last, lowest, highest = (None if k is None else k[1:] for k in (self._last, self._lowest, self._highest))
        assert last is not None
        return Extremes(last, lowest, highest, self._gaps)


def better(name: str, known: Mapping[str, str]) -> str | None:
    """Whether the lowest ("min") or the highest ("max") of a metric is its best; None where that is not known.

    >>> better("val/loss", {}), better("val/accuracy", {}), better("lr", {}), better("gap", {"gap": "min"})
    ('min', 'max', None, 'min')
    """
    word = name.rpartition("/")[2].lower()
    if name in known:
        return known[name]
    if "loss" in word or "perplexity" in word or "error" in word:
        return "min"
    return "max" if "accuracy" in word or word in ("acc", "f1", "auc", "auroc", "bleu") else None
