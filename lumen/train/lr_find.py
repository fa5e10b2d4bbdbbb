"""`lm.lr_find`: Smith's range test for the learning rate."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lumen.core.arguments import checked_first
from lumen.core.device import forked_rng
from lumen.core.metrics import compute_metrics
from lumen.core.step import StepFn, device_of
from lumen.core.urls import local_path
from lumen.errors import BatchError, HyperparameterError, NonFiniteError, SpikeError, StepError
from lumen.optim._base import clone
from lumen.optim._hyperparams import check_count, check_scalar
from lumen.optim._with_learning_rate import with_learning_rate
from lumen.train.device_feed import DeviceIterator, open_batches
from lumen.train.distributed import ProcessGroupContext

_PLOT = "the plot of lm.lr_find"


@dataclass(frozen=True)
class LRFinderResult:
    """The result of `lm.lr_find`: the loss at each of the `lrs`, its running mean, and the suggested learning rate.

    `index` is the index of the `suggestion` in `lrs`. Both are None if the loss never fell, or if the search ended too
    early. `reason` says why it ended.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    index: int | None
    reason: str

    @property
    def suggestion(self) -> float | None:
        """The learning rate at which the loss fell fastest."""
        return None if self.index is None else self.lrs[self.index]

    def __repr__(self) -> str:
        lr = "None" if self.suggestion is None else f"{self.suggestion:.3g}"
        return f"LRFinderResult(suggestion={lr}, {len(self.lrs)} points, {self.reason!r})"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the curve as an image, with the suggestion marked."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("a plot needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")  # no pyplot, which would change the user's backend
        axes = figure.add_subplot()
        axes.plot(self.lrs, self.losses, alpha=0.3, label="loss")
        axes.plot(self.lrs, self.smoothed, label="running mean")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, linestyle=":", label=f"suggestion: {self.suggestion:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend()
        figure.savefig(local_path(path, _PLOT))


@checked_first
def lr_find(
    step: StepFn,
    state: Any,
    batches: Iterable[Any],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.98,
    diverge: float | None = 4.0,
    metric: str = "loss",
    plot: str | os.PathLike[str] | None = None,
) -> LRFinderResult:
    """Train for a few steps while the learning rate grows from `low` to `high`, and suggest one to train with.

    This is the range test of Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186). The
    suggestion is where the loss falls fastest against the logarithm of the learning rate, before it is at its lowest:
    where a line through the losses of a fifth of the points is steepest. The learning rate is set in the optimizer's
    state, so leave out warm-up and other schedules for the search. The state and torch's random generators do not
    change.

    Args:
        step: the training step, with its transforms.
        state: the state that `step` takes (`step.init(state)`).
        batches: the source of batches; it is iterated again if it has fewer than `steps`.
        low: the first learning rate.
        high: the last learning rate.
        steps: the number of learning rates, each the same factor times the one before.
        smoothing: the weight of the past in the running mean of losses, in [0, 1).
        diverge: stop when the running mean is this many times the best one; None never stops early.
        metric: the key of the loss among the metrics that the step returns.
        plot: where to write the curve as an image, such as "lr.png".

    Raises:
        HyperparameterError: a value outside its range, or an optimizer whose learning rate is a schedule.
        BatchError: there is no batch.
        StepError: the step returns no such number.
        ImportError: `plot` is set, and matplotlib is missing.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     def loss_fn(params, batch):
    ...         out, _ = state.apply(params, batch)
    ...         return (out - 1).square().mean()
    ...     loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(1e-3))
    >>> result = lm.lr_find(step, state, [torch.ones(4, 2)])
    >>> 0.01 < result.suggestion < 1
    True
    """
    _check(low, high, steps, smoothing, diverge)
    if plot is not None:
        local_path(plot, _PLOT)
    lrs = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    curve = _Curve(smoothing, diverge)
    device = device_of(state)
    source = (
        batches if isinstance(batches, DeviceIterator) else open_batches(batches, state, ProcessGroupContext(state))
    )
    with forked_rng(device):
        reason = _sweep(step, state, zip(lrs, _endless(source), strict=False), metric, curve)
    if not reason:
        reason = f"all {steps} steps are complete" if len(curve.lrs) == steps else "the batches ended"
    index = _steepest(curve.losses, curve.smoothed, reach=max(1, steps // 10))
    result = LRFinderResult(tuple(curve.lrs), tuple(curve.losses), tuple(curve.smoothed), index, reason)
    if plot is not None:
        result.plot(plot)
    return result


class _Curve:
    """The losses so far with their running mean, and whether the search continues."""

    def __init__(self, smoothing: float, diverge: float | None) -> None:
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._smoothing = smoothing
        self._diverge = diverge
        self._mean = 0.0
        self._best = math.inf

    def add(self, lr: float, loss: float) -> str:
        """Add a loss; returns what happened to it if the search is to end, else an empty string."""
        if not math.isfinite(loss):
            return "was not finite"
        self._mean = self._smoothing * self._mean + (1 - self._smoothing) * loss
        # The running mean starts at zero: without this it would be too small for a long time.
        smoothed = self._mean / (1 - self._smoothing ** (len(self.losses) + 1))
        self.lrs.append(lr)
        self.losses.append(loss)
        self.smoothed.append(smoothed)
        # For a positive loss `diverge` times the best; a negative one must rise by as much.
        if self._diverge is not None and smoothed > self._best + (self._diverge - 1) * abs(self._best):
            return "diverged"
        self._best = min(self._best, smoothed)
        return ""


def _sweep(step: StepFn, state: Any, points: Iterable[tuple[float, Any]], metric: str, curve: _Curve) -> str:
    """Run the steps; returns why they ended early, or an empty string."""
    state = clone(state)  # a step may donate it
    lr = None
    for lr, batch in points:
        try:
            state, metrics = step(with_learning_rate(state, lr), batch)
            problem = curve.add(lr, _number(metrics, metric))
        except NonFiniteError:  # from `lm.guard`
            problem = "was not finite"
        except SpikeError:
            problem = "or the gradient was an outlier"
        if problem:
            return f"the loss {problem} at a learning rate of {lr:.3g}"
    if lr is None:
        raise BatchError("there is no batch to search on. A generator that was used before is empty: create a new one.")
    return ""


def _steepest(losses: Sequence[float], smoothed: Sequence[float], reach: int) -> int | None:
    """The index where the loss falls fastest: the center of the steepest line through 2·reach + 1 losses.

    The line is fitted to the losses themselves. Their running mean lags behind: it falls fastest where the loss is
    about to rise. Points beyond the lowest running mean do not count, since a loss that has diverged may fall again.
    """
    if len(losses) <= 2 * reach:
        return None
    windows = torch.tensor(losses, dtype=torch.float64).unfold(0, 2 * reach + 1, 1)
    slopes = windows @ torch.arange(-reach, reach + 1, dtype=torch.float64)  # the logarithms are evenly spaced
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    slopes = slopes[: max(1, lowest - reach + 1)]
    return reach + int(slopes.argmin()) if slopes.min() < 0 else None


def _endless(batches: DeviceIterator) -> Iterator[Any]:
    """The batches of epoch after epoch, as long as an epoch has any."""
    for number in itertools.count():
        empty = True
        for batch in batches.epoch(number):
            empty = False
            yield batch
        if empty:
            return


def _number(metrics: Any, name: str) -> float:
    if not isinstance(metrics, Mapping) or name not in metrics:
        names = ", ".join(map(repr, metrics)) if isinstance(metrics, Mapping) else type(metrics).__name__
        raise StepError(
            f"lr_find looks for {name!r} among the step's metrics, which are {names or 'none'}. Return it from the"
            " step, or name another: lm.lr_find(..., metric='loss')."
        )
    value = torch.as_tensor(compute_metrics(metrics[name]))
    if value.numel() != 1:
        raise StepError(
            f"lr_find needs one number for {name!r}, not {list(value.shape)}. Search for one lane of an ensemble alone,"
            " or return the mean from the step."
        )
    return float(value)


def _check(low: float, high: float, steps: int, smoothing: float, diverge: float | None) -> None:
    for name, value, least in (("low", low, 0.0), ("high", high, low)):
        check_scalar(name, value, low=least, schedule=False)
        if value == least:
            raise HyperparameterError(f"{name}={value!r} is not allowed: give a number above {least:g}.")
    steps = check_count("steps", steps, low=10)
    check_scalar("smoothing", smoothing, high=1.0, open_high=True, schedule=False)
    if diverge is not None and not (isinstance(diverge, int | float) and diverge > 1):
        raise HyperparameterError(f"diverge={diverge!r} is not allowed: give a number above 1, or None.")
