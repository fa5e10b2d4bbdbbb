"""The gradient engines: they agree, and differentiating through them is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import lumen as lm

from .models import STEADY, Job, assert_same, jobs

Params = dict[str, Tensor]


def by_differences(fn: Any, params: Params, size: float = 1e-5) -> Params:
    """The gradient of `fn` by central differences, entry by entry."""
    grads = {}
    for name, value in params.items():
        flat = torch.zeros(value.numel(), dtype=value.dtype)
        for i in range(value.numel()):
            ends = []
            for sign in (1, -1):
                moved = value.clone()
                moved.view(-1)[i] += sign * size
                ends.append(fn({**params, name: moved}))
            flat[i] = (ends[0] - ends[1]) / (2 * size)
        grads[name] = flat.view(value.shape)
    return grads


@settings(max_examples=40)
@given(job=jobs(STEADY))
def test_both_engines_agree(job: Job) -> None:
    state = job.state()
    answers = [
        lm.value_and_grad(job.loss_fn(state), has_aux=True, engine=engine)(state.params, job.batch())
        for engine in ("autograd", "func")
    ]
    assert_same(answers[0], answers[1])


@settings(max_examples=10)
@given(job=jobs(losses=("mean", "masked")))
def test_gradients_are_torchs_own(job: Job) -> None:
    state = job.state()
    module = job.module()

    class Bound:
        """The state's function, with the module itself in its place."""

        @staticmethod
        def apply(params: Params, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return module(x), {}

    loss, _ = job.loss_fn(Bound)(state.params, job.batch())
    loss.compute().backward()
    _, grads = lm.value_and_grad(job.loss_fn(state), has_aux=True)(state.params, job.batch())
    assert_same(grads, {name: p.grad for name, p in module.named_parameters()})


def test_loss_and_aux_carry_no_graph() -> None:
    job = Job()
    state = job.state()
    answer = lm.value_and_grad(job.loss_fn(state), has_aux=True)(state.params, job.batch())
    assert not [path for path, t in lm.tree.named_tensors(answer) if t.requires_grad]


def maml(job: Job, state: lm.TrainState) -> Any:
    """The loss after one inner step of gradient descent."""

    def loss_fn(params: Params, batch: Any) -> Tensor:
        def inner(params: Params, batch: Any) -> Tensor:
            out, _ = state.apply(params, batch["x"])
            return F.cross_entropy(out, batch["y"])

        _, grads = lm.value_and_grad(inner)(params, batch)
        return inner({k: p - 0.5 * grads[k] for k, p in params.items()}, batch)

    return loss_fn


@pytest.mark.parametrize("model", ["linear", "mlp"])
@pytest.mark.parametrize("stack", ["plain", "traced", "lanes"])
def test_maml_is_second_order(model: str, stack: str) -> None:
    job = Job(model=model, optimizer="sgd", rows=6)
    state = job.state()

    def step(state: lm.TrainState, batch: Any) -> tuple[lm.TrainState, dict[str, Any]]:
        loss, grads = lm.value_and_grad(maml(job, state))(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss, "grads": grads}

    transforms = {"plain": (), "traced": (lm.compile(backend="eager"),), "lanes": (lm.ensemble(2),)}[stack]
    run = lm.compose(*transforms)(step)
    _, metrics = run(run.init(state), job.batch())
    grads = metrics["grads"] if stack != "lanes" else lm.tree.map(lambda g: g[1], metrics["grads"])
    loss_fn = maml(job, state)
    expected = by_differences(lambda p: loss_fn(p, job.batch()), state.params)
    assert_same(grads, expected, tolerance=1e-7)


def test_maml_through_several_inner_updates_of_an_optimizer() -> None:
    job = Job(model="linear", rows=6)
    state = job.state()
    tx = lm.optim.sgd(0.3, momentum=0.5)

    def loss_fn(params: Params, batch: Any) -> Tensor:
        def inner(params: Params, batch: Any) -> Tensor:
            return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"])

        opt_state = tx.init(params)
        for _ in range(3):
            _, grads = lm.value_and_grad(inner)(params, batch)
            params, opt_state = lm.apply_gradients(tx, grads, opt_state, params)
        return inner(params, batch)

    _, grads = lm.value_and_grad(loss_fn)(state.params, job.batch())
    expected = by_differences(lambda p: loss_fn(p, job.batch()), state.params)
    assert_same(grads, expected, tolerance=1e-7)


def test_an_inner_gradient_stays_differentiable_in_what_its_closure_holds() -> None:
    """The inner params are constants and the outer ones come in by the closure: only the nesting tells."""
    start = {"v": torch.tensor([0.5, -1.0], dtype=torch.float64)}
    batch = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def loss_fn(params: Params, batch: Tensor) -> Tensor:
        def inner(v: Params, batch: Tensor) -> Tensor:
            return (v["v"].square() * params["w"].exp() * batch).sum()

        _, grads = lm.value_and_grad(inner)(start, batch)
        return grads["v"].square().sum()

    params = {"w": torch.tensor([0.1, 0.2], dtype=torch.float64)}
    _, grads = lm.value_and_grad(loss_fn)(params, batch)
    assert_same(grads, by_differences(lambda p: loss_fn(p, batch), params), tolerance=1e-7)


def test_second_order_through_params_that_require_grad() -> None:
    """torch's own autograd outside: the params already require grad, so the answer stays differentiable."""
    state = Job(model="linear").state()
    batch = Job(model="linear").batch()

    def slope(params: Params) -> Tensor:
        def loss_fn(params: Params, batch: Any) -> Tensor:
            return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"])

        _, grads = lm.value_and_grad(loss_fn)(params, batch)
        return sum(g.square().sum() for g in grads.values())

    live = {k: p.clone().requires_grad_() for k, p in state.params.items()}
    grads = dict(zip(live, torch.autograd.grad(slope(live), list(live.values())), strict=True))
    assert_same(grads, by_differences(slope, state.params), tolerance=1e-7)


def test_hypergradient_through_an_extra_argument() -> None:
    state, batch = Job(model="linear").state(), Job(model="linear").batch()

    def tuned(decay: Params) -> Tensor:
        def loss_fn(params: Params, batch: Any, decay: Tensor) -> Tensor:
            penalty = sum(p.square().sum() for p in params.values())
            return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"]) + decay * penalty

        _, grads = lm.value_and_grad(loss_fn)(state.params, batch, decay["decay"])
        return sum((state.params[k] - 0.1 * g).square().sum() for k, g in grads.items())

    decay = {"decay": torch.tensor(0.3, dtype=torch.float64, requires_grad=True)}
    (grad,) = torch.autograd.grad(tuned(decay), decay["decay"])
    expected = by_differences(tuned, {"decay": decay["decay"].detach()})
    torch.testing.assert_close(grad, expected["decay"], rtol=1e-7, atol=1e-7)


def test_hypergradient_through_a_closure_warns_and_is_right() -> None:
    state, batch = Job(model="linear").state(), Job(model="linear").batch()

    def tuned(decay: Params) -> Tensor:
        def loss_fn(params: Params, batch: Any) -> Tensor:
            penalty = sum(p.square().sum() for p in params.values())
            return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"]) + decay["decay"] * penalty

        _, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return sum((state.params[k] - 0.1 * g).square().sum() for k, g in grads.items())

    decay = {"decay": torch.tensor(0.3, dtype=torch.float64, requires_grad=True)}
    with pytest.warns(lm.InexactWarning, match="require grad and are not among params"):
        value = tuned(decay)
    (grad,) = torch.autograd.grad(value, decay["decay"])
    expected = by_differences(tuned, {"decay": decay["decay"].detach()})
    torch.testing.assert_close(grad, expected["decay"], rtol=1e-7, atol=1e-7)


def test_a_hypergradient_is_right_after_the_same_function_ran_without() -> None:
    """The graph is searched once for a function, and again when its closure holds a live tensor."""
    params, batch = {"w": torch.tensor([1.0, 2.0])}, torch.ones(2)

    def slope(scale: Tensor) -> Tensor:
        _, grads = lm.value_and_grad(lambda params, batch: (params["w"] ** 3 * batch).sum() * scale)(params, batch)
        return grads["w"].sum()

    assert float(slope(torch.tensor(2.0))) == 30.0
    scale = torch.tensor(2.0, requires_grad=True)
    with pytest.warns(lm.InexactWarning, match="not among params"):
        value = slope(scale)
    value.backward()
    assert float(scale.grad) == 15.0


def test_under_torch_func_the_answer_is_differentiable() -> None:
    job = Job(model="linear")
    state, batch = job.state(), job.batch()

    def slope(params: Params) -> Tensor:
        def loss_fn(params: Params, batch: Any) -> Tensor:
            return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"])

        _, grads = lm.value_and_grad(loss_fn)(params, batch)
        return sum(g.square().sum() for g in grads.values())

    assert_same(torch.func.grad(slope)(state.params), by_differences(slope, state.params), tolerance=1e-7)


@pytest.mark.parametrize("model", ["linear", "mlp", "attention"])
def test_vmap_over_rows_gives_each_rows_gradient(model: str) -> None:
    job = Job(model=model, form="tuple", loss="scalar", rows=4)
    state, batch = job.state(), job.batch()

    def one(*row: Tensor) -> Params:
        batch = tuple(x[None] for x in row)
        return lm.value_and_grad(job.loss_fn(state), has_aux=True)(state.params, batch)[1]

    grads = torch.func.vmap(one)(*batch)
    for i in range(4):
        row = tuple(x[i : i + 1] for x in batch)
        _, own = lm.value_and_grad(job.loss_fn(state), has_aux=True)(state.params, row)
        assert_same(lm.tree.map(lambda g, i=i: g[i], grads), own)


def test_unused_params_have_zero_gradients() -> None:
    def loss_fn(params: Params, batch: Tensor) -> Tensor:
        return (params["used"] * batch).sum()

    for engine in ("autograd", "func"):
        params = {"used": torch.ones(2), "unused": torch.ones(3)}
        _, grads = lm.value_and_grad(loss_fn, engine=engine)(params, torch.ones(2))
        assert torch.equal(grads["unused"], torch.zeros(3))


def test_works_inside_no_grad() -> None:
    job = Job()
    with torch.no_grad():
        inside = job.step(job.state(), job.batch())
    assert_same(inside, job.step(job.state(), job.batch()), exact=True)
