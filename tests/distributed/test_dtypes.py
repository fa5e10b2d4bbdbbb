"""Buffers of every dtype travel: also of those that Gloo does not know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lumen as lm
from lumen.core import distributed
from lumen.parallel import ddp, fsdp

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
)


class Buffered(nn.Module):
    """A linear layer beside a buffer of each dtype, with other bytes on each process."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        for i, dtype in enumerate(DTYPES):
            self.register_buffer(f"b{i}", (torch.arange(5) + distributed.rank() + i).to(dtype))
            self.register_buffer(f"one{i}", torch.tensor(1 + distributed.rank()).to(dtype))
            self.register_buffer(f"none{i}", torch.zeros(0, 2, dtype=dtype))

    def forward(self, x):
        return self.linear(x)


def beginning():
    """The bytes of all buffers as they were given, and after `init` under each transform."""
    found = []
    for parallel in (ddp(), fsdp(), fsdp(offload=True)):
        state = lm.TrainState.create(Buffered(), lm.optim.sgd(0.1))
        given = as_bytes(state)
        found.append((given, as_bytes(parallel.export(parallel.init(state)))))
    return found


def as_bytes(state):
    return {name: b.contiguous().view(-1).view(torch.uint8).tolist() for name, b in state.buffers.items()}


def test_all_hold_the_first_processs_buffers(world2):
    first, second = world2.run(beginning)
    for (given, mine), (other, theirs) in zip(first, second, strict=True):
        assert other != given
        assert mine == given
        assert theirs == given
