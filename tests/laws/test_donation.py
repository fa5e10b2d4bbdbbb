"""`donate` takes the memory of what an update overwrites, and of nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from lumen.errors import DonatedError


@lm.dataclass
class Taught(lm.TrainState):
    """Params, and others that follow them slowly."""

    teacher: Any = lm.extend.param_field(kw_only=True)


def make_state() -> Taught:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2)).double()
    teacher = {name: p.detach().clone() for name, p in copy.deepcopy(net).named_parameters()}
    return Taught.create(net, lm.optim.adam(1e-2), teacher=teacher)


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (4, 2))
    return {"x": x, "y": y}


def loss_of(state: Taught):
    def loss_fn(params, rows):
        out, buffers = state.apply(params, rows["x"])
        target, _ = state.eval().apply(state.teacher, rows["x"])
        losses = (out - rows["y"]).square() + (out - target).square()
        return lm.Mean.of(losses.mean(-1)), lm.Aux(buffers=buffers)

    return loss_fn


def distill(state, rows):
    (loss, aux), grads = lm.value_and_grad(loss_of(state), has_aux=True)(state.params, rows)
    new = state.apply_gradients(grads, buffers=aux.buffers)
    teacher = lm.tree.map(lambda old, p: torch.lerp(old, p, 0.1), state.teacher, new.params)
    return new.replace(teacher=teacher), {"loss": loss}


def q_learning(state, rows):
    (loss, aux), grads = lm.value_and_grad(loss_of(state), has_aux=True)(state.params, rows)
    new = state.apply_gradients(grads, buffers=aux.buffers)
    due = state.step % 2 == 1
    target = lm.tree.map(lambda old, p: torch.where(due, p, old), state.teacher, new.params)
    noise = lm.random.normal(state.key, ())
    # What the update left as it was can be read: other fields, and the functions of them.
    before, _ = state.apply(target, rows["x"])
    return new.replace(teacher=target), {"loss": loss, "noise": noise, "before": before.mean(), "seed": state.seed}


STACKS = {
    "plain": [],
    "accumulate": [lm.accumulate(2)],
    "around": [lm.guard(), lm.clip(1.0), lm.ema(0.9)],
    "compile": [lm.compile(backend="eager")],
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("step", [distill, q_learning])
def test_fields_that_an_update_leaves_alone_stay_readable(step, stack):
    plain, donated = lm.compose(*STACKS[stack])(step), lm.compose(*STACKS[stack], lm.donate())(step)
    wanted, found = plain.init(make_state()), donated.init(make_state())
    for seed in range(3):
        wanted, expected = plain(wanted, batch(seed))
        found, metrics = donated(found, batch(seed))
        assert expected.keys() == metrics.keys()
    wanted, found = plain.export(wanted), donated.export(found)
    for (path, a), b in zip(lm.tree.named_tensors(wanted), lm.tree.tensors(found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=path)


@pytest.mark.parametrize(
    "use",
    [
        lambda state, grads: state.params,
        lambda state, grads: state.opt_state,
        lambda state, grads: state.apply_gradients(grads),
        lambda state, grads: state.replace(step=state.step),
    ],
)
def test_what_was_overwritten_is_not(use):
    def looks_back(state, rows):
        loss, grads = lm.value_and_grad(lambda p, rows: F.mse_loss(state.apply(p, rows["x"])[0], rows["y"]))(
            state.params, rows
        )
        new = state.apply_gradients(grads)
        use(state, grads)
        return new, {"loss": loss}

    run = lm.donate()(looks_back)
    with pytest.raises(DonatedError, match="read what you need before state.apply_gradients"):
        run(run.init(make_state()), batch())


def test_once_the_step_has_returned_nothing_is():
    run = lm.donate()(distill)
    state = run.init(make_state())
    run(state, batch())
    for name in ("teacher", "params", "step", "apply", "key"):
        with pytest.raises(DonatedError, match=f"state.{name} was read"):
            getattr(state, name)
    assert "donated" in repr(state)
