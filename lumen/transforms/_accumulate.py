"""`lm.accumulate`: one update from several microbatches, exactly."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Hashable
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, batching, gradient, rules
from lumen.core.annotations import integer_of
from lumen.core.buffers import BufferTracker
from lumen.core.cached_gradient import CachedGradient, check_inside
from lumen.core.device import free_cache, is_out_of_memory
from lumen.core.donation import is_retired, retire
from lumen.core.dtypes import NARROW
from lumen.core.grad_cache import find
from lumen.core.grad_sums import GradSums
from lumen.core.primitives import Gradient, GradientCall, UpdateCall
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform, add_slot, slot, with_slot, without_slot
from lumen.errors import BatchError, InexactWarning, OrderError
from lumen.transforms._support import gradient_sums
from lumen.transforms._support.gradient_sums import Dtypes

_FITS, _SPLIT, _FAILS = range(3)  # whether a gradient fits into memory: yes, only in smaller microbatches, no


class RetryWithMoreMicrobatches(torch.OutOfMemoryError):
    """Every rank is about to split its rows into more microbatches."""


@pytree_dataclass
class AccumulateState:
    """The slot of `accumulate("auto")`: into how many microbatches a batch is split (int64 scalar, on the host)."""

    microbatches: Tensor


class accumulate(Transform):
    """Compute the gradient of a batch in `k` microbatches, or in microbatches of `microbatch` rows, and update once.

    The batch passed to the step is still the full batch of one optimizer step; only the memory for activations shrinks.
    A batch with fewer than `k` rows, such as the last one of an epoch, is split into single rows. `"auto"` starts with
    one microbatch; whenever memory runs out it doubles their number, warns, and repeats the step. It keeps the number
    in a slot, so that a resumed run starts with it.

    Law: `accumulate(k)(step) == step`, up to the order of floating sums, also for uneven microbatches and masked losses
    (losses are added as totals and weights). The loss must be a mean over rows, or over what an `lm.Mean` counts. A
    loss that compares rows, such as a contrastive loss, is exact when written as `lm.grad_cache(encode, loss)`;
    otherwise microbatches change it, which `lm.check_purity(step, state, batch, rows=True)` detects. BatchNorm in
    training mode normalizes each microbatch by itself: its running statistics are the mean over microbatches, weighted
    by rows, and its counter advances once. Any other buffer passes through the microbatches in order, as in a loop.
    Gradients of 16-bit params are summed in float32. Under a parallel transform, "auto" splits further on all ranks
    once one of them runs out of memory. It does not work under `lm.fsdp(stage=3)`, where the other ranks would wait in
    the middle of the gradient, nor under `lm.compile`.

    Raises `BatchError` if leaves of the batch have different leading sizes. "auto" raises torch's out-of-memory error
    if a single row does not fit, or if memory ran out while a donated state was changing.

    >>> import lumen as lm
    >>> lm.accumulate(4), lm.accumulate(microbatch=8), lm.accumulate("auto")
    (lm.accumulate(4), lm.accumulate(microbatch=8), lm.accumulate('auto'))
    """

    name = "accumulate"
    level = "accumulate"
    reason = "the transforms inside run once for each microbatch, and those outside once for the batch"

    def __init__(self, k: int | Literal["auto"] | None = None, *, microbatch: int | None = None) -> None:
        numbers = [integer_of(n, low=1) for n in (k, microbatch) if n is not None]
        if k != "auto" and (len(numbers) != 1 or numbers[0] is None):
            raise BatchError(
                f"accumulate takes one positive number, got k={k!r}, microbatch={microbatch!r}."
                " Write lm.accumulate(4) for four microbatches, lm.accumulate(microbatch=8) for microbatches of 8"
                ' rows, or lm.accumulate("auto") for as few as fit into memory.'
            )
        self.auto = k == "auto"
        self.k = integer_of(k)
        self.microbatch = integer_of(microbatch)

    def _new_memory(self) -> _AutoMemory:
        return _AutoMemory()

    @property
    def key(self) -> Hashable:
        """The number of microbatches, which a compiled step unrolls."""
        return self._memory.count if self.auto else self.k

    def init(self, state: Any) -> Any:
        """Add the slot, if the number of microbatches is determined while training."""
        if not self.auto:
            return state
        return add_slot(state, self.name, lambda: AccumulateState(torch.ones((), dtype=torch.int64)))

    def export(self, state: Any) -> Any:
        """Drop the slot."""
        return without_slot(state, self.name) if self.auto else state

    def wrap(self, step: StepFn) -> StepFn:
        """The step with gradients accumulated over microbatches."""

        text = repr(self)

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            memory: _AutoMemory | None = self._memory if self.auto else None
            accumulation = _Accumulation(self, text, memory)
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
        """With "auto": repeat the step with more microbatches after running out of memory."""
        if not self.auto:
            return step

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            first_state, memory = state, self._memory
            count = slot(state, self.name).microbatches
            memory.count = int(count.max())
            while (result := self._attempt(memory, step, state, batch)) is None:
                memory.count *= 2
                # Outside the handler of the error, whose traceback keeps the activations that did not fit alive.
                warnings.warn(
                    f"out of memory: batches of {memory.rows} rows are now split into {memory.count} microbatches."
                    f" Write lm.accumulate({memory.count}) to start with that number.",
                    InexactWarning,
                    stacklevel=2,
                )
                state = with_slot(state, self.name, AccumulateState(torch.full_like(count, memory.count)))
                _free()
            if state is not first_state and is_retired(state) and not is_retired(first_state):
                retire(first_state)
            return result

        return run

    def _attempt(self, memory: _AutoMemory, step: StepFn, state: Any, batch: Any) -> tuple[Any, Any] | None:
        """What the step returns, or None if it ran out of memory and can be repeated."""
        memory.is_updating = False
        try:
            return step(state, batch)
        except (RuntimeError, MemoryError) as error:
            can_retry = isinstance(error, RetryWithMoreMicrobatches) or (
                not self._shared() and is_out_of_memory(error) and memory.count < memory.rows
            )
            # What failed during an update may have changed a donated state already.
            if not can_retry or memory.is_updating or is_retired(state):
                raise
            return None

    def _shared(self) -> bool:
        """Whether other ranks would continue while this one repeats the step alone."""
        return self.within is not None and any(t.level == "parallel" for t in self.within.transforms)

    def split(self, call: GradientCall, count: int | None) -> list[Any]:
        """The batch in `count` microbatches, in order, or in microbatches of `microbatch` rows."""
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
                return [tree.unflatten(spec, microbatch) for microbatch in zip(*columns, strict=True)]
            return batching.split(batch, math.ceil(size / self.microbatch))
        return batching.split(batch, max(1, min(count, size)))  # the last batch, or a rank's share, may be smaller


class _AutoMemory:
    """What one step of `accumulate("auto")` keeps on the host while it runs.

    `count` is the number of microbatches in the slot, where a traced step cannot read it.
    """

    def __init__(self) -> None:
        self.count = 1
        self.rows = 0  # of the last batch
        self.is_updating = False

    def update(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        """UPDATE: record while the state may be partly updated."""
        self.is_updating = True
        result: tuple[Any, Any] = next(call)
        self.is_updating = False
        return result


class _Accumulation:
    """The rules of `accumulate` during one step."""

    def __init__(self, settings: accumulate, text: str, memory: _AutoMemory | None) -> None:
        self.settings = settings
        self.text = text
        self.memory = memory  # for "auto" only
        self.tracker = BufferTracker()

    @property
    def count(self) -> int | None:
        """The number of microbatches; None if their size is fixed instead."""
        return self.settings.k if self.memory is None else self.memory.count

    def __call__(self, next: Next, call: GradientCall) -> Gradient:
        """GRADIENT: the gradient of all rows, one microbatch at a time."""
        settings = self.settings
        if settings.auto and rules.is_tracing() and call.reduction is not None:
            raise OrderError(
                "lm.compile cannot trace lm.accumulate('auto') under a parallel transform, where the ranks exchange"
                " whether each had enough memory. Give a number: lm.accumulate(2)."
            )
        if call.reduction is None and not batching.count(call.batch):
            return next(call)  # type: ignore[no-any-return]
        call = call.replace(loss_fn=self.tracker.watching(call.loss_fn, call.has_aux))
        into_buffers = self._can_add_into_buffers(call)
        take = self._fitting if settings.auto and not rules.is_tracing() else self._total
        total, dtypes = take(next, call, into_buffers)
        if call.reduction is not None:
            total, dtypes = call.reduction.finish(gradient_sums.rounded(total, dtypes)), None
        if call.summed:
            return gradient_sums.rounded(total, dtypes)
        own = into_buffers and call.reduction is None
        return gradient_sums.rounded(gradient.normalized(total, own=own), dtypes)

    def _fitting(self, next: Next, call: GradientCall, into_buffers: bool) -> tuple[Gradient, Dtypes]:
        """The gradient of this rank's rows if it fits on all ranks; otherwise all split their rows further."""
        total, outcome, message = None, _FITS, "another rank ran out of memory on a single row"
        try:
            total = self._total(next, call, into_buffers)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            memory = self.memory
            outcome = _SPLIT if memory is not None and memory.count < memory.rows else _FAILS
            message = str(error)
        worst = outcome if call.reduction is None else call.reduction.max_over_ranks(outcome)
        if worst == _SPLIT:
            raise RetryWithMoreMicrobatches(message)
        if worst == _FAILS:
            raise torch.OutOfMemoryError(message)
        assert total is not None
        return total

    def _total(self, next: Next, call: GradientCall, into_buffers: bool) -> tuple[Gradient, Dtypes]:
        """The summed gradient, in float32 for 16-bit params, and the dtypes that the microbatches' grads had."""
        self.tracker.begin()
        alone = call.replace(summed=True, reduction=None)
        if self.memory is not None:
            self.memory.rows = batching.count(call.batch)
        microbatches = self.settings.split(call, self.count)
        calls = [alone.replace(batch=microbatch) for microbatch in microbatches]
        reduction = call.reduction
        if reduction is not None and reduction.in_backward:
            most = self.count or reduction.max_over_ranks(len(microbatches))
            calls += [reduction.zero_weight_call(calls[-1])] * (most - len(microbatches))
            into_buffers = False
        cache = find(call.loss_fn)
        if cache is not None and self.settings.auto and reduction is not None:
            raise OrderError(
                f"{cache!r} under {self.settings!r} and a parallel transform may all-gather rows in the middle of"
                " the gradient, where a rank that runs out of memory would leave the others waiting. Give a number:"
                " lm.accumulate(2)."
            )
        if len(calls) == 1:
            return self._sum(next, calls, 1, into_buffers)
        if cache is not None:
            return self._cached(next, CachedGradient(cache, call), calls, len(microbatches), into_buffers)
        with rules.splitting(self.text):
            return self._sum(next, calls, len(microbatches), into_buffers)

    def _sum(
        self,
        next: Next,
        calls: list[GradientCall],
        real: int,
        into_buffers: bool,
        start: list[Tensor | None] | None = None,
    ) -> tuple[Gradient, Dtypes]:
        """The sum of the calls' gradients and of `start`; only the first `real` calls have rows."""
        if into_buffers:
            return self._into_buffers(next, calls, start), None
        gradients: list[Gradient] = []
        sums: list[Tensor] = [] if start is None else gradient_sums.widened(start)  # type: ignore[arg-type]
        spec: tree.Spec | None = None
        own = False
        for index, microbatch in enumerate(calls):
            result: Gradient = next(microbatch)
            grads, spec = tree.flatten(result.grads)
            dtypes = [g.dtype for g in grads]
            result = result.replace(grads=None)  # frees each gradient once it has been added
            if sums:
                gradient_sums.add(sums, grads, own=own)
                own = True
            else:
                sums = gradient_sums.widened(grads)
            if index < real:
                gradients.append(result)
                self.tracker.carry(result.aux)
        assert spec is not None
        total = batching.add_gradients(gradients, self.tracker.origins)
        return total.replace(grads=spec.unflatten(sums)), dtypes

    def _into_buffers(self, next: Next, calls: list[GradientCall], start: list[Tensor | None] | None) -> Gradient:
        leaves, rebuild = gradient.flat(calls[0].params)
        sums = GradSums([None] * len(leaves) if start is None else start)
        gradients = []
        for microbatch in calls:
            gradients.append(next(microbatch.replace(grad_sums=sums)))
            self.tracker.carry(gradients[-1].aux)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(sums.take(), leaves, strict=True)]
        return batching.add_gradients(gradients, self.tracker.origins).replace(grads=rebuild(grads))

    def _cached(
        self, next: Next, cached: CachedGradient, calls: list[GradientCall], real: int, into_buffers: bool
    ) -> tuple[Gradient, Dtypes]:
        """The gradient of a loss that compares rows: embed all, take the loss, and go backward by microbatch."""
        check_inside(self.settings, rules.inside(Primitive.GRADIENT, self))
        for index, microbatch in enumerate(calls):
            aux = cached.embed(microbatch, real=index < real)
            if index < real:
                self.tracker.carry(aux)
        result, start = self._of_embeddings(next, cached, into_buffers)
        self.tracker.begin()
        again = [
            cached.backward_call(microbatch, min(index, real - 1), index < real)
            for index, microbatch in enumerate(calls)
        ]
        total, dtypes = self._sum(next, again, real, into_buffers, start)
        cached.close()
        return cached.finished(total, result), dtypes

    def _of_embeddings(
        self, next: Next, cached: CachedGradient, into_buffers: bool
    ) -> tuple[Gradient, list[Tensor | None]]:
        """The loss on all embeddings, and its gradient with respect to params; some may be None if `into_buffers`."""
        call = cached.loss_call()
        embeddings = call.params.embeddings
        sums = GradSums([None] * len(tree.leaves(call.params))) if into_buffers else None
        result: Gradient = next(call.replace(grad_sums=sums))
        if sums is None:
            cached.receive(result.grads.embeddings)
            return result.replace(grads=None), [*tree.leaves(result.grads.params)]
        grads = [*sums.take()]
        count = len(grads) - len(embeddings)
        cached.receive(
            [torch.zeros_like(e) if g is None else g for g, e in zip(grads[count:], embeddings, strict=True)]
        )
        return result, grads[:count]

    def _can_add_into_buffers(self, call: GradientCall) -> bool:
        """Whether autograd may add each gradient to its sum: no rule inside sees it, and no sum needs more digits."""
        leaves = tree.leaves(call.params)
        return (
            rules.is_innermost(Primitive.GRADIENT, self)
            and not rules.is_tracing()
            and _torch_compat.peek_interpreter_stack() is None
            and not _torch_compat.len_torch_function_stack()
            and {*map(type, leaves)} == {Tensor}
            and {*map(attrgetter("dtype"), leaves)}.isdisjoint(NARROW)
        )


def _free() -> None:
    """Free what the failed attempt left: cycles through tracebacks, and cached blocks of the wrong sizes."""
    gc.collect()
    free_cache()
