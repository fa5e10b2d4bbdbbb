"""What `ddp` and `fsdp` share: a batch whose rows lie on several processes, and one gradient, loss and aux of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core import gradient, rows, rules, world
from lumen.core.primitives import ApplyCall, Aux, Gradient, GradientCall
from lumen.core.rules import Next
from lumen.core.step import device_of
from lumen.core.values import Max, Mean, Min, Sum, Value, extremes, is_value
from lumen.errors import AxisError, LossError, OrderError
from lumen.parallel.buckets import Buckets, Layouts, Wire
from lumen.parallel.functional import Arrived
from lumen.parallel.sync_norm import synchronised

Buffers = Literal["merge", "local", "sync"]

_TOTAL, _WEIGHT, _ROWS, _LIVE, _HEAD = range(5)  # what travels with each gradient, and how much: `Exchange._tail`
STAND_IN = 2  # rows that an empty process computes in vain: BatchNorm takes no fewer


class RowsRule:
    """What ddp makes of each P1 call of one step."""

    def __init__(self, wire: Wire, layouts: Layouts, buffers: Buffers, state: Any) -> None:
        self._wire = wire
        self._layouts = layouts
        self._buffers = buffers
        self._counts = True  # whether the rows in work are the batch's own
        self._old = getattr(state, "buffers", None)
        held = state if self._old is None else self._old
        self._held = {id(tensor) for tensor in tree.tensors(held)}
        self._device = device_of(state)

    def __call__(self, next: Next, call: GradientCall) -> Gradient:
        """The gradient of the global batch."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise AxisError(
                "lm.ddp sums gradients over processes, which torch cannot do inside vmap or torch.func.grad. Train one"
                " model under lm.ddp, or an lm.ensemble in each process by itself."
            )
        size = rows.count(call.batch)
        # Statistics are summed within the backward pass too, where their order must not meet that of the buckets.
        overlap = size > 0 and self._buffers != "sync"
        exchange = Exchange(self._wire, Buckets(self._wire, self._layouts, overlap), size, self._kept, self._device)
        self._counts = size > 0
        if not size:
            call = call.replace(batch=stand_in(call.batch), loss_fn=weightless(call.loss_fn, call.has_aux))
        answer: Gradient = next(call.replace(summed=True, reduction=exchange))
        if not size:
            answer = answer.replace(aux=self._neutral(answer.aux))
        return answer if call.summed else exchange.normalized(answer)

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """BatchNorm over all processes."""
        return synchronised(next, call, self._wire, self._counts)

    def _kept(self, buffer: Any) -> bool:
        """Whether a buffer stays as it is here: by the user's choice, or because the loss did not change it."""
        return self._buffers == "local" or id(buffer) in self._held

    def _neutral(self, aux: Any) -> Any:
        """What a loss returned for rows that do not exist."""
        if not isinstance(aux, Aux):
            return tree.map(_without_rows, aux, is_leaf=is_value)
        changed: Any = aux
        buffers = aux.buffers
        if self._buffers == "local" and self._old is not None and buffers.keys() == self._old.keys():
            buffers = self._old
        return changed.replace(buffers=buffers, metrics=tree.map(_without_rows, aux.metrics, is_leaf=is_value))


def stand_in(batch: Any) -> Any:
    """Rows of zeros, for a process that has none."""
    return tree.map(lambda x: x.new_zeros((STAND_IN, *x.shape[1:])) if isinstance(x, Tensor) else x, batch)


def weightless(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The same loss, which weighs nothing."""

    def run(*args: Any) -> Any:
        out = loss_fn(*args)
        loss, aux = out if has_aux else (out, None)
        loss = Mean(loss.total * 0, loss.weight * 0) if isinstance(loss, Mean) else loss * 0
        return (loss, aux) if has_aux else loss

    run.__wrapped__ = loss_fn  # type: ignore[attr-defined]
    run.__qualname__ = getattr(loss_fn, "__qualname__", "loss")
    return run


def _without_rows(leaf: Any) -> Any:
    """A metric of rows that do not exist: the value that merges as if it were not there."""
    if isinstance(leaf, Mean | Sum):
        return tree.map(torch.zeros_like, leaf)
    if isinstance(leaf, Max | Min):
        low, high = extremes(leaf.value.dtype)
        return type(leaf)(torch.full_like(leaf.value, low if isinstance(leaf, Max) else high))
    if isinstance(leaf, Value):
        empty = getattr(getattr(leaf, "metric", None), "init", None)  # torchmetrics' own
        return leaf if empty is None else empty()
    if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == STAND_IN:
        return leaf[:0]
    return leaf


class Exchange:
    """The reduction of one gradient: `lumen.core.primitives.Reduction`."""

    within = False

    def __init__(
        self, wire: Wire, buckets: Buckets, size: int, kept: Callable[[Any], bool], device: torch.device
    ) -> None:
        self._wire = wire
        self._buckets = buckets
        self.rows = size
        self._kept = kept
        self._device = device
        self._grads: Any = None

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if rules.is_tracing():
            raise OrderError(
                "lm.compile cannot trace a step in which processes ask each other for the number of their microbatches."
                " Give it: lm.accumulate(2)."
            )
        largest = self._wire.launch(torch.tensor(number, device=self._device), "max", exact=True)()
        return number if world.is_planned() else int(largest)

    def idle(self, call: GradientCall) -> GradientCall:
        """The call with a loss that weighs nothing."""
        return call.replace(loss_fn=weightless(call.loss_fn, call.has_aux))

    def watch(self, live: Sequence[Tensor]) -> None:
        """Let the buckets fill."""
        self._buckets.watch(live)

    def finish(self, answer: Gradient, independent: LossError | None = None) -> Gradient:
        """The answer of all processes."""
        leaves, rebuild = gradient.flat(answer.grads)
        if True in [leaf.requires_grad for leaf in leaves]:
            raise AxisError(
                "under lm.ddp a gradient was asked for that is to be differentiated again outside of a loss function."
                " Take the inner gradient inside the loss, as lm.value_and_grad(inner)(params, rows) does there."
            )
        if not self.rows:
            leaves = [torch.zeros_like(leaf) for leaf in leaves]
        aux = _Shared(answer.aux, self.rows or STAND_IN, self._kept)
        maxima = aux.launch_maxima(self._wire)
        sums, tail = self._buckets.finish(leaves, self._tail(answer, aux.averaged(), independent is None))
        if independent is not None and not tail[_LIVE]:
            raise independent
        loss = answer.loss
        assert isinstance(loss, Mean)
        self._grads = rebuild(sums)
        return Gradient(
            Mean(_as(tail[_TOTAL], loss.total.dtype), _as(tail[_WEIGHT], loss.weight.dtype)),
            self._grads,
            aux.joined(tail, maxima),
            answer.scalar,
            answer.rows,
            joint=True,
        )

    def _tail(self, answer: Gradient, averaged: Sequence[Tensor], live: bool) -> list[Tensor]:
        """What else is summed: the loss's total and weight, rows, those that have a gradient, and means by rows."""
        loss = answer.loss
        assert isinstance(loss, Mean)
        total, size = loss.total.detach(), self.rows
        wide = functools.reduce(torch.promote_types, {total.dtype, *(x.dtype for x in averaged)}, torch.float32)
        if not size:
            return [total.new_zeros(_HEAD + sum(x.numel() for x in averaged), dtype=wide)]
        count = loss.weight  # which a plain scalar has of its rows; in a narrow dtype not all numbers are
        if not answer.scalar or count.dtype is not wide:
            count = total.new_full((), size, dtype=wide)
        means = [_as(x.detach(), wide) * size for x in averaged]
        return [_as(total, wide), _as(loss.weight, wide), count, count if live else count * 0, *means]

    def normalized(self, answer: Gradient) -> Gradient:
        """The gradient of the mean loss; in place where nobody has changed the buckets' own tensors since."""
        if answer.grads is not self._grads:
            return gradient.normalized(answer)
        loss = answer.loss
        assert isinstance(loss, Mean)
        for flat in self._buckets.flat:
            flat.div_(_as(loss.weight, flat.dtype))
        return answer.replace(loss=loss.compute()) if answer.scalar else answer


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in this dtype; asking torch for what there is to do costs as much as doing a little."""
    return x if x.dtype is dtype else x.to(dtype)


class _Shared:
    """What of an aux is joined over processes: changed buffers and plain scalars by rows, counters by their largest."""

    def __init__(self, aux: Any, size: int, kept: Callable[[Any], bool]) -> None:
        self._aux = aux
        self._leaves: list[Any] = []
        self._means: list[int] = []
        self._maxima: list[int] = []
        if aux is None:
            return
        held = len(tree.leaves(aux.buffers)) if isinstance(aux, Aux) else 0
        self._leaves, self._spec = tree.flatten(aux, is_value)
        for place, leaf in enumerate(self._leaves):
            if place < held:
                if isinstance(leaf, Tensor) and not kept(leaf):
                    (self._means if leaf.is_floating_point() else self._maxima).append(place)
            elif _is_mean(leaf, size, aux, place):
                self._means.append(place)

    def averaged(self) -> list[Tensor]:
        """The tensors whose mean by rows is taken."""
        return [self._leaves[place] for place in self._means]

    def launch_maxima(self, wire: Wire) -> Arrived | None:
        """The largest of each counter, on its way."""
        if not self._maxima:
            return None
        flat = torch.cat([self._leaves[place].reshape(-1).to(torch.int64) for place in self._maxima])
        return wire.launch(flat, "max")

    def joined(self, tail: Tensor, maxima: Arrived | None) -> Any:
        """The aux of all processes."""
        if not self._means and not self._maxima:
            return self._aux
        leaves = list(self._leaves)
        for places, flat in ((self._means, tail[_HEAD:] / tail[_ROWS]), (self._maxima, maxima and maxima())):
            if flat is None:
                continue
            pieces = flat.split([leaves[place].numel() for place in places])
            for place, piece in zip(places, pieces, strict=True):
                leaves[place] = piece.reshape(leaves[place].shape).to(leaves[place].dtype, copy=True)
        return self._spec.unflatten(leaves)


def _is_mean(leaf: Any, size: int, aux: Any, place: int) -> bool:
    """Whether a metric is averaged over processes by rows; others must be this process's own by what they are."""
    if not isinstance(leaf, Tensor):
        return False
    if leaf.dim() == 0 and leaf.is_floating_point():
        return True
    if leaf.dim() and leaf.shape[0] == size:
        return False
    name = tree.paths(aux, is_value)[place]
    raise LossError(
        f"aux[{name!r}] is a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}, and it is not clear how the"
        " processes' parts make the whole batch's. Say what it is: lm.Mean.of(x), lm.Sum.of(x), lm.Max.of(x) or"
        " lm.Last(x); and put buffers into lm.Aux(buffers=...)."
    )
