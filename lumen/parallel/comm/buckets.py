"""Sums many tensors over ranks in flat buckets, launched in one order on all ranks while the gradient is computed.

A rank may have its gradients ready in another order than its neighbor, for example after a branch that it alone takes.
But all ranks of a group must call its collectives in the same order. So bucket i is launched once it is full and all
buckets before it have been launched. A gradient that the loss does not reach is sent as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.core import _torch_compat, distributed, rules
from lumen.parallel.comm import collectives
from lumen.parallel.comm.collectives import WaitFn
from lumen.parallel.comm.consistency import assert_same_on_all_ranks
from lumen.parallel.comm.process_groups import GroupRef

_flatten: Callable[[list[Tensor]], Tensor] = _torch_compat.flatten_dense_tensors
_unflatten: Callable[[Tensor, list[Tensor]], list[Tensor]] = _torch_compat.unflatten_dense_tensors


FIRST_BUCKET_BYTES = 2**20  # bytes of the first bucket


class GradComm:
    """Sums over the ranks of a group, and counts the bytes that this rank sends."""

    def __init__(self, group: dist.ProcessGroup, reduce_dtype: str | None = None) -> None:
        self._group = GroupRef(group)
        self.size = self._group.size
        self.reduce_dtype = reduce_dtype
        self.bytes_sent = 0

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group."""
        return self._group()

    def __deepcopy__(self, _memo: Any) -> GradComm:
        return self  # shared by the copies of a module that uses it

    def launch(
        self, tensors: Tensor | Sequence[Tensor], op: str = "sum", exact: bool = False, stats: Sequence[Tensor] = ()
    ) -> WaitFn:
        """Start the reduction of a tensor, or of several of one dtype as a flat one; the result waits for it.

        The sum (or maximum) may be in the memory of the one tensor. `stats` are a few more numbers, whose exact sums
        follow those of `tensors`.
        """
        listed = [tensors] if isinstance(tensors, Tensor) else tensors
        first = listed[0]
        self.bytes_sent += sum([x.numel() for x in (*listed, *stats)]) * first.element_size()
        if self.reduce_dtype and not exact and first.dtype == torch.float32:
            summed = self._in_bfloat16(listed, stats)
            return lambda: summed
        return collectives.all_reduce([*listed, *stats] if stats else tensors, op, self.group)

    def _in_bfloat16(self, tensors: Sequence[Tensor], stats: Sequence[Tensor]) -> Tensor:
        """The sum of `tensors` rounded to bfloat16, added up in float32 and rounded once more.

        Each rank adds up one slice, and all ranks gather the slices. Both halves send two bytes for each number. A rank
        appends the bits of `stats` to each slice, so that every rank receives those of all ranks and adds them up in
        the same order.
        """
        narrow = [x.reshape(-1).to(torch.bfloat16) for x in tensors]
        count = sum([x.numel() for x in narrow])
        self.bytes_sent -= 2 * count
        slices = torch.cat([*narrow, narrow[0].new_zeros(-count % self.size)]).view(self.size, -1)
        exact, width = None, slices.shape[1]
        if stats and rules.is_tracing():  # compiled kernels may change bits that are not those of numbers
            exact = collectives.all_reduce(stats, "sum", self.group)
        elif stats:
            bits = _flatten(list(stats)).view(torch.bfloat16)
            slices = torch.cat([slices, bits.expand(self.size, -1)], 1)
        received = collectives.all_to_all(slices.view(-1), self.group)().view(self.size, -1)
        own_sum = received[:, :width].float().sum(0).to(torch.bfloat16)
        summed = collectives.all_to_all(own_sum.repeat(self.size), self.group)()[:count]
        if not stats:
            return summed.float()
        sums = exact() if exact else received[:, width:].contiguous().view(stats[0].dtype).sum(0)
        return torch.cat([summed.float(), sums])


class BucketLayout(NamedTuple):
    """The indices of the leaves in each bucket, and the bucket of each leaf."""

    buckets: list[list[int]]
    owner: list[int]


def assign_buckets(leaves: Sequence[Tensor], order: Sequence[int], limit: float) -> BucketLayout:
    """Buckets of one dtype and at most `limit` bytes (or one leaf), filled in `order`.

    The first bucket of each dtype is small, as in torch's DDP: communication then starts early in the backward pass.
    """
    buckets: list[list[int]] = []
    is_open: dict[torch.dtype, tuple[int, int, float]] = {}
    owner = [0] * len(leaves)
    for index in order:
        leaf = leaves[index]
        size = leaf.numel() * leaf.element_size()
        bucket, used, limit_here = is_open.get(leaf.dtype, (-1, 0, 0.0))
        if bucket < 0 or used + size > limit_here:
            limit_here = limit if bucket >= 0 else min(limit, FIRST_BUCKET_BYTES)
            bucket, used = len(buckets), 0
            buckets.append([])
        buckets[bucket].append(index)
        owner[index] = bucket
        is_open[leaf.dtype] = bucket, used + size, limit_here
    return BucketLayout(buckets, owner)


class BucketPlanCache:
    """The bucket layout for each kind of gradient, by the shapes and dtypes of its leaves.

    The first backward pass records the order in which gradients become ready. All ranks use that of the first rank.
    """

    def __init__(self, comm: GradComm, limit: float) -> None:
        self._comm = comm
        self._limit = limit
        self._layouts: dict[Any, BucketLayout] = {}

    def get(self, leaves: Sequence[Tensor]) -> BucketLayout | None:
        """The layout for leaves like these, if one has been agreed on."""
        return self._layouts.get(_signature(leaves))

    def agree(self, leaves: Sequence[Tensor], ready: Sequence[int]) -> BucketLayout:
        """Agree on a layout for leaves like these, whose gradients became `ready` in this order on this rank."""
        recorded = set(ready)
        order = [*ready, *(index for index in reversed(range(len(leaves))) if index not in recorded)]
        if not rules.is_tracing() and not distributed.is_dry_run():
            device = leaves[0].device
            lines = [f"gradient {i} of shape {tuple(leaf.shape)}, {leaf.dtype}" for i, leaf in enumerate(leaves)]
            assert_same_on_all_ranks(lines, self._comm.group, device, "the gradients of this step")
            agreed_order = torch.tensor(order, device=device)
            dist.broadcast(agreed_order, group=self._comm.group, group_src=0)
            order = agreed_order.tolist()
        layout = assign_buckets(leaves, order, self._limit)
        self._layouts[_signature(leaves)] = layout
        return layout


def _signature(leaves: Sequence[Tensor]) -> Any:
    return tuple([(leaf.shape, leaf.dtype) for leaf in leaves])


class Buckets:
    """The buckets of one gradient on their way: the `GradReducer` of ddp, and of fsdp's stage 1."""

    in_backward = False

    def __init__(self, comm: GradComm, plans: BucketPlanCache, overlap: bool) -> None:
        self._comm = comm
        self._plans = plans
        self._overlap = overlap
        self._layout: BucketLayout | None = None
        self._ready: list[int] = []
        self._grads: dict[int, Tensor] = {}
        self._missing: list[int] = []
        self._in_flight: list[tuple[WaitFn, list[Tensor]]] = []
        self.flat_sums: list[Tensor] = []

    def register_hooks(self, live: Sequence[Tensor]) -> None:
        """Launch each bucket as soon as the backward pass has filled it, or record the order to do so next time."""
        if not self._overlap:
            return
        self._layout = self._plans.get(live)
        if self._layout is None and rules.is_tracing():  # no backward pass has run to record an order from
            self._layout = self._plans.agree(live, [])
        if self._layout is None:
            for index, leaf in enumerate(live):
                leaf.register_hook(partial(self._record_order, index))
            return
        if len(self._layout.buckets) == 1:  # the last bucket waits for `finish`
            return
        self._missing = [len(bucket) for bucket in self._layout.buckets]
        for index, leaf in enumerate(live):
            leaf.register_hook(partial(self._launch_full_buckets, index))

    def _record_order(self, index: int, _grad: Tensor) -> None:
        self._ready.append(index)

    def _launch_full_buckets(self, index: int, grad: Tensor) -> None:
        assert self._layout is not None
        bucket = self._layout.owner[index]
        self._grads[index] = grad
        self._missing[bucket] -= 1
        if self._missing[bucket] or bucket != len(self._in_flight):
            return
        last = len(self._layout.buckets) - 1  # which `finish` launches with the stats
        while len(self._in_flight) < last and not self._missing[len(self._in_flight)]:
            self._launch([self._grads[i] for i in self._layout.buckets[len(self._in_flight)]])

    def _launch(self, grads: list[Tensor], stats: Sequence[Tensor] = ()) -> None:
        self._in_flight.append((self._comm.launch(grads, stats=stats), grads))

    def finish(self, leaves: Sequence[Tensor], stats: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The sums over all ranks of `leaves`, the gradients that the engine returned, and of `stats` as one vector.

        `stats` is sent in the last bucket where the dtypes agree.
        """
        layout = self._layout or self._plans.get(leaves) or self._plans.agree(leaves, self._ready)
        *rest, last = layout.buckets
        for bucket in rest[len(self._in_flight) :]:
            self._launch([leaves[index] for index in bucket])
        last_grads = [leaves[index] for index in last]
        stats_fit = stats[0].dtype == last_grads[0].dtype
        self._launch(last_grads, stats if stats_fit else ())
        wait_stats = None if stats_fit else self._comm.launch(stats, exact=True)
        sums: list[Tensor] = list(leaves)
        for (wait, bucket_grads), bucket in zip(self._in_flight, layout.buckets, strict=True):
            flat = wait()
            self.flat_sums.append(flat)
            for index, view in zip(bucket, _unflatten(flat, bucket_grads), strict=True):
                sums[index] = view
        if wait_stats is not None:
            return sums, wait_stats()
        # A copy: otherwise a loss that waits to be logged would keep its bucket alive.
        return sums, flat[-sum([x.numel() for x in stats]) :].clone()
