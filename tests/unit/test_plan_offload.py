"""Plans of `fsdp(offload=True)`: what mixes devices raises there, so that a plan which ends is a test of the way."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.errors import StepError
from lumen.planner.plan import plan

WIDTH, DEPTH, SHARDS = 64, 4, 4
PART = DEPTH * (WIDTH + 1) * WIDTH // SHARDS * 4  # bytes of one process's params


def step(state, batch):
    def loss_fn(params, batch):
        return state.apply(params, batch)[0].square().mean()

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def made():
    return lm.TrainState.create(
        torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]), lm.optim.adam(1e-3)
    )


def found(*inner, **options):
    wrapped = lm.compose(lm.fsdp(**options), *inner)(step)
    return plan(wrapped, made, torch.zeros(8, WIDTH), mesh={"shard": SHARDS})


@pytest.mark.parametrize(
    "inner",
    [
        (),
        (lm.accumulate(2),),
        (lm.guard("skip"),),
        (lm.clip(1.0),),
        (lm.ema(0.9),),
        (lm.donate(),),
        (lm.precision("fp16"),),
        (lm.guard("skip"), lm.clip(1.0), lm.ema(0.9), lm.precision("fp16")),
    ],
    ids=repr,
)
def test_the_device_holds_no_state_and_the_host_all_of_it(inner):
    ours = found(*inner, offload=True)
    assert {name: ours.peak.by_category[name] for name in ("params", "optimizer")} == {"params": 0, "optimizer": 0}
    assert ours.host.nbytes >= 3 * PART
    assert "on the host" in str(ours)


def test_recomputation_is_refused():
    with pytest.raises(StepError, match="Plan it without one of the two"):
        found(lm.remat(), offload=True)


def test_without_offload_nothing_is_on_the_host():
    theirs = found()
    assert theirs.peak.by_category["params"] >= PART
    assert theirs.host.nbytes == 0
    assert "on the host" not in str(theirs)


def test_a_plan_leaves_no_device_behind():
    found(offload=True)
    assert not torch.accelerator.is_available()
    with torch.random.fork_rng():
        torch.rand(1)


def test_autocast_is_followed_on_a_device_that_is_not_there():
    ours, theirs = found(lm.precision("bf16"), offload=True), found(offload=True)
    assert ours.peak.by_category["activations"] < theirs.peak.by_category["activations"]
