"""`lm.guard`: keep non-finite losses and gradients out of the params."""

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
from lumen.core.urls import local_path
from lumen.errors import HyperparameterError, NonFiniteError
from lumen.optim._norms import LeafNorms
from lumen.transforms._support.snapshot_dump import CallTrace, PreStepSnapshot, SnapshotPolicy

Mode = Literal["skip", "raise", "dump"]


@pytree_dataclass
class GuardState:
    """The slot of `guard`: how many updates were `skipped`, and the index of the last step's `bad` leaf, or -1."""

    skipped: Tensor
    bad: Tensor


class guard(Transform):
    """Check the loss and the grads; if one is not finite, keep params, optimizer state and buffers unchanged.

    Gradients are checked by the L2 norm of each leaf, computed in one pass; `lm.clip` inside reuses the norms. A leaf
    whose norm overflows float32 (1e19 and more) therefore counts as non-finite.

    - `"skip"` continues, and counts skipped updates in `state.slots["guard"].skipped`. It never waits for the device.
    - `"raise"` raises `NonFiniteError`, which names the first bad leaf and its module. It reads one number from the
      device after each step.
    - `"dump"` also raises, after writing the state before the step, the batch, the random generators and the transforms
      to `directory/step-N`. `lumen replay` (or `lm.replay`) reruns that single step. With several processes, each rank
      writes its own rows and its shards of the state to `directory/step-N-rank-R`.

    Declared change: updates that would have been non-finite. Every other step is bitwise the same as without `guard`.

    >>> import lumen as lm
    >>> lm.guard("raise")
    lm.guard('raise')
    """

    name = "guard"
    level = "guard"
    reason = "guard decides whether the update happens at all"
    _unshown = ("directory",)  # does not change the step, and may differ between processes

    def __init__(self, on_nonfinite: Mode = "skip", directory: str | os.PathLike[str] = "dumps") -> None:
        if on_nonfinite not in ("skip", "raise", "dump"):
            raise HyperparameterError(f"guard takes 'skip', 'raise' or 'dump', got {on_nonfinite!r}.")
        self.on_nonfinite = on_nonfinite
        self.directory = os.fspath(directory)
        local_path(directory, "the directory of lm.guard")

    def _canonical(self) -> Mapping[str, Any]:
        return {"directory": self.directory}

    def _new_memory(self) -> weakref.WeakKeyDictionary[Step, _Record]:
        return weakref.WeakKeyDictionary()  # by outermost step; a compiled one is recorded only while it is traced

    def init(self, state: Any) -> Any:
        """Add the slot."""
        zero = torch.zeros((), dtype=torch.int64, device=device_of(state))
        return add_slot(state, self.name, lambda: GuardState(zero, zero - 1))

    def export(self, state: Any) -> Any:
        """Drop the slot."""
        return without_slot(state, self.name)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with non-finite updates skipped."""

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
            if self.on_nonfinite != "skip":  # the host may read it only after several steps: keep the first
                bad = torch.where(old.bad >= 0, old.bad, bad)
            if buffers:
                new = new.replace(buffers=tree.select(skip, buffers, new.buffers))
            return with_slot(new, self.name, GuardState(old.skipped + skip, bad)), metrics

        return run

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
            bad = int(slot(new, self.name).bad.max())
            if bad >= 0:
                message = _message(record.leaf_name(bad), module, step_number)
                if before is not None:
                    message += before.write(self.directory, self.within, policy.steps, step_number, batch, message)
                raise NonFiniteError(message)
            return new, metrics

        return run

    def _record(self) -> _Record:
        step = self.within
        records: weakref.WeakKeyDictionary[Step, _Record] = self._memory
        return _Record() if step is None else records.setdefault(step, _Record())


class _Record:
    """What a guard checked in one step: written by `wrap`, also while it is traced, and read by `wrap_host`."""

    def __init__(self) -> None:
        self.specs: list[tree.Spec] = []  # of the checked trees; the same each time a step runs or is traced
        self.trace = CallTrace()

    def leaf_name(self, index: int) -> str:
        """The name of the leaf with this index among all checked leaves."""
        return [name for spec in self.specs for name in tree.paths(spec.unflatten(range(spec.num_leaves)))][index]


class _FinitenessCheck:
    """The finiteness of the loss and the grads of one step, by one number per leaf that is finite if the leaf is."""

    suits_any_gradient = True  # see `lumen.core.cached_gradient.check_inside`

    def __init__(self, device: torch.device) -> None:
        self._numbers: dict[tuple[str, tree.Spec], Tensor] = {}
        self._differs_by_rank = False  # whether the numbers of other processes may differ
        self._verdict: tuple[Tensor, Tensor] | None = None
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
        return result

    def update(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        self.updates += 1
        if not self._numbers:
            self._add_grads(call.grads)
        skip, _ = self.verdict()
        norms, self._norms = self._norms, None  # frees the grads, which the norms refer to
        # Since the norms were computed, a collective may have changed the grads without advancing version counters.
        if self._differs_by_rank and distributed.world_size() > 1:
            norms = None
        return next(call.skipping(skip).replace(norms=norms))  # type: ignore[no-any-return]

    def verdict(self) -> tuple[Tensor, Tensor]:
        """Whether a leaf was non-finite in any process, and the index of the first one, or -1."""
        if self._verdict is None:
            self._verdict = self._compute_verdict()
        return self._verdict

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
        self._verdict = None


_LOSS = tree.structure({"loss": 0})


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
