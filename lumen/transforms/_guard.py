"""`lm.guard`: do not let a non-finite loss or gradient into the params."""

from __future__ import annotations

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
from lumen.errors import HyperparameterError, NonFiniteError
from lumen.optim._norms import Norms
from lumen.transforms._support.snapshot_dump import CallTrace, PreStepSnapshot, SnapshotPolicy

Mode = Literal["skip", "raise", "dump"]


@pytree_dataclass
class GuardState:
    """The slot of `guard`: how many updates were `skipped`, and the leaf that was `bad` in the last step or -1."""

    skipped: Tensor
    bad: Tensor


class guard(Transform):
    """Check loss and grads; where one is not finite, leave params, optimizer state and buffers as they were.

    Gradients are checked by the L2 norm of each leaf, in one pass, which `lm.clip` inside takes over. So a leaf whose
    norm is too large for float32 (1e19 and more) counts as not finite.

    `on_nonfinite="skip"` goes on, and counts in `state.slots["guard"].skipped`; it never waits for the device.
    `"raise"` raises `NonFiniteError`, naming the first bad leaf and its module; it reads one number from the device
    after each step. `"dump"` raises as well, after it has written the state before the step, the batch, the random
    generators and the transforms to `directory/step-N`: `lumen replay` (or `lm.replay`) does that step again, alone.
    Under several processes each rank writes its own rows, and its shards of the state, to `directory/step-N-rank-R`.

    Declared change: updates that would have been non-finite. Every other step is bitwise the step without it.

    >>> import lumen as lm
    >>> lm.guard("raise")
    lm.guard('raise')
    """

    name = "guard"
    level = "guard"
    reason = "guard decides whether the update happens at all"
    _unshown = ("directory",)  # which changes nothing in the step, and may differ between processes

    def __init__(self, on_nonfinite: Mode = "skip", directory: str | os.PathLike[str] = "dumps") -> None:
        if on_nonfinite not in ("skip", "raise", "dump"):
            raise HyperparameterError(f"guard takes 'skip', 'raise' or 'dump', got {on_nonfinite!r}.")
        self.on_nonfinite = on_nonfinite
        self.directory = os.fspath(directory)

    def _canonical(self) -> Mapping[str, Any]:
        return {"directory": self.directory}

    def _new_memory(self) -> weakref.WeakKeyDictionary[Step, _Record]:
        return weakref.WeakKeyDictionary()  # by the outermost step: a compiled one notes only what it was traced with

    def init(self, state: Any) -> Any:
        """Add the slot."""
        zero = torch.zeros((), dtype=torch.int64, device=device_of(state))
        return add_slot(state, self.name, lambda: GuardState(zero, zero - 1))

    def export(self, state: Any) -> Any:
        """Drop the slot."""
        return without_slot(state, self.name)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with non-finite updates left out."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            old: GuardState = slot(state, self.name)
            buffers = getattr(state, "buffers", None)
            check = _FinitenessCheck(old.bad.device)
            with rules.rule_context({Primitive.GRADIENT: check.gradient, Primitive.UPDATE: check.update}):
                new, metrics = step(state, batch)
            record = self._record()
            record.specs = check.specs
            record.trace = record.trace.with_step(check.updates, rules.is_tracing())
            skip, bad = check.verdict()
            if self.on_nonfinite != "skip":  # the host may look only after several steps: keep the first
                bad = torch.where(old.bad >= 0, old.bad, bad)
            if buffers:
                new = new.replace(buffers=tree.select(skip, buffers, new.buffers))
            return with_slot(new, self.name, GuardState(old.skipped + skip, bad)), metrics

        return run

    def wrap_host(self, step: StepFn) -> StepFn:
        """Raise where that is asked for."""
        if self.on_nonfinite == "skip":
            return step

        policy = SnapshotPolicy()

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            nonlocal policy
            module = getattr(getattr(state, "apply_fn", None), "module", None)
            number = getattr(state, "step", None)
            number = None if number is None else int(number.max())
            before = PreStepSnapshot.of(state, policy) if self.on_nonfinite == "dump" else None
            record = self._record()
            record.trace = CallTrace()
            new, metrics = step(state, batch)
            policy = policy.after(record.trace, is_retired(state))
            bad = int(slot(new, self.name).bad.max())
            if bad >= 0:
                message = _message(record.name(bad), module, number)
                if before is not None:
                    message += before.write(self.directory, self.within, policy.steps, number, batch, message)
                raise NonFiniteError(message)
            return new, metrics

        return run

    def _record(self) -> _Record:
        step = self.within
        records: weakref.WeakKeyDictionary[Step, _Record] = self._memory
        return _Record() if step is None else records.setdefault(step, _Record())


class _Record:
    """What a guard met in one step: noted by `wrap`, inside a compiled region too, and read by `wrap_host`."""

    def __init__(self) -> None:
        self.specs: list[tree.Spec] = []  # what was checked, the same each time a step is run or traced
        self.trace = CallTrace()

    def name(self, bad: int) -> str:
        """The leaf at place `bad` of all that was checked."""
        names = [tree.paths(spec.unflatten(range(spec.num_leaves))) for spec in self.specs]
        return [name for tree_names in names for name in tree_names][bad]


class _FinitenessCheck:
    """The finiteness of everything seen in one step: numbers that are finite where what they stand for is."""

    suits_any_gradient = True  # see `lumen.core.cached_gradient.check_inside`

    def __init__(self, device: torch.device) -> None:
        self._numbers: dict[tuple[str, tree.Spec], Tensor] = {}
        self._differs_by_rank = False  # whether other processes have other numbers
        self._verdict: tuple[Tensor, Tensor] | None = None
        self._device = device  # of the loss; grads may lie elsewhere
        self._norms: Norms | None = None  # of the gradient seen last
        self.updates = 0

    @property
    def specs(self) -> list[tree.Spec]:
        """The trees whose leaves were looked at, in the order of the numbers."""
        return [spec for _, spec in self._numbers]

    def gradient(self, next: Next, call: GradientCall) -> Gradient:
        answer: Gradient = next(call)
        loss = answer.loss.total if isinstance(answer.loss, Mean) else answer.loss
        self._differs_by_rank |= not answer.joint
        self._note("loss", _LOSS, loss.reshape(1))
        self._note_grads(answer.grads)
        return answer

    def update(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        self.updates += 1
        if not self._numbers:
            self._note_grads(call.grads)
        skip, _ = self.verdict()
        norms, self._norms = self._norms, None  # which would hold the grads
        if (
            self._differs_by_rank and distributed.world_size() > 1
        ):  # a collective between writes without being counted as a write
            norms = None
        return next(call.skipping(skip).replace(norms=norms))  # type: ignore[no-any-return]

    def verdict(self) -> tuple[Tensor, Tensor]:
        """Whether something was not finite on some process, and the place of the first, -1 where there is none."""
        if self._verdict is None:
            self._verdict = self._compute_verdict()
        return self._verdict

    def _compute_verdict(self) -> tuple[Tensor, Tensor]:
        if not self._numbers:
            return torch.zeros((), dtype=torch.bool, device=self._device), torch.tensor(-1, device=self._device)
        numbers = torch.cat([*self._numbers.values()])
        if rules.is_tracing() or sharding.is_collective(self._differs_by_rank):
            nonfinite = (
                ~sharding.all_ranks(numbers.isfinite(), self._differs_by_rank)
            ).float()  # once for all microbatches
        else:
            # 0, or NaN where not finite: in as few operations as can be, each of which takes longer than its work.
            nonfinite = numbers - numbers
        bad = nonfinite.sum() != 0
        return bad, torch.where(bad, nonfinite.argmax(), -1)

    def _note_grads(self, grads: Any) -> None:
        leaves, spec = tree.flatten(grads)
        self._norms = Norms(leaves)
        self._note("grads", spec, self._norms.values)

    def _note(self, kind: str, spec: tree.Spec, numbers: Tensor) -> None:
        # One number for each leaf, however many gradients there are: another process may have more microbatches. A sum
        # is finite where its summands are.
        numbers = numbers.to(self._device)
        previous = self._numbers.get((kind, spec))
        self._numbers[kind, spec] = numbers if previous is None else previous + numbers
        self._verdict = None


_LOSS = tree.structure({"loss": 0})


def _message(name: str, module: Any, step: int | None) -> str:
    when = "" if step is None else f" at step {step}"
    if name == "loss":
        return (
            f"the loss is not finite{when}. The update was left out. Look at the batch and at the outputs of"
            " the model for it; lm.clip(1.0), a lower learning rate, or a warm-up help where it grew."
        )
    owner = ""
    if module is not None:
        prefix = name.rpartition(".")[0]
        modules = dict(module.named_modules())
        if prefix in modules:
            owner = f" (module {prefix or 'root'!r}, {type(modules[prefix]).__name__})"
    return f"the gradient of params[{name!r}]{owner} is not finite{when}. The update was left out."
