"""`lm.guard`: keep non-finite losses and gradients, and outliers, out of the params."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core import distributed, rules, sharding
from lumen.core.donation import is_retired
from lumen.core.metrics import Mean
from lumen.core.primitives import Gradient, GradientCall, UpdateCall
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.rules import Next, Primitive
from lumen.core.step import Step, StepFn, Transform, add_slot, device_of, slot, with_slot, without_slot
from lumen.core.urls import local_path
from lumen.errors import HyperparameterError, NonFiniteError, SlotError, SpikeError
from lumen.optim._fused_kernels import readable_on_host
from lumen.optim._norms import LeafNorms
from lumen.transforms._support.snapshot_dump import CallTrace, PreStepSnapshot, SnapshotPolicy
from lumen.transforms._support.spikes import SERIES, SMALLEST_WINDOW, SpikeCheck, SpikeWindow

Mode = Literal["skip", "raise", "dump"]


@pytree_dataclass
class GuardState:
    """The slot of `guard`: how many updates were `skipped`, and the index of the last step's `bad` leaf, or -1."""

    skipped: Tensor
    bad: Tensor


@pytree_dataclass
class SpikeGuardState(GuardState):
    """The slot of `guard(spike=…)`: `spikes` has the values that the next ones are compared with.

    For `bad` the loss and the gradient's norm are two more leaves.
    """

    spikes: SpikeWindow


class guard(Transform):
    """Check the loss and the grads; if one is not finite, keep params, optimizer state and buffers unchanged.

    With `spike`, also if one is an outlier: if the loss, or the global L2 norm of the gradient (before `lm.clip`), is
    more than `spike` standard deviations above its mean over the last `window` steps. This is the rule of OLMo-core's
    `SkipStepOptimizer` (Allen Institute for AI), whose defaults are 6 and 128.

    Gradients are checked by the L2 norm of each leaf, computed in one pass; `lm.clip` inside reuses the norms. A leaf
    whose norm overflows float32 (1e19 and more) therefore counts as non-finite.

    - `"skip"` continues, and counts skipped updates in `state.slots["guard"].skipped`. It never waits for the device.
    - `"raise"` raises `NonFiniteError`, which names the first bad leaf and its module, or `SpikeError`, with the
      outlier, mean, standard deviation and step. It reads one number from the device after each step.
    - `"dump"` also raises, after writing the state before the step, the batch, the random generators and the transforms
      to `directory/step-N`. `lumen replay` (or `lm.replay`) reruns that single step. With several processes, each rank
      writes its own rows and its shards of the state to `directory/step-N-rank-R`.

    The standard deviation is the unbiased one. There is no verdict on a step before the window has `max(20, window //
    2)` values, that step's own included. Values of skipped outliers enter the window too, so a lasting change of level
    is accepted once the window knows it; values of a step that is not finite do not, nor those of a step whose gradient
    is zero. A step with several gradients is judged by the sum of their losses. Of several ranks all decide alike, by
    the loss of all rows and the norm of the whole gradient. The values are in the slot, as float32, so resuming is
    exact.

    Declared change: updates that would have been non-finite, and outliers. Every other step is bitwise the same as
    without `guard`.

    Args:
        on_nonfinite: "skip", "raise" or "dump", for outliers too.
        directory: where "dump" writes.
        spike: the number of standard deviations above the mean from which a value is an outlier; None for no such
            check. With `math.inf` nothing is one.
        window: the number of steps that the mean and the standard deviation are computed of, 20 at least.

    Raises `HyperparameterError` for a `spike` that is not positive or a `window` below 20, `StepError` in a step that
    makes several updates under `spike`, and `OrderError` for `spike` inside a transform that splits the gradient or
    scales the loss.

    >>> import lumen as lm
    >>> lm.guard("raise"), lm.guard(spike=6.0)
    (lm.guard('raise'), lm.guard('skip', spike=6.0))
    """

    name = "guard"
    level = "guard"
    reason = "guard decides whether the update happens at all"
    _unshown = ("directory",)  # does not change the step, and may differ between processes

    def __init__(
        self,
        on_nonfinite: Mode = "skip",
        directory: str | os.PathLike[str] = "dumps",
        *,
        spike: float | None = None,
        window: int = 128,
    ) -> None:
        if on_nonfinite not in ("skip", "raise", "dump"):
            raise HyperparameterError(f"guard takes 'skip', 'raise' or 'dump', got {on_nonfinite!r}.")
        _check_spike(spike, window)
        self.on_nonfinite = on_nonfinite
        self.directory = os.fspath(directory)
        local_path(directory, "the directory of lm.guard")
        self.spike = spike
        self.window = window
        if spike is not None:
            self.encloses, self.incompatible = _ENCLOSES, _INCOMPATIBLE

    def _canonical(self) -> Mapping[str, Any]:
        return {"directory": self.directory}

    def _new_memory(self) -> weakref.WeakKeyDictionary[Step, _Record]:
        return weakref.WeakKeyDictionary()  # by outermost step; a compiled one is recorded only while it is traced

    def init(self, state: Any) -> Any:
        """Add the slot."""
        device = device_of(state)
        zero = torch.zeros((), dtype=torch.int64, device=device)

        def make() -> GuardState:
            window = None if self.spike is None else SpikeWindow.empty(self.window, device)
            return _slot_of(zero, zero - 1, window)

        return add_slot(state, self.name, make)

    def export(self, state: Any) -> Any:
        """Drop the slot."""
        return without_slot(state, self.name)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with non-finite updates skipped."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            old: GuardState = slot(state, self.name)
            buffers = getattr(state, "buffers", None)
            check = _FinitenessCheck(old.bad.device, self._spike_check(old))
            with rules.rule_context({Primitive.GRADIENT: check.gradient, Primitive.UPDATE: check.update}):
                new, metrics = step(state, batch)
            record = self._record()
            record.specs = check.specs
            record.trace = record.trace.with_step(check.updates)
            # The host may read what is bad only after several steps: keep the first.
            if self.spike is None and check.is_fine_on_host() and (self.on_nonfinite != "skip" or int(old.bad) < 0):
                return new, metrics  # whose slot stays as it is
            is_reported = None if self.on_nonfinite == "skip" else old.bad >= 0
            skip, bad, window = check.result(is_reported)
            if is_reported is not None:
                bad = torch.where(is_reported, old.bad, bad)
            if buffers:
                new = new.replace(buffers=tree.select(skip, buffers, new.buffers))
            return with_slot(new, self.name, _slot_of(old.skipped + skip, bad, window)), metrics

        return run

    def _spike_check(self, old: GuardState) -> SpikeCheck | None:
        window = old.spikes if isinstance(old, SpikeGuardState) else None
        size = None if window is None else window.values.shape[-1]
        if size != (None if self.spike is None else self.window):
            raise SlotError(
                f"the slot of guard in this state was made under other settings than {self!r}. Prepare the state anew:"
                " state = step.init(lm.extend.without_slot(state, 'guard'))"
            )
        return None if self.spike is None or window is None else SpikeCheck(window, self.spike)

    def wrap_host(self, step: StepFn) -> StepFn:
        """With "raise" and "dump": raise after a non-finite step."""
        if self.on_nonfinite == "skip":
            return step

        policy = SnapshotPolicy()

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            nonlocal policy
            module = getattr(getattr(state, "apply_fn", None), "module", None)
            step_number = getattr(state, "step", None)
            step_number = None if step_number is None else int(step_number.max())
            before = PreStepSnapshot.of(state, policy) if self.on_nonfinite == "dump" else None
            record = self._record()
            record.trace = CallTrace()
            new, metrics = step(state, batch)
            policy = policy.after(record.trace, is_retired(state))
            guarded: GuardState = slot(new, self.name)
            bad = int(guarded.bad.max())
            if bad >= 0:
                error, message = self._failure(record, bad, guarded, module, step_number)
                if before is not None:
                    message += before.write(self.directory, self.within, policy.steps, step_number, batch, message)
                raise error(message)
            return new, metrics

        return run

    def _failure(
        self, record: _Record, bad: int, new: GuardState, module: Any, step_number: int | None
    ) -> tuple[type[NonFiniteError | SpikeError], str]:
        names = record.leaf_names()
        if bad < len(names):
            return NonFiniteError, _message(names[bad], module, step_number)
        assert isinstance(new, SpikeGuardState)
        lane = int(new.bad.flatten().argmax())  # 0 without `ensemble`
        value, mean, std = new.spikes.outlier.reshape(-1, 3)[lane].tolist()
        when = "" if step_number is None else f" at step {step_number}"
        return SpikeError, (
            f"{SERIES[bad - len(names)]} is {value:.6g}{when}, more than spike={self.spike} standard deviations above"
            f" the mean of the steps before (mean {mean:.6g}, standard deviation {std:.6g}). The update was skipped."
            " Check the batch; if outliers are frequent, try a lower learning rate or a longer warm-up."
        )

    def _record(self) -> _Record:
        step = self.within
        records: weakref.WeakKeyDictionary[Step, _Record] = self._memory
        return _Record() if step is None else records.setdefault(step, _Record())


def _slot_of(skipped: Tensor, bad: Tensor, window: SpikeWindow | None) -> GuardState:
    return GuardState(skipped, bad) if window is None else SpikeGuardState(skipped, bad, window)


class _Record:
    """What a guard checked in one step: written by `wrap`, also while it is traced, and read by `wrap_host`."""

    def __init__(self) -> None:
        self.specs: list[tree.Spec] = []  # of the checked trees; the same each time a step runs or is traced
        self.trace = CallTrace()

    def leaf_names(self) -> list[str]:
        """The names of all checked leaves."""
        return [name for spec in self.specs for name in tree.paths(spec.unflatten(range(spec.num_leaves)))]


class _FinitenessCheck:
    """The finiteness of the loss and the grads of one step, by one number per leaf that is finite if the leaf is.

    `spikes` compares them with those of the steps before.
    """

    suits_any_gradient = True  # see `lumen.core.cached_gradient.check_inside`

    def __init__(self, device: torch.device, spikes: SpikeCheck | None) -> None:
        self._spikes = spikes
        self._numbers: dict[tuple[str, tree.Spec], Tensor] = {}
        self._differs_by_rank = False  # whether the numbers of other processes may differ
        self._verdict: tuple[Tensor, Tensor] | None = None
        self._is_fine: bool | None = None
        self._device = device  # of the loss; grads may be on another
        self._norms: LeafNorms | None = None  # of the latest gradient
        self.updates = 0

    @property
    def specs(self) -> list[tree.Spec]:
        """The structures of the checked trees, in the order of the numbers."""
        return [spec for _, spec in self._numbers]

    def gradient(self, next: Next, call: GradientCall) -> Gradient:
        result: Gradient = next(call)
        loss = result.loss.total if isinstance(result.loss, Mean) else result.loss
        self._differs_by_rank |= not result.is_global
        self._add("loss", _LOSS, loss.reshape(1))
        self._add_grads(result.grads)
        if self._spikes is not None:
            self._spikes.add(result)
        return result

    def update(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        self.updates += 1
        if not self._numbers:
            self._add_grads(call.grads)
        norms, self._norms = self._norms, None  # frees the grads, which the norms refer to
        # Since the norms were computed, a collective may have changed the grads without advancing version counters.
        if self._differs_by_rank and distributed.world_size() > 1:
            norms = None
        if self._spikes is None and self.is_fine_on_host():
            return next(call.replace(norms=norms))  # type: ignore[no-any-return]
        skip, _ = self.verdict()
        if self._spikes is not None:
            skip = skip | self._spikes.is_spike(call, norms, self._differs_by_rank)
        return next(call.skipping(skip).replace(norms=norms))  # type: ignore[no-any-return]

    def is_fine_on_host(self) -> bool:
        """Whether everything is known to be finite, where reading it costs nothing: on the CPU, of one process."""
        if self._is_fine is None:
            numbers = [*self._numbers.values()]
            self._is_fine = (
                readable_on_host(numbers)
                and not rules.is_tracing()
                and not sharding.is_collective(self._differs_by_rank)
                and all(math.isfinite(sum(n.tolist())) for n in numbers)
            )
        return self._is_fine

    def verdict(self) -> tuple[Tensor, Tensor]:
        """Whether a leaf was non-finite in any process, and the index of the first one, or -1."""
        if self._verdict is None:
            self._verdict = self._compute_verdict()
        return self._verdict

    def result(self, keeps_outlier: Tensor | None) -> tuple[Tensor, Tensor, SpikeWindow | None]:
        """Whether the step is skipped, the index of its first bad leaf or of the series of its outlier, the window."""
        skip, bad = self.verdict()
        if self._spikes is None:
            return skip, bad, None
        window, is_spike, series = self._spikes.result(keeps_outlier)
        leaves = sum(len(numbers) for numbers in self._numbers.values())
        return skip | is_spike, torch.where(is_spike, leaves + series, bad), window

    def _compute_verdict(self) -> tuple[Tensor, Tensor]:
        if not self._numbers:
            return torch.zeros((), dtype=torch.bool, device=self._device), torch.tensor(-1, device=self._device)
        numbers = torch.cat([*self._numbers.values()])
        if rules.is_tracing() or sharding.is_collective(self._differs_by_rank):
            # One collective for all microbatches.
            nonfinite = (~sharding.all_ranks(numbers.isfinite(), self._differs_by_rank)).float()
        else:
            # 0, or NaN if not finite. A single operation, because each one costs more than its arithmetic.
            nonfinite = numbers - numbers
        bad = nonfinite.sum() != 0
        return bad, torch.where(bad, nonfinite.argmax(), -1)

    def _add_grads(self, grads: Any) -> None:
        leaves, spec = tree.flatten(grads)
        self._norms = LeafNorms(leaves)
        self._add("grads", spec, self._norms.values)

    def _add(self, kind: str, spec: tree.Spec, numbers: Tensor) -> None:
        # Sum over gradients, so that there is one number per leaf: other processes may have more microbatches. A sum of
        # norms is finite if all of them are.
        numbers = numbers.to(self._device)
        previous = self._numbers.get((kind, spec))
        self._numbers[kind, spec] = numbers if previous is None else previous + numbers
        self._verdict = self._is_fine = None


_LOSS = tree.structure({"loss": 0})
_ENCLOSES: Mapping[str, str] = {
    "accumulate": "a spike is judged by the loss and the gradient of the full batch, not of a microbatch",
    "sam": "a spike is judged by the one loss of a step, and sam computes two gradients",
    "precision": "a spike is judged by the unscaled loss and gradient",
}
_INCOMPATIBLE: Mapping[str, str] = {
    "dp_sgd": "which updates are skipped would depend on losses without noise, which no privacy budget counts."
    " Write lm.guard() without spike",
}


def _check_spike(spike: float | None, window: int) -> None:
    if isinstance(spike, bool) or not (spike is None or spike > 0):
        raise HyperparameterError(
            f"guard(spike={spike!r}) must be a positive number of standard deviations. Write lm.guard(spike=6.0)."
        )
    if isinstance(window, bool) or window < SMALLEST_WINDOW:
        raise HyperparameterError(
            f"guard(window={window!r}) must be a number of steps, {SMALLEST_WINDOW} at least. Write"
            " lm.guard(spike=6.0, window=128)."
        )


def _message(name: str, module: Any, step: int | None) -> str:
    when = "" if step is None else f" at step {step}"
    if name == "loss":
        return (
            f"the loss is not finite{when}. The update was skipped. Check the batch and the model's outputs for it. If"
            " the loss had been growing, try lm.clip(1.0), a lower learning rate, or a warm-up."
        )
    owner = ""
    if module is not None:
        prefix = name.rpartition(".")[0]
        modules = dict(module.named_modules())
        if prefix in modules:
            owner = f" (module {prefix or 'root'!r}, {type(modules[prefix]).__name__})"
    return f"the gradient of params[{name!r}]{owner} is not finite{when}. The update was skipped."
