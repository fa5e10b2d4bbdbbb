"""`lm.sam` is the loop of two passes, of the full batch, under every transform that it may stand around or inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen.errors import HyperparameterError, OrderError

from .models import FORMS, PLAIN, STEADY, Job, assert_same, jobs, learned, train


def two_passes(job: Job, rho: float, adaptive: bool, steps: int, frozen: str = "") -> dict[str, torch.Tensor]:
    """The params after SGD in plain PyTorch, as the papers' reference code writes it; dropout and buffers aside."""
    net = job.module()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for number in range(steps):
        x, y, mask = FORMS[job.form][1](job.batch(number))

        def backward(x: Any = x, y: Any = y, mask: Any = mask) -> None:
            optimizer.zero_grad()
            losses = F.cross_entropy(net(x), y, reduction="none")
            (losses[mask] if job.loss == "masked" else losses).mean().backward()  # type: ignore[no-untyped-call]

        before = {name: b.clone() for name, b in net.named_buffers()}
        backward()
        after = {name: b.clone() for name, b in net.named_buffers()}
        moved = []
        with torch.no_grad():
            learning = [p for name, p in net.named_parameters() if not (frozen and name.startswith(frozen))]
            sizes = [p.abs() if adaptive else torch.ones_like(p) for p in learning]
            scaled = [size * p.grad for size, p in zip(sizes, learning, strict=True)]  # type: ignore[operator]
            norm = torch.cat([g.flatten() for g in scaled]).norm()
            for p, size, g in zip(learning, sizes, scaled, strict=True):
                moved.append((p, p.clone()))
                p.add_(rho * size * g / norm)
            for name, b in net.named_buffers():
                b.copy_(before[name])
        backward()
        with torch.no_grad():
            for p, old in moved:
                p.copy_(old)
            for name, b in net.named_buffers():
                b.copy_(after[name])
            for name, p in net.named_parameters():
                if frozen and name.startswith(frozen):
                    p.grad = None
        optimizer.step()
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def trained(job: Job, *stack: lm.Transform, steps: int = 3, state: Any = None) -> lm.TrainState:
    step = lm.compose(*stack)(job.step)
    state, _ = train(step, step.init(job.state() if state is None else state), job.batches(steps))
    return step.export(state)


@settings(max_examples=20)
@given(job=jobs(STEADY), rho=st.floats(1e-3, 1.0), adaptive=st.booleans())
def test_it_is_the_loop_of_two_passes(job: Job, rho: float, adaptive: bool) -> None:
    if job.kind.mixes_rows and job.rows < 2:
        return
    job = Job(job.model, job.form, job.loss, "sgd", job.rows, job.seed)
    state = trained(job, lm.sam(rho, adaptive=adaptive))
    expected = two_passes(job, rho, adaptive, 3)
    found = {**state.params, **state.buffers}
    assert_same(found, {name: expected[name].detach() for name in found}, tolerance=1e-8)


@settings(max_examples=10)
@given(job=jobs((*STEADY, "dropout")))
def test_without_a_distance_it_is_the_step(job: Job) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = trained(job, lm.sam(0.0))
        torch.manual_seed(0)
        assert_same(learned(found), learned(trained(job)), exact=True)


SAMS = [lm.sam(0.3), lm.sam(0.8, adaptive=True)]
INSIDE: dict[str, tuple[list[lm.Transform], list[lm.Transform]]] = {  # around sam, and inside of it
    "accumulate": ([], [lm.accumulate(3)]),
    "microbatches": ([], [lm.accumulate(microbatch=2)]),
    "donate": ([lm.donate()], []),
    "compile": ([lm.compile(backend="eager")], []),
    "compile donate accumulate": ([lm.compile(backend="eager"), lm.donate()], [lm.accumulate(2)]),
    "guard": ([lm.guard("raise"), lm.clip(1e9)], [lm.remat(torch.nn.Linear)]),
    "inside": ([], [lm.guard(), lm.clip(1e9), lm.ema(0.9), lm.donate()]),
    "seeded": ([lm.seeded()], []),
}


@pytest.mark.parametrize("around", INSIDE)
@pytest.mark.parametrize("sam", SAMS, ids=repr)
def test_the_perturbation_is_that_of_the_full_batch(sam: lm.Transform, around: str) -> None:
    job = Job(loss="masked", rows=7)
    outside, inside = INSIDE[around]
    assert_same(learned(trained(job, *outside, sam, *inside)), learned(trained(job, sam)))


@pytest.mark.parametrize("sam", SAMS, ids=repr)
def test_each_lane_of_an_ensemble_has_its_own_perturbation(sam: lm.Transform) -> None:
    job = Job(rows=6)
    first = job.state()
    states = [first, first.replace(params={name: 2 * p for name, p in first.params.items()})]
    wrapped = lm.compose(lm.ensemble(2), sam)(job.step)
    state, _ = train(wrapped, wrapped.init(states), job.batches(3))
    for lane, alone in zip(wrapped.export(state), states, strict=True):
        assert_same(learned(lane), learned(trained(job, sam, state=alone)))


def test_unrolled_steps_each_have_their_own_perturbation() -> None:
    job = Job(rows=4)
    step = lm.compose(lm.unroll(3), lm.sam(0.3))(job.step)
    state, _ = step(step.init(job.state()), lm.stack(job.batches(3)))
    assert_same(learned(state), learned(trained(job, lm.sam(0.3))))


def test_metrics_are_those_of_the_first_pass() -> None:
    job = Job(model="conv_bn_train", rows=5)
    found, expected = (step(job.state(), job.batch()) for step in (lm.sam(0.5)(job.step), job.step))
    assert_same((found[1], found[0].buffers), (expected[1], expected[0].buffers), exact=True)


def test_frozen_params_are_neither_moved_nor_counted() -> None:
    job = Job(optimizer="sgd")
    for adaptive in (False, True):
        tx = lm.optim.freeze("0.*", lm.optim.sgd(0.1, momentum=0.9))
        state = trained(job, lm.sam(0.3, adaptive=adaptive), state=lm.TrainState.create(job.module(), tx))
        expected = two_passes(job, 0.3, adaptive, 3, frozen="0.")
        assert_same(dict(state.params), {name: expected[name].detach() for name in state.params}, tolerance=1e-8)


def test_a_skipped_update_of_loss_scaling_stays_skipped() -> None:
    """At a scale that overflows in both passes params stay, and are finite after the scale has fallen."""
    job = Job(rows=4)
    step = lm.sam(0.1)(lm.precision(lm.Policy(compute=torch.float16, loss_scale=2.0**60))(job.step))
    net = job.module().float()
    state = step.init(lm.TrainState.create(net, lm.optim.sgd(0.1)))
    x, y, mask = FORMS[job.form][1](job.batch())
    batch = FORMS[job.form][0](x.float(), y, mask)
    before = dict(state.params)
    state, _ = step(state, batch)
    assert_same(dict(state.params), before, exact=True)
    for _ in range(60):
        state, _ = step(state, batch)
    assert all(p.isfinite().all() for p in state.params.values())
    assert not torch.equal(state.params["0.weight"], before["0.weight"])


def test_params_of_16_bits_are_perturbed_in_float32_and_rounded_once() -> None:
    weight = torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.bfloat16)
    seen = []

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        def loss_fn(params: Any, batch: Any) -> Any:
            seen.append(params["weight"].detach().clone())
            return lm.Mean.of((state.apply(params, batch)[0]).float())

        _, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {}

    net = torch.nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    net.weight.data.copy_(weight)
    lm.sam(0.5)(step)(lm.TrainState.create(net, lm.optim.sgd(0.1)), torch.tensor([[3.0, 4.0, 0.0]]).bfloat16())
    assert torch.equal(seen[0], weight)
    assert torch.equal(seen[1], torch.tensor([[1.3, 1.4, 2.0]]).bfloat16())


@pytest.mark.parametrize("job", [Job(model) for model in PLAIN], ids=lambda job: job.model)
def test_a_gradient_of_zero_perturbs_nothing(job: Job) -> None:
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        def loss_fn(params: Any, batch: Any) -> Any:
            return (job.loss_fn(state)(params, batch)[0]).compute() * 0.0

        _, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {}

    new, _ = lm.sam(0.5)(step)(job.state(), job.batch())
    assert all(p.isfinite().all() for p in new.params.values())


REFUSED = {
    "accumulate outside": (lambda: (lm.accumulate(2), lm.sam()), "gradient of the full batch.*\nWrite: lm.sam"),
    "ddp outside": (lambda: (lm.ddp(), lm.sam()), r"gradient of the full batch.*\nWrite: lm.sam\(0.05\)\(lm.ddp"),
    "fsdp outside": (lambda: (lm.fsdp(), lm.sam()), r"gradient of the full batch.*\nWrite: lm.sam\(0.05\)\(lm.fsdp"),
    "dp_sgd inside": (lambda: (lm.sam(), lm.dp_sgd(1.0, 1.0)), "cannot be combined with lm.sam.*without noise"),
    "sam outside seeded": (lambda: (lm.sam(), lm.seeded()), "sam is outside seeded"),
    "twice": (lambda: (lm.sam(), lm.sam()), "sam is applied twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_orders_that_cannot_be_right_are_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(OrderError, match=f"(?s){message}"):
        lm.compose(*make())(Job().step)


@pytest.mark.parametrize("rho", [-1.0, float("nan"), float("inf"), "0.05", None, True, torch.tensor(0.1)])
def test_a_distance_is_a_number(rho: Any) -> None:
    with pytest.raises(HyperparameterError, match="rho"):
        lm.sam(rho)
