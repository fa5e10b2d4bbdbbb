"""Losses that are means over rows, and those that are not: how they are told apart, and what is exact for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lumen as lm
from lumen.core import rules
from lumen.errors import AxisError, PurityError
from tests.laws.models import assert_same

WIDTH = 4
LossFn = Callable[[lm.TrainState, Any, Any], Any]


def state_of(*layers: nn.Module) -> lm.TrainState:
    torch.manual_seed(0)
    return lm.TrainState.create(nn.Sequential(nn.Linear(WIDTH, 3), *layers).double(), lm.optim.sgd(0.1), seed=0)


def batch_of(rows: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    mask = x[:, 1:] > -0.5
    mask[:2] = False  # a part without weight
    return {"x": x, "mask": mask}


def step_of(loss: LossFn) -> Callable[[Any, Any], tuple[Any, Any]]:
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        def loss_fn(params: Any, batch: Any) -> Any:
            return loss(state, params, batch)

        value, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": value}

    return step


def out_of(state: Any, params: Any, batch: Any) -> Tensor:
    return state.apply(params, batch["x"])[0]  # type: ignore[no-any-return]


def contrastive(state: Any, params: Any, batch: Any) -> Tensor:
    z = F.normalize(out_of(state, params, batch))
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def balance(state: Any, params: Any, batch: Any) -> Tensor:
    """Switch transformers' load balancing: the mean of what is routed times the mean of the gates."""
    gates = out_of(state, params, batch).softmax(-1)
    routed = F.one_hot(gates.argmax(-1), 3).to(gates.dtype)
    return 3 * (gates.mean(0) * routed.mean(0)).sum()


def equal_in_value(state: Any, params: Any, batch: Any) -> Tensor:
    out = out_of(state, params, batch)
    return out.square().mean() + out.amax() - out.amax().detach()


MEANS: dict[str, LossFn] = {
    "mean": lambda s, p, b: out_of(s, p, b).square().mean(),
    "masked": lambda s, p, b: lm.Mean.of(out_of(s, p, b).square(), b["mask"]),
    "nothing on the whole": lambda s, p, b: (out_of(s, p, b) - out_of(s, p, b).detach()).mean(),
    "constant": lambda s, p, b: 0 * out_of(s, p, b).sum() + 2.0,
}
OTHERS: dict[str, LossFn] = {
    "sum": lambda s, p, b: out_of(s, p, b).square().sum(),
    "masked scalar": lambda s, p, b: lm.Mean.of(out_of(s, p, b).square(), b["mask"]).compute(),
    "weight of one": lambda s, p, b: lm.Mean(out_of(s, p, b).square().mean(), torch.ones(())),
    "contrastive": contrastive,
    "balance": balance,
    "gradient alone": equal_in_value,
}


@pytest.mark.parametrize("name", MEANS)
def test_means_over_rows_pass_and_parts_are_the_whole(name: str) -> None:
    state, batch, step = state_of(), batch_of(), step_of(MEANS[name])
    lm.check_purity(step, state, batch, rows=True)
    assert_same(lm.accumulate(3)(step)(state, batch)[0].params, step(state, batch)[0].params)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_told_and_parts_are_something_else(name: str) -> None:
    state, batch, step = state_of(), batch_of(), step_of(OTHERS[name])
    with pytest.raises(PurityError, match=r"the loss of loss_fn is no mean over the rows of its batch: it is"):
        lm.check_purity(step, state, batch, rows=True)
    lm.check_purity(step, state, batch)
    parts, whole = lm.accumulate(3)(step)(state, batch)[0], step(state, batch)[0]
    assert not torch.allclose(parts.params["0.weight"], whole.params["0.weight"], rtol=1e-6)


def test_what_cannot_be_judged_is_refused() -> None:
    mean, batch = step_of(MEANS["mean"]), batch_of()
    dropping = state_of(nn.Dropout())
    with pytest.raises(PurityError, match=r"draws random numbers.*state\.eval\(\)"):
        lm.check_purity(lm.seeded()(mean), dropping, batch, rows=True)
    lm.check_purity(mean, dropping.eval(), batch, rows=True)
    with pytest.raises(PurityError, match="is no mean over the rows"):
        lm.check_purity(
            step_of(lambda s, p, b: out_of(s, p, b)[:, 0].pow(3).mean()), state_of(nn.BatchNorm1d(3)), batch, rows=True
        )
    with pytest.raises(PurityError, match="at least two rows"):
        lm.check_purity(mean, state_of(), batch_of(1), rows=True)
    with pytest.raises(PurityError, match="found no loss"):
        lm.check_purity(lambda s, b: (s, {}), state_of(), batch, rows=True)


def test_gathered_rows_of_lanes_with_their_gradients() -> None:
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 6, WIDTH, dtype=torch.float64)

    def lane(own: Tensor, weight: Tensor, place: Tensor) -> Tensor:
        with rules.bound_axis("lanes", lm.core.collectives.LaneAxis(2, place)):
            return lm.all_gather(own, "lanes") * weight

    found = torch.func.vmap(lane)(x, weights, torch.arange(2))
    assert_same(found.detach(), x.detach().reshape(1, 6, WIDTH) * weights)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert_same(grad, weights.sum(0).reshape(2, 3, WIDTH))
    with pytest.raises(AxisError, match=r"Write x\[None\]"):
        torch.func.vmap(lambda own, place: lane(own, own, place))(torch.ones(2), torch.arange(2))
