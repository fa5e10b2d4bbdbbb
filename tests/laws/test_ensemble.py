"""`ensemble` and `sweep`: each lane is its own run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen import random

from .models import STEADY, Job, assert_same, jobs, train

STACKS = {
    "plain": lambda lanes: lanes,
    "traced": lambda lanes: lm.compose(lm.compile(backend="eager"), lanes),
    "donated": lambda lanes: lm.compose(lanes, lm.donate()),
    "traced and donated": lambda lanes: lm.compose(lm.compile(backend="eager"), lanes, lm.donate()),
    "averaged": lambda lanes: lm.compose(lanes, lm.guard(), lm.ema(0.5)),
}


def starts(job: Job, count: int) -> list[lm.TrainState]:
    """States of one model and optimizer with params of their own."""
    template = job.state()
    return [template.replace(params=replace(job, seed=job.seed + i).state().params) for i in range(count)]


def lanes_of(stack: Any, init: Any, job: Job, steps: int = 3) -> list[lm.TrainState]:
    step = stack(job.step)
    state, _ = train(step, step.init(init), job.batches(steps))
    return step.export(state)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("stack", STACKS)
@settings(max_examples=4)
@given(job=jobs(STEADY, rows=(2, 6)))
def test_each_lane_is_its_own_run(stack: str, large: bool, job: Job) -> None:
    """Small lanes are updated under vmap, large ones one by one: here whatever their size."""
    own = starts(job, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumen.optim._vmap_fused._MIN_LANE_SIZE", 0 if large else 2**60)
        lanes = lanes_of(STACKS[stack](lm.ensemble(3)), own, job)
    for lane, state in zip(lanes, own, strict=True):
        assert_same(lane, train(job.step, state, job.batches(3))[0])


class Doubled(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return 2 * x


def fresh(lane: int, **changes: Any) -> lm.TrainState:
    """A state with a module and an optimizer of its own."""
    torch.manual_seed(lane)
    options = {"lr": 0.1, "betas": (0.9, 0.99), "dropout": 0.0, "schedule": 10, **changes}
    layers = [torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(options["dropout"])]
    torch.nn.utils.parametrize.register_parametrization(layers[0], "weight", Doubled())  # makes a class on the fly
    first = lm.optim.adamw(options["lr"], options["betas"])
    later = lm.optim.sgd(lm.optim.cosine(0.1, options["schedule"]))
    tx = lm.optim.partition({"3.*": first}, default=later)
    return lm.TrainState.create(torch.nn.Sequential(*layers, torch.nn.Linear(4, 1)).double(), tx, seed=lane)


def fresh_step(state: Any, batch: Any) -> Any:
    def loss_fn(params: Any, batch: Any) -> Any:
        out, buffers = state.apply(params, batch)
        return out.square().mean(), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def test_lanes_with_modules_and_optimizers_of_their_own() -> None:
    members = lm.ensemble(3)
    wrapped = members(fresh_step)
    state = wrapped.init(lambda lane: fresh(lane, lr=0.1 * (lane + 1)))
    singles = [fresh(lane, lr=0.1 * (lane + 1)) for lane in range(3)]
    for index in range(3):
        batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        state, _ = wrapped(state, batch)
        singles = [fresh_step(single, batch)[0] for single in singles]
    for lane, single in zip(wrapped.export(state), singles, strict=True):
        found, wanted = lm.tree.leaves((lane.params, lane.buffers)), lm.tree.leaves((single.params, single.buffers))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dropout": 0.5}, r"lanes 0 and 1 differ in apply_fn\.module\.2\.p \(0\.0 and 0\.5\)"),
        ({"betas": (0.8, 0.99)}, r"differ in tx\..*beta1 \(0\.9 and 0\.8\)"),
        ({"schedule": 20}, r"differ in tx\..*10 and 20"),
    ],
)
def test_lanes_that_would_compute_something_else_are_refused(changes: Any, says: str) -> None:
    with pytest.raises(lm.LumenError, match=says):
        lm.ensemble(2).init(lambda lane: fresh(lane, **(changes if lane else {})))


def test_lanes_from_a_function_of_the_seed() -> None:
    job = Job()
    template = job.state()

    def start(seed: int) -> lm.TrainState:
        return template.replace(params=replace(job, seed=seed).state().params)

    for stack in (lm.ensemble(2), lm.compose(lm.ensemble(2), lm.ema(0.9))):
        lanes = lanes_of(stack, start, job)
        for seed, lane in enumerate(lanes):
            assert_same(lane, train(job.step, start(seed), job.batches(3))[0])


def test_lanes_from_one_state_have_seeds_of_their_own() -> None:
    state = lm.ensemble(5).init(Job().state())
    assert len(set(state.seed.tolist())) == 5


def test_each_lane_may_have_its_own_batch() -> None:
    job = Job()
    lanes = lm.ensemble(3, batch_dim=0)
    step = lanes(job.step)
    state, _ = step(step.init(job.state()), lm.stack(job.batches(3)))
    for i, lane in enumerate(step.export(state)):
        assert_same(lane, job.step(job.state(), job.batch(i))[0])


@settings(max_examples=6)
@given(job=jobs(), rates=st.lists(st.floats(1e-4, 0.3), min_size=1, max_size=4))
def test_sweep_of_the_learning_rate(job: Job, rates: list[float]) -> None:
    lanes = lanes_of(lm.sweep(lr=rates), job.state(), job)
    for lane, rate in zip(lanes, rates, strict=True):
        tx = {"sgd": lambda lr: lm.optim.sgd(lr, momentum=0.9), "adamw": lm.optim.adamw}[job.optimizer](rate)
        own = lm.TrainState.create(job.module(), tx, seed=job.seed)
        assert_same(lane, train(job.step, own, job.batches(3))[0])


@settings(max_examples=4)
@given(job=jobs(), factors=st.lists(st.floats(0.1, 3), min_size=1, max_size=3))
def test_a_swept_factor_multiplies_the_schedule(job: Job, factors: list[float]) -> None:
    schedule = lm.optim.warmup_cosine(0.1, steps=6, warmup=2)
    scaled = lm.optim.chain(lm.optim.adamw(schedule), lm.optim.scale(torch.tensor(1.0)))
    start = lm.TrainState.create(job.module(), scaled, seed=job.seed)
    lanes = lanes_of(lm.sweep(factor=factors), start, job)
    for lane, factor in zip(lanes, factors, strict=True):
        tx = lm.optim.adamw(lambda count, factor=factor: factor * schedule(count))
        own, _ = train(job.step, lm.TrainState.create(job.module(), tx, seed=job.seed), job.batches(3))
        assert_same((lane.params, lane.buffers), (own.params, own.buffers))


@pytest.mark.parametrize("donated", [False, True])
def test_large_lanes_are_updated_in_fused_kernels_where_they_lie(donated: bool) -> None:
    """With rates of their own, one skipped by its guard; without donation the old state is left as it was."""
    net = torch.nn.Linear(128, 128)
    start = lm.TrainState.create(net, lm.optim.adamw(1e-3), seed=0)
    rates = [1e-3, 1e-2, 3e-2]
    batches = torch.randn(2, 3, 4, 128)
    batches[1, 1] = torch.nan

    def step(state: lm.TrainState, batch: torch.Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
        loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].square().mean())(
            state.params, batch
        )
        return state.apply_gradients(grads), {"loss": loss}

    stack = (lm.guard(), lm.donate()) if donated else (lm.guard(),)
    swept = lm.compose(lm.sweep(lr=rates, batch_dim=0), *stack)(step)
    swept(swept.init(start), batches[0])  # the first use of a kernel also tests it, with calls of its own
    first = swept.init(start)
    kept = lm.tree.map(torch.clone, first)
    addresses = {name: p.data_ptr() for name, p in first.params.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        state, _ = swept(first, batches[0])
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::_fused_adamw_") == len(rates)
    if donated:
        assert {name: p.data_ptr() for name, p in state.params.items()} == addresses
    else:
        assert_same(first, kept, exact=True)
    state, _ = swept(state, batches[1])
    for i, (lane, rate) in enumerate(zip(swept.export(state), rates, strict=True)):
        own = lm.guard()(step)
        alone = own.init(lm.TrainState.create(net, lm.optim.adamw(rate), seed=0))
        for batch in batches:
            alone, _ = own(alone, batch[i])
        assert_same(lane.params, alone.params, tolerance=1e-5)
        assert_same(lane.opt_state.mu, alone.opt_state.mu, tolerance=1e-5)
        assert int(lane.opt_state.count) == (1 if i == 1 else 2)


def test_sweep_of_weight_decay_given_as_a_tensor() -> None:
    job = Job()

    def start(decay: Any) -> lm.TrainState:
        tx = lm.optim.adamw(1e-2, weight_decay=decay)
        return lm.TrainState.create(job.module(), tx, seed=0)

    decays = [0.0, 0.1, 0.5]
    lanes = lanes_of(lm.sweep(weight_decay=decays), start(torch.tensor(0.01, dtype=torch.float64)), job)
    for lane, decay in zip(lanes, decays, strict=True):
        own, _ = train(job.step, start(decay), job.batches(3))
        assert_same(lane.params, own.params)


def test_sweep_of_seeds_reaches_explicit_keys() -> None:
    job = Job(optimizer="sgd")

    def step(state: lm.TrainState, batch: Any) -> tuple[lm.TrainState, dict[str, Any]]:
        noise = random.normal(state.key, (3,), torch.float64)
        params = {**state.params, "2.bias": state.params["2.bias"] + noise}
        return state.replace(params=params, step=state.step + 1), {}

    seeds = [3, 1, 4]
    swept = lm.sweep(seed=seeds)(step)
    state = swept.init(job.state())
    for _ in range(2):
        state, _ = swept(state, job.batch())
    for lane, seed in zip(swept.export(state), seeds, strict=True):
        own = job.state().replace(seed=torch.tensor(seed))
        for _ in range(2):
            own, _ = step(own, job.batch())
        assert_same(lane.params, own.params, exact=True)


def test_sweep_of_any_leaf_by_its_path() -> None:
    job = Job()
    swept = lm.sweep(**{"params[2.bias]": [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]})
    assert [lane.params["2.bias"].tolist() for lane in swept.export(swept.init(job.state()))] == [
        [0.0, 0.0, 0.0],
        [1.0, 2.0, 3.0],
    ]


def test_metrics_have_one_entry_for_each_lane() -> None:
    job = Job()
    step = lm.sweep(lr=[0.1, 0.01, 0.001])(job.step)
    _, metrics = step(step.init(job.state()), job.batch())
    assert metrics["loss"].compute().shape == (3,)


def test_a_mean_over_lanes_couples_them() -> None:
    job = Job(optimizer="sgd")

    def step(state: lm.TrainState, batch: Any) -> tuple[lm.TrainState, dict[str, Any]]:
        new, metrics = job.step(state, batch)
        return new.replace(params=lm.pmean(new.params, "lanes")), metrics

    step_of_all = lm.ensemble(3)(step)
    state, _ = step_of_all(step_of_all.init(starts(job, 3)), job.batch())
    own = [job.step(start, job.batch())[0].params for start in starts(job, 3)]
    mean = lm.tree.map(lambda *ps: torch.stack(ps).mean(0), *own)
    for lane in step_of_all.export(state):
        assert_same(lane.params, mean)


class _OldGelu(torch.autograd.Function):
    """A function in the form that vmap cannot map: its forward takes `ctx`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


@pytest.mark.parametrize(
    ("transform", "engine", "name"),
    [
        (lm.ensemble(2), "auto", r"lm\.ensemble"),
        (lm.dp_sgd(1.0, 0.0), "auto", r"lm\.dp_sgd\(clip=1\.0, noise=0\.0\) runs"),
        (lm.donate(), "func", 'engine="func"'),
    ],
)
def test_a_function_that_cannot_be_mapped_is_refused_by_name(transform: Any, engine: Any, name: str) -> None:
    def step(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            return _OldGelu.apply(state.apply(params, batch)[0]).mean()  # type: ignore[no-untyped-call]

        loss, grads = lm.value_and_grad(loss_fn, engine=engine)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    wrapped = transform(step)
    state = wrapped.init(lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1)))
    with pytest.raises(lm.errors.ParamsError, match=f"without setup_context.*{name}"):
        wrapped(state, torch.ones(3, 2))


def test_such_a_function_outside_of_a_loss_is_refused_by_name() -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"out": _OldGelu.apply(state.apply(state.params, batch)[0]).mean()}  # type: ignore[no-untyped-call]

    wrapped = lm.ensemble(2)(step)
    state = wrapped.init(lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1)))
    with pytest.raises(lm.errors.ParamsError, match=r"without setup_context.*lm\.ensemble"):
        wrapped(state, torch.ones(3, 2))
