"""Loaders whose batches are chosen by tokens, weights or sets: two processes train as one does on the same batches."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import lumen as lm
from lumen.parallel.ddp.ddp import ddp

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

N = 23
LENGTHS = [1 + 7 * row % 9 for row in range(N)]
TEXTS = [torch.linspace(-1, row, length, dtype=torch.float64) for row, length in enumerate(LENGTHS)]


def padded(rows):
    x = pad_sequence(rows, batch_first=True)
    return {"x": x, "counts": torch.arange(x.shape[1]) < torch.tensor([[len(row)] for row in rows])}


def loaders():
    sets = {"a": TEXTS[:12], "b": TEXTS[12:]}
    return {
        "tokens": lm.Loader(TEXTS, tokens=16, lengths=LENGTHS, seed=1, collate=padded),
        "mixture": lm.Loader(lm.data.Mixture(sets, weights={"a": 2, "b": 1}), 5, collate=padded),
        "weights": lm.Loader(TEXTS, 5, weights=lm.data.balanced(LENGTHS), seed=1, collate=padded),
    }


def step(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, batch["x"].unsqueeze(-1))
        return lm.Mean.of((out.squeeze(-1) - batch["x"].sin()).square(), batch["counts"])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def train():
    found = {}
    for name, data in loaders().items():
        torch.manual_seed(0)
        state = lm.TrainState.create(torch.nn.Linear(1, 1).double(), lm.optim.adam(0.1))
        runner = lm.Runner(step, transforms=[ddp(lm.mesh(device="cpu"))], progress=False)
        result = runner.fit(state, data, until=lm.Epochs(2))
        params = [leaf.detach().clone() for leaf in result.state.params.values()]
        found[name] = params, result.clock.step, result.clock.rows
    return found


def test_two_processes_train_as_one(world2):
    alone = train()
    assert alone["tokens"][1:] == (2 * len(loaders()["tokens"]), 2 * N)
    for found in world2.run(train):
        for name, (params, *counts) in found.items():
            assert counts == list(alone[name][1:]), name
            for leaf, wanted in zip(params, alone[name][0], strict=True):
                torch.testing.assert_close(leaf, wanted, rtol=1e-9, atol=1e-11)
