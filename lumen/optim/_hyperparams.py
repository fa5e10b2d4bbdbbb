"""Hyperparameters: constants of the program, or tensors in the state.

The learning rate is always a tensor in `state.hparams`: it can be changed without recompiling a step, swept by `vmap`
and differentiated. Other hyperparameters are stored there if they are passed as tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat
from lumen.core.annotations import integer_of
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import HyperparameterError, ParamsError
from lumen.optim._numerics import Scalar, scalar_dtype

HParams = dict[str, Tensor]
Schedule = Callable[[Tensor], Tensor]
ScalarOrSchedule = float | Tensor | Schedule


@pytree_dataclass
class HyperState:
    """The state of a transform that stores nothing but tensor hyperparameters."""

    hparams: HParams


class Hyper:
    """The hyperparameters of one optimizer, checked at construction.

    `lr` is None for transforms without one. `below_one` names those that must be in [low, 1), `at_most_one`
    those in [low, 1]; the others must be finite and at least `low`.
    """

    def __init__(
        self,
        lr: ScalarOrSchedule | None,
        *,
        below_one: tuple[str, ...] = (),
        at_most_one: tuple[str, ...] = (),
        low: float = 0.0,
        **others: float | Tensor,
    ) -> None:
        self.schedule: Schedule | None = None
        stored: dict[str, Scalar] = {}
        if lr is not None:
            check_scalar("lr", lr)
            if isinstance(lr, np.generic):
                lr = float(lr)
            if callable(lr):
                self.schedule = lr
            else:
                stored["lr"] = lr
        for name, value in others.items():
            high = 1.0 if name in below_one + at_most_one else math.inf
            check_scalar(name, value, low=low, high=high, open_high=name in below_one, schedule=False)
        others = {name: float(value) if isinstance(value, np.generic) else value for name, value in others.items()}
        self._constants = {name: value for name, value in others.items() if not isinstance(value, Tensor)}
        self._stored = stored | {name: value for name, value in others.items() if isinstance(value, Tensor)}
        self._names = tuple(others)
        self.constants = tuple(float(value) for value in self._constants.values())
        self.has_lr = lr is not None
        self.has_tensors = any(name != "lr" for name in self._stored)

    def init(self, params: Any) -> tuple[Tensor, HParams]:
        """A count of zero and the hyperparameters for the state, on the params' device."""
        device = device_of(params)
        count = torch.zeros((), dtype=torch.int64, device=device)
        hparams = {name: _stored_scalar(value, device) for name, value in self._stored.items()}
        if self.schedule is not None:
            hparams["scheduled_lr"] = _stored_scalar(self.schedule(count), device)
        return count, hparams

    def pack(self, params: Any) -> Any:
        """The state of a transform that stores nothing else: its tensor hyperparameters, or an empty tuple."""
        if not self._stored:
            return ()
        _, hparams = self.init(params)
        return HyperState(hparams)

    @staticmethod
    def unpack(state: Any) -> HParams:
        """The hyperparameters in a state made by `pack`."""
        return state.hparams if isinstance(state, HyperState) else {}

    def __call__(self, name: str, hparams: HParams) -> Scalar:
        """The value of `name`: the state's tensor, or the constant."""
        value = hparams.get(name)
        return self._constants[name] if value is None else value

    def values(self, hparams: HParams) -> tuple[Scalar, ...]:
        """The values of all but the learning rate, in the order of declaration."""
        return tuple(hparams.get(name, self._constants.get(name)) for name in self._names)  # type: ignore[misc]

    def numbers(self, hparams: HParams) -> tuple[float, ...]:
        """The same as Python numbers, for kernels that accept nothing else."""
        return tuple(float(value) for value in self.values(hparams)) if self.has_tensors else self.constants

    def is_zero(self, name: str) -> bool:
        """Whether `name` is the constant 0, so its term can be omitted."""
        return self._constants.get(name) == 0

    def lr(self, count: Tensor, hparams: HParams) -> tuple[Tensor, HParams]:
        """The learning rate at step `count`, and the hyperparameters, which record a scheduled rate."""
        if self.schedule is None:
            return hparams["lr"], hparams
        lr = torch.as_tensor(self.schedule(count), dtype=scalar_dtype(count.device), device=count.device)
        return lr, {**hparams, "scheduled_lr": lr}

    def eager_lr(self, count: Tensor, hparams: HParams) -> tuple[Tensor, HParams]:
        """Like `lr`, for a fused lowering: on the CPU, Lumen's schedules are evaluated as Python numbers."""
        at = getattr(self.schedule, "at", None)
        if at is None or not count.is_cpu:
            return self.lr(count, hparams)
        lr = torch.as_tensor(at(int(count)), dtype=torch.float64)
        return lr, {**hparams, "scheduled_lr": lr}

    def minus_lr(self, count: Tensor, hparams: HParams) -> tuple[Scalar, HParams]:
        """The factor of a direction: minus the learning rate, or 1 for a transform without one."""
        if not self.has_lr:
            return 1.0, hparams
        lr, hparams = self.lr(count, hparams)
        return -lr, hparams


def device_of(params: Any) -> torch.device:
    """The device of the first leaf; ParamsError if there is none."""
    tensors = tree.tensors(params)
    if not tensors:
        raise ParamsError("params has no tensors: there is nothing to train.")
    return tensors[0].device


def _stored_scalar(value: Scalar, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):  # a copy: the caller's tensor must not be donated with the state
        return value.to(device=device, dtype=scalar_dtype(device)).clone()
    return torch.tensor(value, dtype=scalar_dtype(device), device=device)


def check_scalar(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    open_high: bool = False,
    schedule: bool = True,
) -> None:
    """Raise `HyperparameterError` unless `value` is a finite number in [low, high], or [low, high).

    Floating 0-d tensors pass if their value cannot be read here (on an accelerator, in a traced or vmapped
    function). Schedules pass if `schedule` is true.
    """
    if schedule and callable(value) and not isinstance(value, Tensor):
        return
    number = value
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise HyperparameterError(
                f"{name} is a tensor of shape {tuple(value.shape)} and {value.dtype}; as a tensor it must be a"
                f" floating scalar (shape ()). To try several values at once write: lm.sweep({name}=values)(step)"
            )
        if not _readable(value):
            return
        number = value.item()
    if not isinstance(number, int | float | np.floating | np.integer) or not _inside(
        float(number), low, high, open_high
    ):
        bracket = ")" if open_high or high == math.inf else "]"
        fix = f"give a number in [{low:g}, {high:g}{bracket}"
        if schedule and not isinstance(value, int | float | Tensor):
            fix += " or a function of the step, such as lm.optim.warmup_cosine(1e-3, steps=1000, warmup=100)"
        if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
            fix += "; a scheduler of torch changes an optimizer of torch, and nothing of lm.optim"
        raise HyperparameterError(f"{name}={value!r:.80} is not allowed: {fix}.")


def check_count(name: str, value: Any, low: int) -> int:
    """`value` as an int; raises `HyperparameterError` unless it is a whole number from `low`."""
    number = integer_of(value, low)
    if number is None:
        raise HyperparameterError(f"{name}={value!r} is not allowed: give a whole number from {low}.")
    return number


def _inside(number: float, low: float, high: float, open_high: bool) -> bool:
    return math.isfinite(number) and low <= number <= high and not (open_high and number == high)


def _readable(value: Tensor) -> bool:
    return (
        type(value) is Tensor
        and value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _torch_compat.is_functorch_wrapped_tensor(value)
    )


def learning_rate(opt_state: Any) -> Tensor | None:
    """The first learning rate in an optimizer's state, at any depth; None if there is none.

    A scheduled rate is that of the last update, or before any update that of the first. The scale of a
    `reduce_on_plateau` in the same chain is included.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.sgd(0.5))
    >>> lm.optim.learning_rate(tx.init({"w": torch.ones(2)})).item()
    0.5
    """
    hparams = getattr(opt_state, "hparams", {})
    for key in ("scheduled_lr", "lr"):
        if key in hparams:
            return hparams[key]  # type: ignore[no-any-return]
    below = list(children(opt_state))
    lr = next((rate for rate in map(learning_rate, below) if rate is not None), None)
    if lr is not None and type(opt_state) is tuple:
        for neighbor in below:
            lr = lr * getattr(neighbor, "scale", 1.0)
    return lr


def children(node: Any) -> Iterable[Any]:
    """The nodes that may contain further states: the values of a state's fields, of a dict or of a sequence."""
    if dataclasses.is_dataclass(node):
        return [getattr(node, field.name) for field in dataclasses.fields(node)]
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, tuple | list) else ()
