"""Causal language models of transformers that compute their own loss, under `lm.chunked_logits`, unmodified."""

from __future__ import annotations

import warnings

import pytest
import torch

import lumen as lm

pytest.importorskip("transformers")

from tests.parity.hf_families import FAMILIES, make_net

CAUSAL = [name for name, family in FAMILIES.items() if family[-1] == "causal"]


def step(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, input_ids=batch, labels=batch, use_cache=False)
        return out.loss

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


@pytest.mark.parametrize("family", CAUSAL)
def test_the_loss_of_the_model_itself_is_computed_in_chunks(family):
    tokens = torch.randint(3, 32, (3, 8), generator=torch.Generator().manual_seed(0))
    state = lm.TrainState.create(make_net(family), lm.optim.sgd(0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        warnings.simplefilter("error", lm.InexactWarning)
        found, metrics = lm.chunked_logits(chunk=5)(step)(state, tokens)
        wanted, others = step(state, tokens)
    torch.testing.assert_close(metrics["loss"], others["loss"])
    for name, param in wanted.params.items():
        torch.testing.assert_close(found.params[name], param, rtol=1e-5, atol=2e-6)
