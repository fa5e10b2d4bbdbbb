"""Schedulers of torch as tables: what they change besides the learning rate is the same under transforms."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import lumen as lm
from lumen.bridges.torch_optim import Length, convert_optimizer

STEPS = 6


def make_state(kind: type[torch.optim.Optimizer]) -> lm.TrainState:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedulers' own
        optimizer = kind(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)
        config = {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return lm.TrainState.create(net, convert_optimizer(net, config, Length(1, STEPS)))


def step(state: Any, batch: Any) -> Any:
    def loss_fn(params: Any, batch: Any) -> Any:
        return (state.apply(params, batch)[0] ** 2).mean()

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def batches() -> list[torch.Tensor]:
    return [torch.randn(4, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(STEPS)]


@pytest.mark.parametrize(
    "transforms", [[lm.donate()], [lm.guard(), lm.donate()], [lm.compile(backend="eager")]], ids=str
)
def test_cycled_betas_are_the_same_under_transforms(transforms: Any) -> None:
    plain = make_state(torch.optim.AdamW)
    composed = lm.compose(*transforms)(step)
    state = composed.init(make_state(torch.optim.AdamW))
    for batch in batches():
        plain, _ = step(plain, batch)
        state, _ = composed(state, batch)
    found, wanted = composed.export(state), plain
    assert float(wanted.opt_state.hparams["beta1"]) == pytest.approx(0.95)  # where the cycle ends
    for (name, leaf), (_, expected) in zip(lm.tree.named_tensors(found), lm.tree.named_tensors(wanted), strict=True):
        torch.testing.assert_close(leaf, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_a_skipped_update_leaves_the_cycled_betas_as_they_were() -> None:
    composed = lm.compose(lm.guard("skip"), lm.donate())(step)
    state = composed.init(make_state(torch.optim.AdamW))
    state, _ = composed(state, batches()[0])
    before = {name: leaf.clone() for name, leaf in lm.tree.named_tensors(composed.export(state).opt_state)}
    state, _ = composed(state, torch.full((4, 3), torch.nan, dtype=torch.float64))
    for name, leaf in lm.tree.named_tensors(composed.export(state).opt_state):
        assert torch.equal(leaf, before[name]), name


@pytest.mark.parametrize("kind", [torch.optim.Adamax, torch.optim.NAdam])
def test_an_optimizer_of_torch_gets_the_cycled_options(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    optimizer = kind(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)
    state = make_state(kind)
    for batch in batches():
        optimizer.zero_grad()
        (net(batch) ** 2).mean().backward()
        optimizer.step()
        if scheduler.last_epoch + 1 < STEPS:
            scheduler.step()
        state, _ = step(state, batch)
    for name, param in net.named_parameters():
        torch.testing.assert_close(state.params[name], param.detach(), rtol=1e-12, atol=1e-12)
