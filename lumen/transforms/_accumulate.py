"""`lm.accumulate`: one update from several microbatches, exactly."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Hashable
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core import batching, gradient, rules
from lumen.core.buffers import Tracker
from lumen.core.cached_gradient import CachedGradient, check_inside
from lumen.core.device import free_cache
from lumen.core.donation import is_retired, retire
from lumen.core.dtypes import NARROW
from lumen.core.grad_cache import find
from lumen.core.primitives import Gradient, GradientCall, UpdateCall
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform, add_slot, slot, with_slot, without_slot
from lumen.errors import BatchError, InexactWarning, LumenError, OrderError

_GROUP = 16 * 2**20  # bytes of sums that are made at once
Dtypes = list[torch.dtype] | None
_FITS, _SPLIT, _FAILS = range(3)  # how a gradient went with memory: well, not unless in smaller parts, not at all


class RetryWithMoreMicrobatches(torch.OutOfMemoryError):
    """Every process is about to take its rows in more parts."""


@pytree_dataclass
class AccumulateState:
    """The slot of `accumulate("auto")`: into how many `parts` batches are cut (int64 scalar, on the host)."""

    parts: Tensor


class accumulate(Transform):
    """Compute the gradient of a batch in `k` parts, or in parts of `microbatch` rows, and update once.

    The batch handed to the step stays the full batch of one optimizer step; only the memory for activations shrinks.
    `"auto"` begins with the whole batch, and after running out of memory cuts it into twice as many parts and does the
    step again, with one warning each time; the number is kept in a slot, so a run that goes on has it.

    Law: `accumulate(k)(step) == step`, up to the order of floating sums, for uneven parts and masked losses too
    (losses travel as totals and weights), where the loss is a mean over rows, or over what an `lm.Mean` counts. One
    that compares rows, as a contrastive loss does, is exact when it is written as `lm.grad_cache(encode, loss)`, and
    another loss in parts else; `lm.check_purity(step, state, batch, rows=True)` finds that. BatchNorm in training mode
    sees one microbatch at a time, as it must: its running statistics are the mean of the parts' by rows, its counter
    advances once. Any other buffer goes through the microbatches in order, as in a loop: each begins with what the one
    before it left. Gradients of 16-bit params are summed in float32. Under a parallel transform a process with fewer
    than `k` rows takes them one by one, and "auto" cuts finer on all processes once one has run out of memory; not
    under `lm.fsdp(stage=3)`, where the others would wait in the middle of the gradient, and not while `lm.compile`
    traces.

    Raises `BatchError` where the batch has fewer rows than `k`, or leaves with different leading sizes. With "auto",
    the error of running out of memory comes through where single rows do not fit, or the step failed while it was
    changing a donated state.

    >>> import lumen as lm
    >>> lm.accumulate(4), lm.accumulate(microbatch=8), lm.accumulate("auto")
    (lm.accumulate(4), lm.accumulate(microbatch=8), lm.accumulate('auto'))
    """

    name = "accumulate"
    level = "accumulate"
    reason = "each microbatch must meet the transforms inside it, and those outside must see the whole batch once"

    def __init__(self, k: int | Literal["auto"] | None = None, *, microbatch: int | None = None) -> None:
        numbers = [n for n in (k, microbatch) if n is not None]
        if k != "auto" and (len(numbers) != 1 or type(numbers[0]) is not int or numbers[0] < 1):
            raise BatchError(
                f"accumulate takes one positive number, got k={k!r}, microbatch={microbatch!r}."
                " Write lm.accumulate(4) for four parts, lm.accumulate(microbatch=8) for parts of 8 rows, or"
                ' lm.accumulate("auto") for as few parts as fit into memory.'
            )
        self.auto = k == "auto"
        self.k = None if k == "auto" else k
        self.microbatch = microbatch

    def _new_memory(self) -> _AutoMemory:
        return _AutoMemory()

    @property
    def key(self) -> Hashable:
        """The number of microbatches: a compiled step has them written out."""
        return self._memory.count if self.auto else self.k

    def init(self, state: Any) -> Any:
        """Add the slot, where the number of parts is found on the way."""
        if not self.auto:
            return state
        return add_slot(state, self.name, lambda: AccumulateState(torch.ones((), dtype=torch.int64)))

    def export(self, state: Any) -> Any:
        """Drop the slot."""
        return without_slot(state, self.name) if self.auto else state

    def wrap(self, step: StepFn) -> StepFn:
        """The step with gradients taken part by part."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            memory: _AutoMemory | None = self._memory if self.auto else None
            accumulation = _Accumulation(self, memory)
            handlers: dict[Primitive, rules.Rule] = {
                Primitive.GRADIENT: accumulation,
                Primitive.APPLY: accumulation.tracker.apply,
            }
            if memory is not None:
                handlers[Primitive.UPDATE] = memory.update
            with rules.rule_context(handlers):
                return step(state, batch)

        return run

    def wrap_host(self, step: StepFn) -> StepFn:
        """With "auto": after running out of memory, again in more parts."""
        if not self.auto:
            return step

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            first_state, memory = state, self._memory
            count = slot(state, self.name).parts
            memory.count = int(count.max())
            while (answer := self._attempt(memory, step, state, batch)) is None:
                memory.count *= 2
                # Said outside the handler of the error, whose traceback holds the activations that did not fit.
                warnings.warn(
                    f"out of memory: batches of {memory.rows} rows are now computed in {memory.count} parts."
                    f" Write lm.accumulate({memory.count}) to begin with that.",
                    InexactWarning,
                    stacklevel=2,
                )
                state = with_slot(state, self.name, AccumulateState(torch.full_like(count, memory.count)))
                _free()
            if state is not first_state and is_retired(state) and not is_retired(first_state):
                retire(first_state)
            return answer

        return run

    def _attempt(self, memory: _AutoMemory, step: StepFn, state: Any, batch: Any) -> tuple[Any, Any] | None:
        """The step's answer, or None where it ran out of memory and may be tried again."""
        memory.is_updating = False
        try:
            return step(state, batch)
        except (RuntimeError, MemoryError) as error:
            again = isinstance(error, RetryWithMoreMicrobatches) or (
                not self._shared() and _is_out_of_memory(error) and memory.count < memory.rows
            )
            # What failed during an update may have changed a donated state already.
            if not again or memory.is_updating or is_retired(state):
                raise
            return None

    def _shared(self) -> bool:
        """Whether other processes would go on while this one tries again by itself."""
        return self.within is not None and any(t.level == "parallel" for t in self.within.transforms)

    def split(self, call: GradientCall, count: int | None) -> list[Any]:
        """The batch in `count` parts, in order, or in parts of `microbatch` rows."""
        batch, reduction = call.batch, call.reduction
        size = batching.count(batch)
        if reduction is not None and not reduction.rows:
            return [batch]
        if count is None:
            assert self.microbatch is not None
            leaves, spec = tree.flatten(batch)
            if size == 0:
                return [batch]
            columns = [x.split(self.microbatch) if isinstance(x, torch.Tensor) else None for x in leaves]
            if None not in columns:
                return [tree.unflatten(spec, leaves_of_one) for leaves_of_one in zip(*columns, strict=True)]
            return batching.split(batch, math.ceil(size / self.microbatch))
        if self.auto or reduction is not None:  # a smaller last batch, or the smaller part of a process
            return batching.split(batch, max(1, min(count, size)))
        if count > size:
            raise BatchError(
                f"accumulate({count}) cannot cut a batch of {size} rows into {count} parts of at least one row."
                f" Use lm.accumulate({max(size, 1)}) or fewer parts, lm.accumulate(microbatch=1), or a larger batch."
            )
        return batching.split(batch, count)


class _AutoMemory:
    """What one step of `accumulate("auto")` keeps on the host, for as long as it is called.

    `count` is the number of microbatches that its slot says, which a traced step cannot read there.
    """

    def __init__(self) -> None:
        self.count = 1
        self.rows = 0  # of the batch that was split last
        self.is_updating = False

    def update(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        """P2: note for how long the state may be changed halfway."""
        self.is_updating = True
        answer: tuple[Any, Any] = next(call)
        self.is_updating = False
        return answer


class _Accumulation:
    """What accumulate makes of the P1 calls of one step."""

    def __init__(self, settings: accumulate, memory: _AutoMemory | None) -> None:
        self.settings = settings
        self.memory = memory  # None but for "auto"
        self.tracker = Tracker()

    @property
    def count(self) -> int | None:
        """The number of microbatches; None where their size is given."""
        return self.settings.k if self.memory is None else self.memory.count

    def __call__(self, next: Next, call: GradientCall) -> Gradient:
        """The gradient of all rows, taken part by part."""
        settings = self.settings
        if settings.auto and rules.is_tracing() and call.reduction is not None:
            raise OrderError(
                "lm.compile cannot trace lm.accumulate('auto') under a parallel transform, where processes ask each"
                " other whether all have had memory enough. Give a number: lm.accumulate(2)."
            )
        call = call.replace(loss_fn=self.tracker.watching(call.loss_fn, call.has_aux))
        into_buffers = self._can_add_into_buffers(call)
        take = self._fitting if settings.auto and not rules.is_tracing() else self._total
        total, dtypes = take(next, call, into_buffers)
        if call.reduction is not None:
            total, dtypes = call.reduction.finish(_rounded(total, dtypes)), None
        if call.summed:
            return _rounded(total, dtypes)
        own = into_buffers and call.reduction is None
        return _rounded(gradient.normalized(total, own=own), dtypes)

    def _fitting(self, next: Next, call: GradientCall, into_buffers: bool) -> tuple[Gradient, Dtypes]:
        """The gradient of this process's rows once it has fitted into the memory of all; else all cut theirs finer."""
        total, outcome, message = None, _FITS, "another process ran out of memory on single rows"
        try:
            total = self._total(next, call, into_buffers)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            memory = self.memory
            outcome = _SPLIT if memory is not None and memory.count < memory.rows else _FAILS
            message = str(error)
        worst = outcome if call.reduction is None else call.reduction.most(outcome)
        if worst == _SPLIT:
            raise RetryWithMoreMicrobatches(message)
        if worst == _FAILS:
            raise torch.OutOfMemoryError(message)
        assert total is not None
        return total

    def _total(self, next: Next, call: GradientCall, into_buffers: bool) -> tuple[Gradient, Dtypes]:
        """The gradient of the sum, of 16-bit params in float32, and the dtypes that the parts' grads had."""
        self.tracker.begin()
        alone = call.replace(summed=True, reduction=None)
        if self.memory is not None:
            self.memory.rows = batching.count(call.batch)
        microbatches = self.settings.split(call, self.count)
        calls = [alone.replace(batch=microbatch) for microbatch in microbatches]
        reduction = call.reduction
        if reduction is not None and reduction.within:
            most = self.count or reduction.most(len(microbatches))
            calls += [reduction.idle(calls[-1])] * (most - len(microbatches))
            into_buffers = False
        cache = find(call.loss_fn)
        if cache is not None and self.settings.auto and reduction is not None:
            raise OrderError(
                f"{cache!r} under {self.settings!r} and a parallel transform may gather rows in the middle of the"
                " gradient, where a process that runs out of memory would leave the others waiting. Give a number:"
                " lm.accumulate(2)."
            )
        if len(calls) == 1:
            return self._sum(next, calls, 1, into_buffers)
        if cache is not None:
            return self._cached(next, CachedGradient(cache, call), calls, len(microbatches), into_buffers)
        with rules.splitting(repr(self.settings)):
            return self._sum(next, calls, len(microbatches), into_buffers)

    def _sum(
        self,
        next: Next,
        calls: list[GradientCall],
        real: int,
        into_buffers: bool,
        start: list[Tensor | None] | None = None,
    ) -> tuple[Gradient, Dtypes]:
        """The sum of the calls' gradients, and of `start`; only the `real` ones have rows."""
        if into_buffers:
            return self._into_buffers(next, calls, start), None
        gradients: list[Gradient] = []
        sums: list[Tensor] = [] if start is None else _widened(start)  # type: ignore[arg-type]
        spec: tree.Spec | None = None
        own = False
        for index, microbatch in enumerate(calls):
            answer: Gradient = next(microbatch)
            grads, spec = tree.flatten(answer.grads)
            dtypes = [g.dtype for g in grads]
            answer = answer.replace(grads=None)  # frees each gradient once it has been added
            if sums:
                _add(sums, grads, own=own)
                own = True
            else:
                sums = _widened(grads)
            if index < real:
                gradients.append(answer)
                self.tracker.carry(answer.aux)
        assert spec is not None
        total = batching.add_gradients(gradients, self.tracker.origins)
        return total.replace(grads=spec.unflatten(sums)), dtypes

    def _into_buffers(self, next: Next, calls: list[GradientCall], start: list[Tensor | None] | None) -> Gradient:
        leaves, rebuild = gradient.flat(calls[0].params)
        sums: list[Tensor | None] = [None] * len(leaves) if start is None else start
        gradients = []
        for microbatch in calls:
            gradients.append(next(microbatch.replace(grad_buffers=sums)))
            self.tracker.carry(gradients[-1].aux)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(sums, leaves, strict=True)]
        return batching.add_gradients(gradients, self.tracker.origins).replace(grads=rebuild(grads))

    def _cached(
        self, next: Next, cached: CachedGradient, calls: list[GradientCall], real: int, into_buffers: bool
    ) -> tuple[Gradient, Dtypes]:
        """The gradient of a loss that compares rows: all embeddings, the loss on them, and each microbatch again."""
        check_inside(self.settings, rules.inside(Primitive.GRADIENT, self))
        for index, microbatch in enumerate(calls):
            aux = cached.embed(microbatch, real=index < real)
            if index < real:
                self.tracker.carry(aux)
        answer, start = self._of_embeddings(next, cached, into_buffers)
        self.tracker.begin()
        again = [
            cached.backward_call(microbatch, min(index, real - 1), index < real)
            for index, microbatch in enumerate(calls)
        ]
        total, dtypes = self._sum(next, again, real, into_buffers, start)
        cached.close()
        return cached.finished(total, answer), dtypes

    def _of_embeddings(
        self, next: Next, cached: CachedGradient, into_buffers: bool
    ) -> tuple[Gradient, list[Tensor | None]]:
        """The loss on the embeddings of all rows, and its gradient in params, which may lack some if `in_place`."""
        call = cached.loss_call()
        embeddings = call.params.embeddings
        grad_buffers: list[Tensor | None] | None = [None] * len(tree.leaves(call.params)) if into_buffers else None
        answer: Gradient = next(call.replace(grad_buffers=grad_buffers))
        if grad_buffers is None:
            cached.receive(answer.grads.embeddings)
            return answer.replace(grads=None), [*tree.leaves(answer.grads.params)]
        count = len(grad_buffers) - len(embeddings)
        cached.receive(
            [torch.zeros_like(e) if g is None else g for g, e in zip(grad_buffers[count:], embeddings, strict=True)]
        )
        return answer, grad_buffers[:count]

    def _can_add_into_buffers(self, call: GradientCall) -> bool:
        """Whether the engine may add each gradient to its sum itself: nobody between sees it, or wants more digits."""
        return (
            rules.is_innermost(Primitive.GRADIENT, self)
            and not rules.is_tracing()
            and torch._C._functorch.peek_interpreter_stack() is None
            and not torch._C._len_torch_function_stack()
            and all(type(leaf) is Tensor and leaf.dtype not in NARROW for leaf in tree.leaves(call.params))
        )


def _widened(grads: list[Tensor]) -> list[Tensor]:
    return [g.float() if g.dtype in NARROW else g for g in grads]


def _add(sums: list[Tensor], grads: list[Tensor], own: bool) -> None:
    """Put `sums + grads` in the place of `sums`, and empty `grads`.

    In the memory of `sums` once that is our own (autograd may hand out one tensor twice); before that some at a time,
    whose summands go before the next sums are made, so that there are never three of all.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or any(g.requires_grad for g in grads):
        sums[:] = [a + b for a, b in zip(sums, grads, strict=True)]
    elif own:
        torch._foreach_add_(sums, grads)
    else:
        sums_so_far: list[Tensor] = []
        while sums:
            count = _leading(sums)
            sums_so_far += torch._foreach_add(sums[:count], grads[:count])
            del sums[:count], grads[:count]
        sums[:] = sums_so_far
    grads.clear()


def _leading(leaves: list[Tensor]) -> int:
    """How many of the first leaves are added at once."""
    size = 0
    for index, leaf in enumerate(leaves):
        size += leaf.nbytes
        if size > _GROUP:
            return max(index, 1)
    return len(leaves)


def _rounded(total: Gradient, dtypes: Dtypes) -> Gradient:
    """`total` with grads in these dtypes; as it is for None."""
    if dtypes is None:
        return total
    grads, spec = tree.flatten(total.grads)
    return total.replace(grads=spec.unflatten([g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it was memory, on a device or on the host, where torch has no error type of its own."""
    if isinstance(error, LumenError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "out of memory" in text


def _free() -> None:
    """Give back what the failed attempt left behind: cycles through tracebacks, and blocks of the wrong sizes."""
    gc.collect()
    free_cache()
