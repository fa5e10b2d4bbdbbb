"""What strategies share whose ranks have rows of their own: one gradient, loss and aux for the global batch.

`lumen.parallel.comm.grad_reducer` says how the pieces fit together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core import distributed, gradient, rules
from lumen.core.buffers import BufferTracker, Origin
from lumen.core.metrics import GlobalMean, Mean, is_value, without_rows
from lumen.core.primitives import ApplyCall, Aux, Gradient, GradientCall, WrappedLoss
from lumen.core.rules import Next
from lumen.core.step import device_of
from lumen.errors import AxisError, LossError, OrderError
from lumen.parallel.comm.buckets import GradComm
from lumen.parallel.comm.grad_reducer import GradReducer
from lumen.parallel.ddp.aux_reduction import AuxReduction, BufferChecks
from lumen.parallel.ddp.sync_batchnorm import synchronized

Buffers = Literal["merge", "local", "sync"]

_TOTAL, _WEIGHT, _ROWS, _LIVE, _HEAD = range(5)  # what is reduced with each gradient, in order: `GradReduction._stats`
DUMMY_ROWS = 2  # of the dummy batch: BatchNorm takes no fewer


class DataParallelRule:
    """What a strategy whose ranks have rows of their own does with the primitives of one step: what all have in common.

    A strategy adds `__call__`, the rule of the gradient.
    """

    def __init__(self, comm: GradComm, buffers: Buffers, state: Any, checks: BufferChecks) -> None:
        self._comm = comm
        self._buffers = buffers
        self.checks = checks
        self.applied = False  # whether the step has applied a model
        self._counts = True  # whether the rows are the batch's own, and no dummy batch
        self._old = getattr(state, "buffers", None)
        tracked = state if self._old is None else self._old
        self._tracker = BufferTracker({id(tensor) for tensor in tree.tensors(tracked)}, marks=True)
        self._device = device_of(state)

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """APPLY: track buffers; with "sync", run BatchNorm over all ranks."""
        self.applied = True
        if self._buffers != "sync":
            return self._tracker.apply(next, call)
        return self._tracker.apply(lambda inner: synchronized(next, inner, self._comm, self._counts), call)

    @property
    def origins(self) -> Sequence[Origin] | None:
        """The origins of the buffers in the aux; None where each rank keeps its own."""
        return None if self._buffers == "local" else self._tracker.origins

    def _prepared_call(self, call: GradientCall, size: int) -> GradientCall:
        """The call with its buffers tracked, and with a dummy batch where this rank has no rows."""
        self._tracker.begin()
        call = call.replace(loss_fn=self._tracker.watching(call.loss_fn, call.has_aux))
        if size:
            return call
        return call.replace(batch=dummy_batch(call.batch), loss_fn=zero_weight_loss(call.loss_fn, call.has_aux))

    def _neutral_aux(self, aux: Any) -> Any:
        """The aux of a dummy batch, with values that do not change a reduction."""
        if not isinstance(aux, Aux):
            return tree.map(_of_no_rows, aux, is_leaf=is_value)
        changed: Any = aux
        buffers = aux.buffers
        if self._buffers == "local" and self._old is not None and buffers.keys() == self._old.keys():
            buffers = self._old
        return changed.replace(buffers=buffers, metrics=tree.map(_of_no_rows, aux.metrics, is_leaf=is_value))


def dummy_batch(batch: Any) -> Any:
    """Rows of zeros, for a rank that has no rows."""
    return tree.map(lambda x: x.new_zeros((DUMMY_ROWS, *x.shape[1:])) if isinstance(x, Tensor) else x, batch)


def _of_no_rows(leaf: Any) -> Any:
    return without_rows(leaf, DUMMY_ROWS)


def zero_weight_loss(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The same loss with weight zero."""

    def run(*args: Any) -> Any:
        with rules.inside_weightless:
            result = loss_fn(*args)
        loss, aux = result if has_aux else (result, None)
        loss = Mean(loss.total * 0, loss.weight * 0) if isinstance(loss, Mean) else loss * 0
        return (loss, aux) if has_aux else loss

    return WrappedLoss(loss_fn, run, lambda other: zero_weight_loss(other, has_aux))


class GradReduction:
    """The reduction of one gradient over ranks: `lumen.core.primitives.Reduction`, the same for all strategies.

    `reducer` sums the gradients, in its strategy's way. This class sums what belongs to them: the loss's total and
    weight, the rows, and the aux. A rank's gradients are those of the sum over its `rows`, so they weigh by themselves.
    `zero_weight` is the loss of a rank that has fewer microbatches than others; by default it takes part in no
    collective.
    """

    def __init__(
        self,
        comm: GradComm,
        reducer: GradReducer,
        rows: int,
        rule: DataParallelRule,
        device: torch.device,
        zero_weight: Callable[..., Any] | None = None,
    ) -> None:
        self._comm = comm
        self._reducer = reducer
        self.rows = rows
        self.in_backward = reducer.in_backward
        self.register_hooks = reducer.register_hooks
        self._rule = rule
        self._device = device
        self._zero_weight = zero_weight
        self._grads: Any = None

    def max_over_ranks(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if rules.is_tracing():
            raise OrderError(
                "lm.compile cannot trace a step in which ranks exchange their numbers of microbatches."
                " Give a number: lm.accumulate(2)."
            )
        largest = self._comm.launch(torch.tensor(number, device=self._device), "max", exact=True)()
        return number if distributed.is_dry_run() else int(largest)

    def zero_weight_call(self, call: GradientCall) -> GradientCall:
        """The call with a loss that weighs nothing."""
        return call.replace(loss_fn=self._zero_weight or zero_weight_loss(call.loss_fn, call.has_aux))

    def finish(self, result: Gradient, independent: LossError | None = None) -> Gradient:
        """The result of all ranks."""
        leaves, rebuild = gradient.flat(result.grads)
        if True in [leaf.requires_grad for leaf in leaves]:
            raise AxisError(
                "under lm.ddp a gradient is to be differentiated again outside a loss function. Take the inner gradient"
                " inside the loss, as lm.value_and_grad(inner)(params, rows) does there."
            )
        if not self.rows and not self.in_backward:
            leaves = [torch.zeros_like(leaf) for leaf in leaves]
        aux = (
            None
            if result.aux is None
            else AuxReduction(result.aux, self.rows, DUMMY_ROWS, self._rule.origins, self._comm)
        )
        in_flight = [] if aux is None else aux.launch()
        weighted = [] if aux is None else aux.weighted()
        changes = [] if aux is None else aux.changes()
        sums, stats = self._reducer.finish(leaves, self._stats(result, weighted, changes, independent is None))
        if independent is not None and not stats[_LIVE]:
            raise independent
        loss = result.loss
        assert isinstance(loss, Mean)
        self._grads = rebuild(sums)
        joined = None
        if aux is not None:
            means, summed = stats[_HEAD:].split([sum(x.numel() for x in xs) for xs in (weighted, changes)])
            joined = aux.joined(means / stats[_ROWS], summed, in_flight)
            aux.check(self._rule.checks)
        return Gradient(
            GlobalMean(_as(stats[_TOTAL], loss.total.dtype), _as(stats[_WEIGHT], loss.weight.dtype)),
            self._grads,
            joined,
            result.scalar,
            result.rows,
            is_global=True,
        )

    def _stats(
        self, result: Gradient, weighted: Sequence[Tensor], changes: Sequence[Tensor], live: bool
    ) -> list[Tensor]:
        """What is summed beside gradients: the loss's total and weight, rows, rows with a gradient, means, changes."""
        loss = result.loss
        assert isinstance(loss, Mean)
        total, size = loss.total.detach(), self.rows
        extras = [*weighted, *changes]
        dtype = functools.reduce(torch.promote_types, {total.dtype, *(x.dtype for x in extras)}, torch.float32)
        if not size:
            return [total.new_zeros(_HEAD + sum(x.numel() for x in extras), dtype=dtype)]
        count = loss.weight  # of a plain scalar its rows; a narrow dtype does not have every number
        if not result.scalar or count.dtype is not dtype:
            count = total.new_full((), size, dtype=dtype)
        means = [_as(x.detach(), dtype) * size for x in weighted]
        added = [_as(x.detach(), dtype) for x in changes]
        return [_as(total, dtype), _as(loss.weight, dtype), count, count if live else count * 0, *means, *added]

    def normalized(self, result: Gradient) -> Gradient:
        """The gradient of the mean loss; in place where the gradients are still the reducer's own tensors."""
        if result.grads is not self._grads:
            return gradient.normalized(result)
        loss = result.loss
        assert isinstance(loss, Mean)
        for flat in self._reducer.flat_sums:
            flat.div_(_as(loss.weight, flat.dtype))
        return result.replace(loss=loss.compute()) if result.scalar else result


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in this dtype; without the call of `to` where nothing is to do."""
    return x if x.dtype is dtype else x.to(dtype)
