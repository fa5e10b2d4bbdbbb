"""Schedules: pure functions from the step (an integer scalar tensor, 0 at first) to a scalar tensor.

They contain no Python branch on a value, so they run under `vmap` and in traced programs. Pass one wherever
an optimizer takes a learning rate. Beyond its last step, a schedule keeps its last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lumen.errors import HyperparameterError
from lumen.optim.hyper import Schedule, check_count, check_scalar
from lumen.optim.numerics import Scalar, scalar_dtype, time

Anneal = Literal["cos", "linear"]


def constant(value: Scalar) -> Schedule:
    """The same value at every step.

    >>> import torch, lumen as lm
    >>> lm.optim.constant(0.1)(torch.tensor(7)).item()
    0.1
    """
    check_scalar("value", value, schedule=False)
    return lambda step: _ones(step) * value


def linear(start: Scalar, stop: Scalar, steps: int) -> Schedule:
    """A line from `start` to `stop` over `steps` steps. Torch: `LinearLR`.

    >>> import torch, lumen as lm
    >>> lm.optim.linear(0.0, 1.0, steps=4)(torch.tensor(1)).item()
    0.25
    """
    return polynomial(start, stop, steps, power=1.0)


def polynomial(start: Scalar, stop: Scalar, steps: int, power: Scalar = 1.0) -> Schedule:
    """`stop + (start − stop) · (1 − step/steps)^power`. Torch: `PolynomialLR` (with `stop=0`).

    >>> import torch, lumen as lm
    >>> lm.optim.polynomial(1.0, 0.0, steps=2, power=2.0)(torch.tensor(1)).item()
    0.25
    """
    check_scalar("start", start, schedule=False)
    check_scalar("stop", stop, schedule=False)
    check_scalar("power", power, schedule=False)
    check_count("steps", steps, low=1)
    return lambda step: stop + (start - stop) * (1 - _progress(step, 0, steps)) ** power


def cosine(start: Scalar, steps: int, stop: Scalar = 0.0) -> Schedule:
    """Half a cosine wave from `start` to `stop` over `steps` steps (Loshchilov & Hutter, 2017, SGDR).

    `stop + (start − stop) · (1 + cos(π · step/steps)) / 2`. Torch: `CosineAnnealingLR`, up to its `T_max`.

    >>> import torch, lumen as lm
    >>> round(lm.optim.cosine(1.0, steps=10)(torch.tensor(5)).item(), 6)
    0.5
    """
    check_scalar("start", start, schedule=False)
    check_scalar("stop", stop, schedule=False)
    check_count("steps", steps, low=1)
    return lambda step: _half_wave(start, stop, _progress(step, 0, steps))


def warmup_cosine(peak: Scalar, steps: int, warmup: int, *, start: Scalar = 0.0, stop: Scalar = 0.0) -> Schedule:
    """A line from `start` to `peak` over `warmup` steps, then half a cosine wave down to `stop` at `steps`.

    >>> import torch, lumen as lm
    >>> schedule = lm.optim.warmup_cosine(1.0, steps=110, warmup=10)
    >>> [round(schedule(torch.tensor(step)).item(), 3) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    check_count("warmup", warmup, low=1)
    if steps <= warmup:
        raise HyperparameterError(f"steps={steps} includes the warmup of {warmup} and must be greater than it.")
    return join([linear(start, peak, warmup), cosine(peak, steps - warmup, stop)], [warmup])


def exponential(
    start: Scalar, rate: Scalar, every: int = 1, *, staircase: bool = False, stop: Scalar = 0.0
) -> Schedule:
    """`start · rate^(step/every)`, not below `stop`; in whole periods with `staircase`. Torch: `ExponentialLR`.

    >>> import torch, lumen as lm
    >>> lm.optim.exponential(1.0, 0.5)(torch.tensor(2)).item()
    0.25
    """
    check_scalar("start", start, schedule=False)
    check_scalar("rate", rate, schedule=False)
    check_scalar("stop", stop, schedule=False)
    check_count("every", every, low=1)

    def schedule(step: Tensor) -> Tensor:
        periods = time(step) / every
        value = start * _ones(step) * rate ** (torch.floor(periods) if staircase else periods)
        return torch.maximum(value, stop * _ones(step))

    return schedule


def step_decay(start: Scalar, factor: Scalar, every: int) -> Schedule:
    """`start · factor^⌊step/every⌋`. Torch: `StepLR`.

    >>> import torch, lumen as lm
    >>> lm.optim.step_decay(1.0, 0.5, every=10)(torch.tensor(19)).item()
    0.5
    """
    return exponential(start, factor, every, staircase=True)


def piecewise(start: Scalar, factors: Mapping[int, Scalar]) -> Schedule:
    """`start`, multiplied at each given step by its factor from there on. Torch: `MultiStepLR`.

    >>> import torch, lumen as lm
    >>> schedule = lm.optim.piecewise(1.0, {100: 0.5, 200: 0.1})
    >>> [round(schedule(torch.tensor(step)).item(), 3) for step in (99, 100, 200)]
    [1.0, 0.5, 0.05]
    """
    check_scalar("start", start, schedule=False)
    for boundary, factor in factors.items():
        check_scalar(f"factors[{boundary}]", factor, schedule=False)

    def schedule(step: Tensor) -> Tensor:
        value = start * _ones(step)
        for boundary, factor in factors.items():
            value = torch.where(step >= boundary, value * factor, value)
        return value

    return schedule


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another; each counts its steps from its own boundary. Torch: `SequentialLR`.

    >>> import torch, lumen as lm
    >>> schedule = lm.optim.join([lm.optim.linear(0.0, 1.0, 5), lm.optim.constant(0.5)], [5])
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

    def schedule(step: Tensor) -> Tensor:
        value = schedules[0](step)
        for boundary, later in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(step < boundary, value, later(torch.clamp(step - boundary, min=0)))
        return value

    return schedule


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

    With `three_phase`, first down to the start as slowly as it went up. Torch: `OneCycleLR`, whose
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
    check_count("steps", steps, low=1)
    if anneal not in ("cos", "linear"):
        raise HyperparameterError(f"anneal={anneal!r} is not allowed: give 'cos' or 'linear'.")
    curve: Callable[[Scalar, Scalar, Tensor], Tensor] = _half_wave if anneal == "cos" else _line
    start = peak / start_divisor
    up = (
        warmup_fraction * steps - 1
    )  # torch counts phases in such fractional steps, so that the last one ends at steps - 1
    ends = [up, 2 * warmup_fraction * steps - 2, steps - 1] if three_phase else [up, steps - 1]
    values = [start, peak, start, start / stop_divisor] if three_phase else [start, peak, start / stop_divisor]

    def schedule(step: Tensor) -> Tensor:
        value = curve(values[-2], values[-1], _progress(step, ends[-2], ends[-1]))
        for i in reversed(range(len(ends) - 1)):
            begin = ends[i - 1] if i else 0.0
            value = torch.where(
                step <= ends[i], curve(values[i], values[i + 1], _progress(step, begin, ends[i])), value
            )
        return value

    return schedule


def _ones(step: Tensor) -> Tensor:
    return torch.ones_like(step, dtype=scalar_dtype(step.device))


def _progress(step: Tensor, begin: float, end: float) -> Tensor:
    """How much of the way from `begin` to `end` is done at `step`, from 0 to 1."""
    span = end - begin
    return torch.clamp((time(step) - begin) / (span if span > 0 else 1.0), 0.0, 1.0)


def _line(start: Scalar, stop: Scalar, progress: Tensor) -> Tensor:
    return start + (stop - start) * progress


def _half_wave(start: Scalar, stop: Scalar, progress: Tensor) -> Tensor:
    return stop + (start - stop) / 2 * (1 + torch.cos(math.pi * progress))
