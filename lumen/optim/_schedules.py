"""Schedules: pure functions from the step (an integer scalar tensor, 0 at first) to a scalar tensor.

They contain no Python branch on a value, so they run under `vmap` and in traced programs. Pass one wherever
an optimizer takes a learning rate. After its last step, a schedule keeps its last value. Any function of the
step is a schedule too. In your own, write `step.double()`: an integer tensor divided by a number is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lumen.core.arguments import checked
from lumen.errors import HyperparameterError
from lumen.optim._hyperparams import Schedule, check_count, check_scalar
from lumen.optim._numerics import Scalar, scalar_dtype, time

Anneal = Literal["cos", "linear"]


@dataclass(frozen=True)
class Curve:
    """A schedule defined by a formula `(step, functions) -> value`, for tensors and for Python numbers.

    A fused update on the CPU evaluates it in Python numbers, which takes a tenth of the time of scalar tensors.
    """

    formula: Callable[[Any, Any], Any]

    def __call__(self, step: Tensor) -> Tensor:
        """The value at `step`, by tensor operations."""
        return _tensor(self.formula(time(step), _Tensors), step)

    def at(self, step: int) -> Any:
        """The value at `step`, a Python number unless the schedule contains tensors."""
        return self.formula(float(step), _Numbers)


class _Tensors:
    """The functions that formulas use, for tensors."""

    cos = torch.cos
    floor = torch.floor

    @staticmethod
    def clamp(x: Tensor, low: float, high: float) -> Tensor:
        return torch.clamp(x, low, high)

    @staticmethod
    def where(condition: Tensor, yes: Scalar, no: Scalar) -> Tensor:
        return torch.where(condition, _tensor(yes, condition), _tensor(no, condition))

    @staticmethod
    def largest(x: Tensor, y: Scalar) -> Tensor:
        return torch.maximum(x, _tensor(y, x))


class _Numbers:
    """The same for Python numbers."""

    cos = math.cos
    floor = math.floor
    largest = max

    @staticmethod
    def clamp(x: float, low: float, high: float) -> float:
        return min(max(x, low), high)

    @staticmethod
    def where(condition: bool, yes: Scalar, no: Scalar) -> Scalar:
        return yes if condition else no


def _tensor(value: Scalar, like: Tensor) -> Tensor:
    """`value` as a tensor on the device of `like`: `torch.where` makes two numbers float32."""
    if isinstance(value, Tensor):
        return value
    return torch.full_like(like, value, dtype=scalar_dtype(like.device))


@checked
def constant(value: Scalar) -> Schedule:
    """The same value at every step.

    >>> import torch, lumen as lm
    >>> lm.optim.constant(0.1)(torch.tensor(7)).item()
    0.1
    """
    check_scalar("value", value, schedule=False)
    return Curve(lambda t, m: value)


@checked
def linear(start: Scalar, steps: int, stop: Scalar) -> Schedule:
    """A line from `start` to `stop` over `steps` steps. Torch: `LinearLR`.

    >>> import torch, lumen as lm
    >>> lm.optim.linear(0.0, steps=4, stop=1.0)(torch.tensor(1)).item()
    0.25
    """
    check_scalar("start", start, schedule=False)
    check_scalar("stop", stop, schedule=False)
    steps = check_count("steps", steps, low=1)
    return Curve(lambda t, m: _line(start, stop, _progress(t, 0, steps, m), m))


@checked
def polynomial(start: Scalar, steps: int, stop: Scalar, power: Scalar = 1.0) -> Schedule:
    """`stop + (start − stop) · (1 − step/steps)^power`. Torch: `PolynomialLR` (with `stop=0`).

    >>> import torch, lumen as lm
    >>> lm.optim.polynomial(1.0, steps=2, stop=0.0, power=2.0)(torch.tensor(1)).item()
    0.25
    """
    check_scalar("start", start, schedule=False)
    check_scalar("stop", stop, schedule=False)
    check_scalar("power", power, schedule=False)
    steps = check_count("steps", steps, low=1)
    return Curve(lambda t, m: stop + (start - stop) * (1 - _progress(t, 0, steps, m)) ** power)


@checked
def cosine(start: Scalar, steps: int, stop: Scalar = 0.0) -> Schedule:
    """Half a cosine wave from `start` to `stop` over `steps` steps (Loshchilov & Hutter, 2017, SGDR).

    `stop + (start − stop) · (1 + cos(π · step/steps)) / 2`. Torch: `CosineAnnealingLR`, up to its `T_max`.

    >>> import torch, lumen as lm
    >>> round(lm.optim.cosine(1.0, steps=10)(torch.tensor(5)).item(), 6)
    0.5
    """
    check_scalar("start", start, schedule=False)
    check_scalar("stop", stop, schedule=False)
    steps = check_count("steps", steps, low=1)
    return Curve(lambda t, m: _half_wave(start, stop, _progress(t, 0, steps, m), m))


@checked
def warmup_cosine(peak: Scalar, steps: int, warmup: int, *, start: Scalar = 0.0, stop: Scalar = 0.0) -> Schedule:
    """A line from `start` to `peak` over `warmup` steps, then half a cosine wave down to `stop` at `steps`.

    >>> import torch, lumen as lm
    >>> schedule = lm.optim.warmup_cosine(1.0, steps=110, warmup=10)
    >>> [round(schedule(torch.tensor(step)).item(), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    steps, warmup = check_count("steps", steps, low=1), check_count("warmup", warmup, low=0)
    if steps <= warmup:
        raise HyperparameterError(f"steps={steps} includes the warmup of {warmup} and must be greater than it.")
    if not warmup:
        return cosine(peak, steps, stop)
    return join([linear(start, warmup, peak), cosine(peak, steps - warmup, stop)], [warmup])


@checked
def exponential(
    start: Scalar, rate: Scalar, every: int = 1, *, staircase: bool = False, stop: Scalar = 0.0
) -> Schedule:
    """`start · rate^(step/every)`, not below `stop`; stepwise per period with `staircase`. Torch: `ExponentialLR`.

    >>> import torch, lumen as lm
    >>> lm.optim.exponential(1.0, 0.5)(torch.tensor(2)).item()
    0.25
    """
    check_scalar("start", start, schedule=False)
    check_scalar("rate", rate, schedule=False)
    check_scalar("stop", stop, schedule=False)
    every = check_count("every", every, low=1)

    def formula(t: Any, m: Any) -> Any:
        periods = t / every
        return m.largest(start * rate ** (m.floor(periods) if staircase else periods), stop)

    return Curve(formula)


@checked
def step_decay(start: Scalar, factor: Scalar, every: int) -> Schedule:
    """`start · factor^⌊step/every⌋`. Torch: `StepLR`.

    >>> import torch, lumen as lm
    >>> lm.optim.step_decay(1.0, 0.5, every=10)(torch.tensor(19)).item()
    0.5
    """
    return exponential(start, factor, every, staircase=True)


@checked
def piecewise(start: Scalar, factors: Mapping[int, Scalar]) -> Schedule:
    """`start`, multiplied by each factor from its step on. Torch: `MultiStepLR`.

    >>> import torch, lumen as lm
    >>> schedule = lm.optim.piecewise(1.0, {100: 0.5, 200: 0.1})
    >>> [round(schedule(torch.tensor(step)).item(), 3) for step in (99, 100, 200)]
    [1.0, 0.5, 0.05]
    """
    check_scalar("start", start, schedule=False)
    for boundary, factor in factors.items():
        check_scalar(f"factors[{boundary}]", factor, schedule=False)

    def formula(t: Any, m: Any) -> Any:
        value = start
        for boundary, factor in factors.items():
            value = m.where(t >= boundary, value * factor, value)
        return value

    return Curve(formula)


@checked
def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another; each counts its steps from its own boundary. Torch: `SequentialLR`.

    >>> import torch, lumen as lm
    >>> schedule = lm.optim.join([lm.optim.linear(0.0, 5, 1.0), lm.optim.constant(0.5)], [5])
    >>> [schedule(torch.tensor(step)).item() for step in (4, 5)]
    [0.8, 0.5]
    """
    if len(boundaries) != len(schedules) - 1:
        raise HyperparameterError(
            f"join takes one boundary between every two schedules: {len(schedules)} schedules need"
            f" {max(len(schedules) - 1, 0)}, got {list(boundaries)}."
        )
    if any(left >= right for left, right in pairwise([0, *boundaries])):
        raise HyperparameterError(f"boundaries={list(boundaries)} must be positive and increase.")

    curves = [schedule for schedule in schedules if isinstance(schedule, Curve)]
    if len(curves) < len(schedules):  # includes a user's own function
        return lambda step: _joined(schedules, boundaries, step, _Tensors, lambda later, x: later(x))
    return Curve(lambda t, m: _joined(curves, boundaries, t, m, lambda later, x: later.formula(x, m)))


def _joined(
    schedules: Sequence[Any], boundaries: Sequence[int], t: Any, m: Any, value_of: Callable[[Any, Any], Any]
) -> Any:
    value = value_of(schedules[0], t)
    for boundary, later in zip(boundaries, schedules[1:], strict=True):
        value = m.where(t < boundary, value, value_of(later, m.clamp(t - boundary, 0, math.inf)))
    return value


@checked
def one_cycle(
    peak: Scalar,
    steps: int,
    *,
    warmup_fraction: float = 0.3,
    anneal: Anneal = "cos",
    start_divisor: Scalar = 25.0,
    stop_divisor: Scalar = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Up from `peak / start_divisor` to `peak`, then down to `start / stop_divisor` (Smith & Topin, 2019).

    With `three_phase`, it first returns to the start as slowly as it rose. Torch: `OneCycleLR`, whose
    `pct_start`, `anneal_strategy`, `div_factor` and `final_div_factor` are `warmup_fraction`, `anneal` and
    the two divisors.

    >>> import torch, lumen as lm
    >>> schedule = lm.optim.one_cycle(1.0, steps=101, warmup_fraction=0.5)
    >>> round(schedule(torch.tensor(0)).item(), 3), round(schedule(torch.tensor(100)).item(), 6)
    (0.04, 4e-06)
    """
    check_scalar("peak", peak, schedule=False)
    check_scalar("warmup_fraction", warmup_fraction, high=1.0, schedule=False)
    check_scalar("start_divisor", start_divisor, low=1.0, schedule=False)
    check_scalar("stop_divisor", stop_divisor, low=1.0, schedule=False)
    steps = check_count("steps", steps, low=1)
    if anneal not in ("cos", "linear"):
        raise HyperparameterError(f"anneal={anneal!r} is not allowed: give 'cos' or 'linear'.")
    curve: Callable[[Any, Any, Any, Any], Any] = _half_wave if anneal == "cos" else _line
    start = peak / start_divisor
    up = warmup_fraction * steps - 1  # fractional, as in torch; the last phase ends at steps - 1
    ends = [up, 2 * warmup_fraction * steps - 2, steps - 1] if three_phase else [up, steps - 1]
    values = [start, peak, start, start / stop_divisor] if three_phase else [start, peak, start / stop_divisor]

    def formula(t: Any, m: Any) -> Any:
        value = curve(values[-2], values[-1], _progress(t, ends[-2], ends[-1], m), m)
        for i in reversed(range(len(ends) - 1)):
            begin = ends[i - 1] if i else 0.0
            phase = curve(values[i], values[i + 1], _progress(t, begin, ends[i], m), m)
            value = m.where(t <= ends[i], phase, value)
        return value

    return Curve(formula)


def _progress(t: Any, begin: float, end: float, m: Any) -> Any:
    """The fraction of the interval from `begin` to `end` that has passed at `t`, from 0 to 1."""
    span = end - begin
    return m.clamp((t - begin if begin else t) / (span if span > 0 else 1.0), 0.0, 1.0)


def _line(start: Scalar, stop: Scalar, progress: Any, _m: Any) -> Any:
    return start + (stop - start) * progress


def _half_wave(start: Scalar, stop: Scalar, progress: Any, m: Any) -> Any:
    return stop + (start - stop) / 2 * (1 + m.cos(math.pi * progress))
