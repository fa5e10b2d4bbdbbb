"""Gradients of params that the optimizer keeps as they are: they count in no norm of `lm.dp_sgd`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lumen as lm
from lumen.errors import StateError

ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLIP = 0.2


def make_state(tx: Any) -> lm.TrainState:
    torch.manual_seed(0)
    return lm.TrainState.create(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), tx)


def row_losses(state: Any, params: Any, x: Tensor) -> Tensor:
    return state.apply(params, x)[0].square().sum(1)  # type: ignore[no-any-return]


def step(state: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
    loss, grads = lm.value_and_grad(lambda p, x: lm.Mean.of(row_losses(state, p, x)))(state.params, x)
    return state.apply_gradients(grads), {"loss": loss}


def head_by_hand(state: lm.TrainState) -> dict[str, Tensor]:
    """The update of the last layer from its own gradients, clipped row by row."""
    params = {name: p.clone().requires_grad_() for name, p in state.params.items()}
    head = ["2.weight", "2.bias"]
    total = {name: torch.zeros_like(params[name]) for name in head}
    for x in ROWS.split(1):
        grads = torch.autograd.grad(row_losses(state, params, x).sum(), [params[name] for name in head])
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > CLIP
        for name, g in zip(head, grads, strict=True):
            total[name] += g * CLIP / norm
    return {name: params[name].detach() - total[name] / len(ROWS) for name in head}


@pytest.mark.parametrize(
    "around",
    [
        lambda private: [private],
        lambda private: [lm.accumulate(2), private],
        lambda private: [lm.donate(), private],
        lambda private: [lm.compile(backend="eager"), private],
    ],
    ids=["plain", "accumulate", "donate", "compile"],
)
def test_private_clips_a_row_by_the_norm_of_what_is_trained(around: Any) -> None:
    for tx in (
        lm.optim.freeze("0.*", lm.optim.sgd(1.0)),
        lm.optim.partition({"2.*": lm.optim.sgd(1.0)}, lm.optim.freeze()),
    ):
        start = make_state(tx)
        expected = {**start.params, **head_by_hand(start)}
        run = lm.compose(*around(lm.dp_sgd(CLIP, 0.0, chunk=4)))(step)
        new, _ = run(run.init(start), ROWS)
        for name, p in run.export(new).params.items():
            torch.testing.assert_close(p, expected[name], rtol=1e-10, atol=1e-12)


def test_private_refuses_an_update_of_params_that_it_left_out() -> None:
    other = lm.optim.sgd(1.0)

    def trains_all(state: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
        _, grads = lm.value_and_grad(lambda p, x: lm.Mean.of(row_losses(state, p, x)))(state.params, x)
        params, _ = lm.apply_gradients(other, grads, other.init(state.params), state.params)
        return state.replace(params=params), {}

    private = lm.dp_sgd(CLIP, 0.0)(trains_all)
    with pytest.raises(StateError, match=r"left out the gradients of 0\.weight, 0\.bias.*lm\.optim\.partition"):
        private(private.init(make_state(lm.optim.freeze("0.*", lm.optim.sgd(1.0)))), ROWS)
    private(private.init(make_state(lm.optim.sgd(1.0))), ROWS)
