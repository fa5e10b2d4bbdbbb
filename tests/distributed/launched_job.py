"""A process of a launcher: trains one step under `lm.ddp` on its rows, and writes what it has, for `test_launchers`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import lumen as lm

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def step(state, batch):
    def loss_fn(params, batch):
        return lm.Mean.of(state.apply(params, batch)[0].square().sum(-1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def parts():
    """A state, and 5 rows, the same in each process."""
    torch.manual_seed(0)
    return lm.TrainState.create(nn.Linear(3, 2), lm.optim.adamw(0.1), seed=0), torch.randn(5, 3)


def main(directory):
    state, rows = parts()
    mesh = lm.mesh(device="cpu", timeout=60)
    trained = lm.compose(lm.ddp(mesh))(step)
    state, _ = trained(trained.init(state), rows[lm.rank() :: lm.world_size()])  # 3 rows and 2
    values = {name: value.tolist() for name, value in state.params.items()}
    answer = {"params": values, "variables": {name: os.environ[name] for name in NAMES}}
    (directory / f"{lm.rank()}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
