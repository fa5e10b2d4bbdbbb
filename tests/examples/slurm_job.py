"""What `test_slurm` trains: a few steps, which wait for a file before the fifth."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

import lumen as lm

STEPS = 60


def step(state, batch):
    def loss_fn(params, batch):
        return lm.Mean.of(state.apply(params, batch)[0].square().sum(-1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


class WaitForSignal(lm.Callback):
    """Holds the run at its fourth step until it is to go on."""

    def __init__(self, rundir):
        self.rundir = rundir

    def on_step(self, view):
        if view.clock.step == 4:
            (self.rundir / f"waits{lm.rank()}").touch()
            until = time.monotonic() + 60.0
            while not (self.rundir / "go on").exists() and time.monotonic() < until:
                time.sleep(0.01)


def train(rundir, callbacks=()):
    torch.manual_seed(0)
    runner = lm.Runner(
        step,
        transforms=[lm.ddp()],
        checkpoint=lm.Checkpointer(rundir, every=lm.Every(steps=100)),
        callbacks=list(callbacks),
        progress=False,
    )
    state = lm.TrainState.create(nn.Linear(3, 2), lm.optim.adamw(0.1), seed=0)
    rows = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    return runner.fit(state, lm.Loader(rows, batch_size=5, seed=0), until=lm.Steps(STEPS), resume="auto")


if __name__ == "__main__":
    rundir = Path(sys.argv[1])
    train(rundir, [WaitForSignal(rundir)])
