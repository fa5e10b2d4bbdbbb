"""One process of a run whose memory is looked at from outside: `plan_job.py STRATEGY`, with torchrun's environment.

It prints by how much the resident set has grown at its fullest in the second step, in bytes.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
from torch import nn

import lumen as lm

WIDTH, DEPTH, ROWS = 1024, 8, 128  # 34 MB of params
M_MMAP_THRESHOLD = -3  # of malloc.h
STRATEGIES = {
    "alone": list,
    "ddp": lambda: [lm.ddp(), lm.donate()],
    "zero1": lambda: [lm.fsdp(stage=1), lm.donate()],
}


def step(state, batch):
    def loss_fn(params, batch):
        return state.apply(params, batch)[0].square().mean()

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def make(strategy):
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(DEPTH)]
    state = lm.TrainState.create(nn.Sequential(*layers), lm.optim.adamw(1e-3))
    return lm.compose(*STRATEGIES[strategy]())(step), state, torch.ones(ROWS, WIDTH)


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def warm_up():
    """Load what a first step loads: kernels, threads, modules of torch's."""
    state = lm.TrainState.create(nn.Linear(8, 8), lm.optim.adamw(1e-3))
    wrapped = lm.ddp()(step)
    state = wrapped.init(state)
    wrapped(state, torch.ones(2, 8))


def main(strategy):
    torch.set_num_threads(1)
    # So that the C library gives back what is freed, and the set is what is held.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    lm.mesh()
    warm_up()
    before = resident("VmRSS")
    wrapped, state, batch = make(strategy)
    state = wrapped.init(state)
    state, metrics = wrapped(state, batch)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    state, metrics = wrapped(state, batch)
    sys.stdout.write(f"{resident('VmHWM') - before}\n")


if __name__ == "__main__":
    main(sys.argv[1])
