"""Tensors that are passed round a ring: each rank sends to the next one while it receives from the one before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.parallel.comm.wait_time import WAIT_TIME
from lumen.parallel.tensor.autograd_collectives import TPGroup


class RingShift:
    """A flat tensor on its way to the next rank of the group; `wait` returns the one of the rank before."""

    def __init__(self, flat: Tensor, group: TPGroup) -> None:
        self._sent, self._received = flat, torch.empty_like(flat)
        self._works: list[Any] = []
        if flat.numel():
            after, before = ((group.index + step) % group.size for step in (1, -1))
            self._works = dist.batch_isend_irecv([  # as bytes: Gloo lacks some dtypes
                dist.P2POp(dist.isend, flat.view(torch.uint8), group=group.group, group_peer=after),
                dist.P2POp(dist.irecv, self._received.view(torch.uint8), group=group.group, group_peer=before),
            ])  # fmt: skip

    def wait(self) -> Tensor:
        """The received tensor; the one that was sent may change from then on."""
        for work in self._works:
            WAIT_TIME.wait(work)
        self._works = []
        return self._received


def pack(tensors: tuple[Tensor, Tensor]) -> Tensor:
    """Two tensors as a flat one."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unpack(flat: Tensor, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`, with the shapes of `like`."""
    a, b = (x.view(y.shape) for x, y in zip(flat.split([x.numel() for x in like]), like, strict=True))
    return a, b


def rotated(pair: tuple[Tensor, Tensor], group: TPGroup) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """The pairs of all ranks, each with its rank, from this rank's own on backward; the next comes meanwhile."""
    flat = pack(pair)
    for step in range(group.size):
        shift = RingShift(flat, group) if step + 1 < group.size else None
        yield (group.index - step) % group.size, unpack(flat, pair)
        flat = flat if shift is None else shift.wait()
