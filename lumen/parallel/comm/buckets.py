"""Summing many tensors over processes: in flat buckets, launched in one strict order, while the gradient is computed.

A process may have its gradients ready in another order than its neighbor (a branch that only it takes), but a group's
collectives must be called in the same order everywhere. So bucket i is launched once it is full and all before it are
on their way, and what a loss does not reach travels as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.core import distributed, rules
from lumen.parallel.comm import collectives
from lumen.parallel.comm.collectives import WaitFn
from lumen.parallel.comm.consistency import assert_same_on_all_ranks
from lumen.parallel.comm.process_groups import GroupRef

_flatten: Callable[[list[Tensor]], Tensor] = torch._C._nn.flatten_dense_tensors
_unflatten: Callable[[Tensor, list[Tensor]], list[Tensor]] = torch._C._nn.unflatten_dense_tensors


FIRST = 2**20  # bytes of the first bucket


class GradComm:
    """Sums over the processes of a group, and counts the bytes that were handed to it."""

    def __init__(self, group: dist.ProcessGroup, reduce_dtype: str | None = None) -> None:
        self._group = GroupRef(group)
        self.size = self._group.size
        self.reduce_dtype = reduce_dtype
        self.sent = 0

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes."""
        return self._group()

    def __deepcopy__(self, _memo: Any) -> GradComm:
        return self  # a module that sums over it may be copied, the processes may not

    def launch(
        self, parts: Tensor | Sequence[Tensor], op: str = "sum", exact: bool = False, beside: Sequence[Tensor] = ()
    ) -> WaitFn:
        """Send a tensor, or several of one dtype as a flat one; what is returned waits for the sum (or maximum).

        It may lie in the memory of the one tensor. `beside` are a few more numbers, whose exact sums lie behind.
        """
        whole = [parts] if isinstance(parts, Tensor) else parts
        first = whole[0]
        self.sent += sum([part.numel() for part in (*whole, *beside)]) * first.element_size()
        if self.reduce_dtype and not exact and first.dtype == torch.float32:
            summed = self._in_bfloat16(whole, beside)
            return lambda: summed
        return collectives.all_reduce([*whole, *beside] if beside else parts, op, self.group)

    def _in_bfloat16(self, parts: Sequence[Tensor], beside: Sequence[Tensor]) -> Tensor:
        """The sum of the parts rounded to bfloat16, added up in float32 and rounded once more: each process adds a
        slice of its own, and all gather the slices. Both halves send two bytes for a number.

        To each slice a process adds the bits of `beside`, so that all have those of all, and add them up alike.
        """
        narrow = [part.reshape(-1).to(torch.bfloat16) for part in parts]
        count = sum([part.numel() for part in narrow])
        self.sent -= 2 * count
        slices = torch.cat([*narrow, narrow[0].new_zeros(-count % self.size)]).view(self.size, -1)
        exact, width = None, slices.shape[1]
        if beside and rules.is_tracing():  # kernels made for numbers may change bits that are none
            exact = collectives.all_reduce(beside, "sum", self.group)
        elif beside:
            bits = _flatten(list(beside)).view(torch.bfloat16)
            slices = torch.cat([slices, bits.expand(self.size, -1)], 1)
        arrived = collectives.all_to_all(slices.view(-1), self.group)().view(self.size, -1)
        mine = arrived[:, :width].float().sum(0).to(torch.bfloat16)
        summed = collectives.all_to_all(mine.repeat(self.size), self.group)()[:count]
        if not beside:
            return summed.float()
        sums = exact() if exact else arrived[:, width:].contiguous().view(beside[0].dtype).sum(0)
        return torch.cat([summed.float(), sums])


class Layout(NamedTuple):
    """Which leaves, by their places, make up each bucket, and the bucket of each leaf."""

    buckets: list[list[int]]
    owner: list[int]


def lay_out(leaves: Sequence[Tensor], order: Sequence[int], limit: float) -> Layout:
    """Buckets of one dtype and at most `limit` bytes (or one leaf), filled in `order`.

    The first of each dtype is small, as in torch's DDP: the wire is put to use early in the backward pass.
    """
    buckets: list[list[int]] = []
    is_open: dict[torch.dtype, tuple[int, int, float]] = {}
    owner = [0] * len(leaves)
    for place in order:
        leaf = leaves[place]
        size = leaf.numel() * leaf.element_size()
        at, held, full = is_open.get(leaf.dtype, (-1, 0, 0.0))
        if at < 0 or held + size > full:
            full = limit if at >= 0 else min(limit, FIRST)
            at, held = len(buckets), 0
            buckets.append([])
        buckets[at].append(place)
        owner[place] = at
        is_open[leaf.dtype] = at, held + size, full
    return Layout(buckets, owner)


class BucketPlanCache:
    """The layout of each kind of gradient that was met: by the shapes and dtypes of its leaves.

    The first time, the leaves' order of readiness is recorded, and that of the group's first process is taken by all.
    """

    def __init__(self, wire: GradComm, limit: float) -> None:
        self._wire = wire
        self._limit = limit
        self._known: dict[Any, Layout] = {}

    def find(self, leaves: Sequence[Tensor]) -> Layout | None:
        """What is known for leaves like these."""
        return self._known.get(_kind(leaves))

    def learn(self, leaves: Sequence[Tensor], ready: Sequence[int]) -> Layout:
        """Agree on a layout for leaves like these, whose gradients were `ready` in this order here."""
        seen = set(ready)
        order = [*ready, *(place for place in reversed(range(len(leaves))) if place not in seen)]
        if not rules.is_tracing() and not distributed.is_dry_run():
            device = leaves[0].device
            lines = [f"gradient {i} of shape {tuple(leaf.shape)}, {leaf.dtype}" for i, leaf in enumerate(leaves)]
            assert_same_on_all_ranks(lines, self._wire.group, device, "the gradients of this step")
            agreed = torch.tensor(order, device=device)
            dist.broadcast(agreed, group=self._wire.group, group_src=0)
            order = agreed.tolist()
        found = lay_out(leaves, order, self._limit)
        self._known[_kind(leaves)] = found
        return found


def _kind(leaves: Sequence[Tensor]) -> Any:
    return tuple([(leaf.shape, leaf.dtype) for leaf in leaves])


class Buckets:
    """The buckets of one gradient on their way: the `GradReducer` of ddp, and of fsdp's stage 1."""

    in_backward = False

    def __init__(self, wire: GradComm, layouts: BucketPlanCache, overlap: bool) -> None:
        self._wire = wire
        self._layouts = layouts
        self._overlap = overlap
        self._layout: Layout | None = None
        self._ready: list[int] = []
        self._grads: list[Tensor | None] = []
        self._missing: list[int] = []
        self._flying: list[tuple[WaitFn, list[Tensor]]] = []
        self.flat_sums: list[Tensor] = []

    def register_hooks(self, live: Sequence[Tensor]) -> None:
        """Launch each bucket as soon as the backward pass has filled it, or record the order to do so next time."""
        if not self._overlap:
            return
        self._layout = self._layouts.find(live)
        if self._layout is None and rules.is_tracing():  # nothing has run whose order could be recorded
            self._layout = self._layouts.learn(live, [])
        if self._layout is None:
            for place, leaf in enumerate(live):
                leaf.register_hook(partial(self._record, place))
            return
        if len(self._layout.buckets) == 1:  # the last waits for `finish`
            return
        self._grads = [None] * len(live)
        self._missing = [len(bucket) for bucket in self._layout.buckets]
        for place, leaf in enumerate(live):
            leaf.register_hook(partial(self._filled, place))

    def _record(self, place: int, _grad: Tensor) -> None:
        self._ready.append(place)

    def _filled(self, place: int, grad: Tensor) -> None:
        assert self._layout is not None
        at = self._layout.owner[place]
        self._grads[place] = grad
        self._missing[at] -= 1
        if self._missing[at] or at != len(self._flying):
            return
        last = len(self._layout.buckets) - 1  # `finish` has more to put into it
        while len(self._flying) < last and not self._missing[len(self._flying)]:
            self._launch([self._grads[i] for i in self._layout.buckets[len(self._flying)]])  # type: ignore[misc]

    def _launch(self, grads: list[Tensor], tail: Sequence[Tensor] = ()) -> None:
        self._flying.append((self._wire.launch(grads, beside=tail), grads))

    def finish(self, leaves: Sequence[Tensor], tail: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The sums over all processes of `leaves`, the gradients as the engine gives them, and of `tail`, one vector.

        `tail` is a few numbers that travel in the last bucket where they can.
        """
        layout = self._layout or self._layouts.find(leaves) or self._layouts.learn(leaves, self._ready)
        *rest, last = layout.buckets
        for bucket in rest[len(self._flying) :]:
            self._launch([leaves[place] for place in bucket])
        grads = [leaves[place] for place in last]
        joined = tail[0].dtype == grads[0].dtype
        self._launch(grads, tail if joined else ())
        alone = None if joined else self._wire.launch(tail, exact=True)
        out: list[Tensor] = list(leaves)
        for (arrived, parts), bucket in zip(self._flying, layout.buckets, strict=True):
            flat = arrived()
            self.flat_sums.append(flat)
            for place, view in zip(bucket, _unflatten(flat, parts), strict=True):
                out[place] = view
        if alone is not None:
            return out, alone()
        # A copy: a loss that is kept until it is logged would keep its whole bucket.
        return out, flat[-sum([part.numel() for part in tail]) :].clone()
