"""`lm.ema`: a moving average of the params, for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat
from lumen.core.donation import is_retired
from lumen.core.dtypes import wide_dtype
from lumen.core.nested_states import map_train_states, train_states
from lumen.core.param_leaves import Path
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import param_field
from lumen.core.step import StepFn, Transform, add_slot, device_of, field_of, slot, with_slot, without_slot
from lumen.errors import HyperparameterError
from lumen.optim._fused_kernels import readable_on_host
from lumen.optim._numerics import Coefficients, time


@pytree_dataclass
class Averaged:
    """The slot of `ema`: the averaged `params`, at least in float32, and the number of averaged steps (int64)."""

    params: Any = param_field()
    count: Tensor


class ema(Transform):
    """Keep an exponential moving average of the params in a slot; the step itself is unchanged.

    After each step, `average = decay * average + (1 - decay) * params`, starting from the params at `init`. With
    `warmup`, the decay is at most `(1 + n) / (10 + n)` after n steps, as in TensorFlow's `ExponentialMovingAverage`.
    With `decay=None`, it is the plain mean of the params after all steps (stochastic weight averaging, Izmailov et al.
    2018). Averaging begins after `start` steps.

    The average of 16-bit params is kept in float32. In 16 bits it would never change, because changes smaller than
    1/256 of an entry are rounded away. `lm.ema.params` casts it to the params' dtypes.

    In a state that holds several training states, such as the two players of a GAN, each has an average of its own:
    `lm.ema.params(state["generator"])`.

    With `lm.donate` inside, the average is updated in place too.

    Law: params, optimizer state and metrics equal those of the step without it. Evaluate with
    `state.replace(params=lm.ema.params(state))`.

    >>> import lumen as lm, torch
    >>> averaged = lm.ema(0.999)
    >>> state = averaged.init(lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1)))
    >>> torch.equal(lm.ema.params(state)["bias"], state.params["bias"])
    True
    """

    name = "ema"
    level = "ema"
    reason = "ema averages the updated params"

    def __init__(self, decay: float | None, *, warmup: bool = False, start: int = 0) -> None:
        if decay is not None and not 0.0 <= decay < 1.0:
            raise HyperparameterError(f"ema takes a decay from 0 up to (not including) 1, or None; got {decay!r}.")
        self.decay = None if decay is None else float(decay)  # of NumPy or torch: the weight is a float64
        self.warmup = warmup
        self.start = start

    @staticmethod
    def params(state: Any) -> Mapping[str, Tensor]:
        """The averaged params, with the structure and in the dtypes of `state.params`."""
        averaged: Averaged = slot(state, "ema")
        return tree.map(lambda a, p: a.to(p.dtype), averaged.params, state.params)  # type: ignore[no-any-return]

    def init(self, state: Any) -> Any:
        """Add the slot: a copy of the params, with 16-bit ones in float32."""
        return _map_states(self._with_average, state)

    def _with_average(self, _: Path, state: Any) -> Any:
        params = field_of(state, "params", self.name)

        def make_slot() -> Averaged:
            count = torch.full((), -self.start, dtype=torch.int64, device=device_of(params))
            return Averaged(tree.map(lambda p: p.to(wide_dtype(p.dtype), copy=True), params), count)

        return add_slot(state, self.name, make_slot)

    def export(self, state: Any) -> Any:
        """Drop the slot."""
        return _map_states(lambda _, inner: without_slot(inner, self.name), state)

    def wrap(self, step: StepFn) -> StepFn:
        """The step, followed by an update of the average."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            old: dict[Path, tuple[Any, Averaged]] = {}

            def note(path: Path, inner: Any) -> Any:
                old[path] = inner, slot(inner, self.name)
                return inner

            def averaged(path: Path, inner: Any) -> Any:
                before, average = old[path]
                return with_slot(inner, self.name, self._update(average, inner.params, in_place=is_retired(before)))

            _map_states(note, state)
            new, metrics = step(state, batch)
            return _map_states(averaged, new), metrics

        return run

    def _update(self, old: Averaged, params: Any, in_place: bool) -> Averaged:
        leaves, spec = tree.flatten(old.params)
        new = tree.leaves(params)
        if leaves and readable_on_host([old.count, *leaves, *new]):
            n = int(old.count) + 1
            new = [b if b.dtype is a.dtype else b.to(a.dtype) for a, b in zip(leaves, new, strict=True)]
            if in_place:
                _torch_compat.foreach_lerp_(leaves, new, self._weight_on_host(n))
                old.count.fill_(n)
                return old
            averaged = _torch_compat.foreach_lerp(leaves, new, self._weight_on_host(n))
            return Averaged(tree.unflatten(spec, [*averaged]), torch.full_like(old.count, n))
        count = old.count + 1
        return Averaged(tree.unflatten(spec, _lerp(leaves, new, self._weight(count))), count)

    def _weight_on_host(self, n: int) -> float:
        """`_weight`, where reading the count costs nothing."""
        if n < 1:
            return 1.0
        if self.decay is None:
            return 1.0 / n
        return 1.0 - (min((1.0 + n) / (10.0 + n), self.decay) if self.warmup else self.decay)

    def _weight(self, count: Tensor) -> Tensor:
        """The weight of the newest params; 1 until averaging begins."""
        n = time(count.clamp(min=1))
        if self.decay is None:
            weight = 1.0 / n
        elif self.warmup:
            weight = 1.0 - torch.clamp((1.0 + n) / (10.0 + n), max=self.decay)
        else:
            weight = torch.full_like(n, 1.0 - self.decay)
        return torch.where(count >= 1, weight, torch.ones_like(weight))


def _map_states(change: Callable[[Path, Any], Any], state: Any) -> Any:
    """`state` with `change(path, inner)` in place of itself, or of each training state in a state without params."""
    if hasattr(state, "params") or not train_states(state):
        return change((), state)
    return map_train_states(change, state)


def _lerp(old: list[Tensor], new: list[Tensor], weight: Tensor) -> list[Tensor]:
    coefficients = Coefficients(weight)

    def lerp(a: Tensor, b: Tensor) -> Tensor:
        (leaf_weight,) = coefficients.like(a)
        return torch.lerp(a, b if b.dtype is a.dtype else b.to(a.dtype), leaf_weight)

    return [lerp(a, b) for a, b in zip(old, new, strict=True)]
