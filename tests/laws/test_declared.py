"""Transforms that change the mathematics on purpose: each does what it declares, and nothing else."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen.transforms._guard import _FinitenessCheck

from .models import FORMS, STEADY, Job, assert_same, jobs, learned, train


def poisoned(job: Job, number: int = 0) -> Any:
    """The job's batch with a NaN in its first row."""
    x, y, mask = FORMS[job.form][1](job.batch(number))
    x = x.clone()
    x[0] = torch.nan
    return FORMS[job.form][0](x, y, mask)


def gradients(job: Job, state: lm.TrainState, batch: Any) -> dict[str, torch.Tensor]:
    return lm.value_and_grad(job.loss_fn(state), has_aux=True)(state.params, batch)[1]


# ------------------------------------------------------------------------------------------------ clip


@settings(max_examples=20)
@given(job=jobs(), bound=st.floats(1e-3, 10.0))
def test_clip_is_torchs_clip_grad_norm(job: Job, bound: float) -> None:
    state, batch = job.state(), job.batch()
    params = [torch.nn.Parameter(p) for p in state.params.values()]
    for p, g in zip(params, gradients(job, state, batch).values(), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, bound)
    by_hand = state.apply_gradients({k: p.grad for k, p in zip(state.params, params, strict=True)})
    new, _ = lm.clip(bound)(job.step)(state, batch)
    assert_same(new.params, by_hand.params, tolerance=1e-8)


@settings(max_examples=10)
@given(job=jobs(), bound=st.floats(1e-4, 1e-1))
def test_clip_value_cuts_every_entry(job: Job, bound: float) -> None:
    state, batch = job.state(), job.batch()
    cut = {k: g.clamp(-bound, bound) for k, g in gradients(job, state, batch).items()}
    new, _ = lm.clip(value=bound)(job.step)(state, batch)
    assert_same(new.params, state.apply_gradients(cut).params)


def test_clip_leaves_out_what_the_optimizer_freezes() -> None:
    """The update is that of a model whose frozen part has no gradient at all, whatever the frozen gradients are."""
    sgd = lm.optim.sgd(1.0)
    params = {"body.weight": torch.ones(3, dtype=torch.float64), "head.weight": torch.ones(2, dtype=torch.float64)}
    grads = {
        "body.weight": torch.tensor([torch.nan, 5.0, 5.0]).double(),
        "head.weight": torch.tensor([3.0, 4.0]).double(),
    }
    wanted = 1 - torch.tensor([0.6, 0.8], dtype=torch.float64) / (1 + 1e-6 / 5)
    finite = {name: g.nan_to_num(7.0) for name, g in grads.items()}
    cases = [
        (lm.optim.freeze("body.*", sgd), grads),
        (lm.optim.partition({"body.*": lm.optim.freeze()}, default=sgd), grads),
        (lm.optim.apply_if_finite(lm.optim.chain(lm.optim.freeze("body.*", sgd)), 10), finite),
    ]
    for tx, found in cases:

        def step(state: Any, batch: Any, tx: Any = tx) -> Any:
            moved, opt_state = lm.apply_gradients(tx, batch, state["opt"], state["params"])
            return {"params": moved, "opt": opt_state}, {}

        new, _ = lm.clip(1.0)(step)({"params": params, "opt": tx.init(params)}, found)
        assert torch.equal(new["params"]["body.weight"], params["body.weight"])
        torch.testing.assert_close(new["params"]["head.weight"], wanted, rtol=0, atol=1e-12)


def test_clip_bounds_the_whole_batch_not_each_part() -> None:
    job = Job(optimizer="sgd", rows=6)
    stack = lm.compose(lm.clip(0.05), lm.accumulate(3))
    assert_same(stack(job.step)(job.state(), job.batch()), lm.clip(0.05)(job.step)(job.state(), job.batch()))


# ------------------------------------------------------------------------------------------------ guard

FLOATING = tuple(name for name in STEADY if name != "tied")


@settings(max_examples=20)
@given(job=jobs(FLOATING, ("scalar", "mean"), rows=(2, 5)))
def test_guard_leaves_a_bad_step_out_bitwise(job: Job) -> None:
    step = lm.guard()(job.step)
    state, _ = train(step, step.init(job.state()), job.batches(2))
    new, _ = step(state, poisoned(job))
    kept = {**learned(new), "step": state.step}
    assert_same(kept, learned(state), exact=True)
    assert (int(state.slots["guard"].skipped), int(new.slots["guard"].skipped)) == (0, 1)


@pytest.mark.parametrize("stack", [(lm.donate(),), (lm.accumulate(2),), (lm.donate(), lm.accumulate(2))])
def test_guard_skips_under_other_transforms(stack: tuple[lm.Transform, ...]) -> None:
    job = Job(model="conv_bn_eval", rows=4)
    step = lm.compose(lm.guard(), *stack)(job.step)
    state = step.init(job.state())
    before = learned(lm.tree.map(torch.clone, state))
    new, _ = step(state, poisoned(job))
    assert_same({**learned(new), "step": before["step"]}, before, exact=True)


def test_guard_goes_on_after_a_bad_step() -> None:
    job = Job(optimizer="sgd")
    step = lm.guard()(job.step)
    state, _ = train(step, step.init(job.state()), [job.batch(0), poisoned(job), job.batch(1)])
    expected, _ = train(job.step, job.state(), [job.batch(0), job.batch(1)])
    assert_same(state.params, expected.params, exact=True)


@settings(max_examples=20)
@given(job=jobs(STEADY), bound=st.floats(1e-3, 10.0))
def test_guard_outside_clip_changes_nothing_and_takes_the_norms_once(job: Job, bound: float) -> None:
    step = lm.compose(lm.guard(), lm.clip(bound))(job.step)
    expected = lm.clip(bound)(job.step)(job.state(), job.batch())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumen.optim._clip.leaf_norms", None)  # clip has guard's
        new, metrics = step(step.init(job.state()), job.batch())
    assert_same((learned(new), metrics), (learned(expected[0]), expected[1]), exact=True)


@pytest.mark.parametrize("way", ["another tree", "another leaf", "in place"])
def test_clip_does_not_take_the_norms_of_other_grads(way: str) -> None:
    job = Job(optimizer="sgd")

    def step(state: lm.TrainState, batch: Any) -> tuple[lm.TrainState, dict[str, Any]]:
        (loss, _), grads = lm.value_and_grad(job.loss_fn(state), has_aux=True)(state.params, batch)
        if way == "another tree":
            grads = lm.tree.map(lambda g: 3 * g, grads)
        elif way == "another leaf":
            grads["0.weight"] = 3 * grads["0.weight"]
        else:
            grads["0.weight"].mul_(3)
        return state.apply_gradients(grads), {"loss": loss}

    guarded = lm.compose(lm.guard(), lm.clip(0.01))(step)
    new, _ = guarded(guarded.init(job.state()), job.batch())
    expected, _ = lm.clip(0.01)(step)(job.state(), job.batch())
    assert_same(new.params, expected.params, exact=True)


def test_guard_counts_a_norm_that_overflows_as_not_finite() -> None:
    """Each entry is finite in float32, but the sum of their squares is not: a bound by the norm would make them 0."""

    def step(state: lm.TrainState, batch: torch.Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
        _, grads = lm.value_and_grad(lambda params, x: (params["weight"] * x).sum())(state.params, batch)
        return state.apply_gradients(grads), {}

    state = lm.TrainState.create(torch.nn.Linear(2, 1, bias=False), lm.optim.sgd(1e-30))
    guarded = lm.guard()(step)
    new, _ = guarded(guarded.init(state), torch.full((1, 2), 1e20))
    assert int(new.slots["guard"].skipped) == 1
    new, _ = guarded(guarded.init(state), torch.full((1, 2), 1e18))
    assert int(new.slots["guard"].skipped) == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_guard_raises_naming_the_first_bad_leaf(compiled: bool) -> None:
    """A finite loss with an infinite slope: the square root at zero."""
    job = Job(model="linear")

    def step(state: lm.TrainState, batch: Any) -> tuple[lm.TrainState, dict[str, Any]]:
        def loss_fn(params: Any, batch: Any) -> torch.Tensor:
            return (params["bias"] * 0.0).sum().sqrt() + params["weight"].sum()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    stack = (lm.compile(backend="eager"), lm.guard("raise")) if compiled else (lm.guard("raise"),)
    guarded = lm.compose(*stack)(step)
    with pytest.raises(lm.NonFiniteError, match=r"params\['bias'\].*Linear.*step 0"):
        guarded(guarded.init(job.state()), job.batch())


def test_guard_raises_for_the_loss() -> None:
    job = Job()
    step = lm.guard("raise")(job.step)
    with pytest.raises(lm.NonFiniteError, match="the loss is not finite at step 0"):
        step(step.init(job.state()), poisoned(job))


@pytest.mark.parametrize("compiled", [False, True])
def test_guard_raises_for_any_step_of_an_unrolled_call(compiled: bool) -> None:
    job = Job()
    stack = (lm.unroll(2), lm.guard("raise"))
    step = lm.compose(*((lm.compile(backend="eager"), *stack) if compiled else stack))(job.step)
    with pytest.raises(lm.NonFiniteError):
        step(step.init(job.state()), lm.stack([poisoned(job), job.batch(1)]))


# -------------------------------------------------------------------------------------------------- ema


@settings(max_examples=10)
@given(job=jobs(), decay=st.floats(0.0, 0.99))
def test_ema_is_the_recurrence(job: Job, decay: float) -> None:
    step = lm.ema(decay)(job.step)
    state = step.init(job.state())
    average = dict(state.params)
    for batch in job.batches(4):
        state, _ = step(state, batch)
        average = {k: decay * average[k] + (1 - decay) * p for k, p in state.params.items()}
    # The decay is rounded to float32 in the slot's weight.
    assert_same(dict(lm.ema.params(state)), average, tolerance=1e-6)


@pytest.mark.parametrize("decay", [0.999, 0.9999999, np.float32(0.999)])
def test_ema_weighs_in_float64(decay: Any) -> None:
    """The weight is rounded once, to the dtype of a leaf: a decay near 1 keeps its digits."""
    step = lm.ema(decay)(lambda state, batch: (state.replace(params={"w": state.params["w"] + 1}), {}))
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    state = step.init(lm.TrainState.create(net, lm.optim.sgd(0.1)))
    average = 0.0
    for number in range(1, 6):
        state, _ = step(state, None)
        average += (1 - float(decay)) * (number - average)
    assert float(lm.ema.params(state)["w"]) == pytest.approx(average, rel=1e-13)


@settings(max_examples=40)
@given(
    decay=st.none() | st.floats(0.0, 1.0, exclude_max=True),
    warmup=st.booleans(),
    start=st.integers(0, 3),
    count=st.integers(-3, 10**6),
)
def test_ema_weighs_alike_on_the_host_and_on_a_device(
    decay: float | None, warmup: bool, start: int, count: int
) -> None:
    average = lm.ema(decay, warmup=warmup, start=start)
    on_device = average._weight(torch.tensor(count))
    assert torch.equal(on_device, torch.tensor(average._weight_on_host(count), dtype=torch.float64))


@settings(max_examples=6)
@given(job=jobs(FLOATING, ("scalar", "mean"), rows=(2, 5)))
def test_ema_and_guard_are_bitwise_the_same_where_numbers_are_read(job: Job) -> None:
    """On the CPU both read numbers, and `ema` works in place under `donate`; on a device they never wait for one."""
    batches = [job.batch(0), poisoned(job, 1), job.batch(2)]
    ends = []
    for reads in (True, False):
        with ExitStack() as patches:
            if not reads:
                patches.enter_context(patch("lumen.transforms._ema.readable_on_host", return_value=False))
                patches.enter_context(patch.object(_FinitenessCheck, "is_fine_on_host", return_value=False))
            for inner in ((), (lm.donate(),)):
                step = lm.compose(lm.guard(), lm.ema(0.9), *inner)(job.step)
                ends.append(train(step, step.init(job.state()), batches)[0])
    for other in ends[1:]:
        assert_same(learned(ends[0]), learned(other), exact=True)
        assert_same(ends[0].slots, other.slots, exact=True)


def test_ema_under_donate_keeps_its_memory() -> None:
    job = Job()
    step = lm.compose(lm.ema(0.9), lm.donate())(job.step)
    state = step.init(job.state())
    kept = {name: value.clone() for name, value in lm.ema.params(state).items()}
    addresses = [leaf.data_ptr() for leaf in lm.tree.leaves(state.slots["ema"])]
    state, _ = step(state, job.batch())
    assert [leaf.data_ptr() for leaf in lm.tree.leaves(state.slots["ema"])] == addresses
    assert not torch.equal(kept["0.weight"], lm.ema.params(state)["0.weight"])


def test_ema_without_decay_is_the_mean_of_all_params() -> None:
    job = Job()
    step = lm.ema(None)(job.step)
    state = step.init(job.state())
    seen = []
    for batch in job.batches(5):
        state, _ = step(state, batch)
        seen.append(state.params)
    mean = lm.tree.map(lambda *ps: torch.stack(ps).mean(0), *seen)
    assert_same(lm.ema.params(state), mean, tolerance=1e-6)


def test_ema_follows_the_params_until_start() -> None:
    job = Job()
    step = lm.ema(0.9, start=3)(job.step)
    state, _ = train(step, step.init(job.state()), job.batches(3))
    assert_same(lm.ema.params(state), state.params, exact=True)
    later, _ = step(state, job.batch())
    assert not torch.equal(lm.ema.params(later)["0.weight"], later.params["0.weight"])


def test_ema_warmup_bounds_the_decay() -> None:
    job = Job()
    step = lm.ema(0.999, warmup=True)(job.step)
    before = step.init(job.state())
    state, _ = step(before, job.batch())
    by_hand = lm.tree.map(lambda a, p: a * 2 / 11 + p * 9 / 11, before.params, state.params)
    assert_same(lm.ema.params(state), by_hand, tolerance=1e-6)


# -------------------------------------------------------------------------------------------- precision


def single(values: Any) -> Any:
    """The same tree in float32."""
    return lm.tree.map(lambda x: x.float() if x.is_floating_point() else x, values)


@settings(max_examples=15)
@given(job=jobs(STEADY))
def test_bf16_is_near(job: Job) -> None:
    job = replace(job, optimizer="sgd")
    state, batch = single(job.state()), single(job.batch())
    step = lm.precision("bf16")(job.step)
    new, metrics = step(step.init(state), batch)
    expected, numbers = job.step(state, batch)
    assert_same(new.params, expected.params, tolerance=0.05)
    loss, exact = (m["loss"].compute() if job.loss != "scalar" else m["loss"] for m in (metrics, numbers))
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)


def test_bf16_really_computes_in_bf16() -> None:
    seen: list[torch.dtype] = []

    class Spy(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend((x.dtype, self.weight.dtype))
            return super().forward(x)

    step = lm.precision("bf16", cast="model")(lambda state, x: (state, {"out": state.apply(state.params, x)[0]}))
    state = step.init(lm.TrainState.create(Spy(2, 1), lm.optim.sgd(0.1)))
    _, metrics = step(state, torch.ones(1, 2))
    assert set(seen) == {torch.bfloat16}
    assert metrics["out"].dtype == torch.float32


def test_batchnorm_stays_wide() -> None:
    job = Job(model="conv_bn_train")
    step = lm.precision("bf16")(job.step)
    new, _ = step(step.init(single(job.state())), single(job.batch()))
    assert {b.dtype for b in new.buffers.values()} == {torch.float32, torch.int64}


@settings(max_examples=8)
@given(job=jobs(STEADY))
def test_fp32_is_fp32(job: Job) -> None:
    """On a float32 model the policy changes nothing."""
    state, batch = single(job.state()), single(job.batch())
    step = lm.precision("fp32")(job.step)
    assert_same(step(step.init(state), batch), job.step(state, batch), exact=True)


def test_fp64_takes_batchnorms_buffers_along() -> None:
    job = Job(model="conv_bn_train")
    step = lm.precision("fp64")(job.step)
    new, _ = step(step.init(single(job.state())), job.batch())
    assert {leaf.dtype for leaf in lm.tree.leaves((new.params, new.buffers))} == {torch.float64, torch.int64}


def test_frozen_params_are_cast_for_the_model_and_kept_exactly() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    net[0].requires_grad_(False)

    def step(state: lm.TrainState, x: torch.Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
        def loss_fn(params: Any, x: torch.Tensor) -> Any:
            out, buffers = state.apply(params, x)
            return lm.Mean.of(out), lm.Aux(buffers=buffers)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, x)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}

    half = lm.precision("bf16")(step)
    state = half.init(lm.TrainState.create(net, lm.optim.sgd(0.1)))
    new, _ = half(state, torch.randn(4, 3))
    assert_same(new.buffers, {"0.weight": net[0].weight.detach(), "0.bias": net[0].bias.detach()}, exact=True)


HALF = lm.Policy(None, torch.float64, torch.float64, loss_scale=2.0**10, growth_interval=2)


def scale_of(state: lm.TrainState) -> float:
    return float(state.slots["precision"].scale)


@settings(max_examples=8)
@given(job=jobs(FLOATING, ("scalar", "mean")))
def test_loss_scaling_by_a_power_of_two_changes_nothing(job: Job) -> None:
    step = lm.precision(HALF)(job.step)
    new, metrics = step(step.init(job.state()), job.batch())
    expected, numbers = job.step(job.state(), job.batch())
    assert_same((learned(new), metrics), (learned(expected), numbers))


def test_loss_scale_halves_and_skips_on_overflow_and_grows_after_good_steps() -> None:
    job = Job()
    step = lm.precision(HALF)(job.step)
    state = step.init(job.state())
    bad, _ = step(state, poisoned(job))
    assert scale_of(bad) == 2.0**9
    assert_same({**learned(bad), "step": state.step}, learned(state), exact=True)
    once, _ = step(bad, job.batch(0))
    assert scale_of(once) == 2.0**9
    twice, _ = step(once, job.batch(1))
    assert scale_of(twice) == 2.0**10


def test_fp16_finds_a_scale_that_holds() -> None:
    """A loss of 1e4 overflows at 2**16 and is trained once the scale has come down."""
    net = torch.nn.Linear(2, 1)

    def step(state: lm.TrainState, x: torch.Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
        def loss_fn(params: Any, x: torch.Tensor) -> torch.Tensor:
            return state.apply(params, x)[0].mean() * 100.0

        _, grads = lm.value_and_grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads), {"grad": grads["bias"]}

    half = lm.precision("fp16")(step)
    state = half.init(lm.TrainState.create(net, lm.optim.sgd(1e-4)))
    start = state.params["bias"]
    for _ in range(12):
        state, metrics = half(state, torch.ones(4, 2))
    assert scale_of(state) < 2.0**10
    torch.testing.assert_close(metrics["grad"], torch.tensor([100.0]), rtol=1e-2, atol=0)
    assert not torch.equal(state.params["bias"], start)


def test_guard_outside_loss_scaling_sees_what_no_scale_can_mend() -> None:
    job = Job()
    policy = replace(HALF, loss_scale=1.0)
    step = lm.compose(lm.guard("raise"), lm.precision(policy))(job.step)
    with pytest.raises(lm.NonFiniteError):
        step(step.init(job.state()), poisoned(job))


# ---------------------------------------------------------------------------------------------- private


def by_rows(job: Job, state: lm.TrainState, batch: Any, bound: float) -> dict[str, torch.Tensor]:
    """The mean of the clipped gradients of all rows, one after the other."""
    x, y, mask = FORMS[job.form][1](batch)
    total = {k: torch.zeros_like(p) for k, p in state.params.items()}
    for i in range(len(x)):
        row = FORMS[job.form][0](x[i : i + 1], y[i : i + 1], mask[i : i + 1])
        grads = gradients(job, state, row)
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        total = {k: total[k] + g * min(1.0, bound / float(norm)) for k, g in grads.items()}
    return {k: t / len(x) for k, t in total.items()}


@settings(max_examples=20)
@given(job=jobs(losses=("scalar", "mean")), bound=st.floats(1e-2, 3.0), parts=st.integers(1, 3))
def test_private_without_noise_is_the_loop_over_rows(job: Job, bound: float, parts: int) -> None:
    job = replace(job, optimizer="sgd")
    stack = [lm.dp_sgd(clip=bound, noise=0.0)]
    if 1 < parts <= job.rows:
        stack.insert(0, lm.accumulate(parts))
    step = lm.compose(*stack)(job.step)
    new, _ = step(step.init(job.state()), job.batch())
    state = job.state()
    expected = state.apply_gradients(by_rows(job, state, job.batch(), bound))
    assert_same(new.params, expected.params)


def test_private_reports_the_unclipped_loss() -> None:
    job = Job(rows=5)
    step = lm.dp_sgd(clip=1e-3, noise=0.0)(job.step)
    _, metrics = step(step.init(job.state()), job.batch())
    _, expected = job.step(job.state(), job.batch())
    assert_same(lm.compute_metrics(metrics), lm.compute_metrics(expected))


@pytest.mark.parametrize("parts", [1, 4])
def test_private_noise_is_that_of_one_update(parts: int) -> None:
    """However many parts there are, noise of deviation noise·clip is added to the sum once."""
    net = torch.nn.Linear(400, 50, bias=False).double()

    def step(state: lm.TrainState, x: torch.Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
        loss, grads = lm.value_and_grad(lambda p, x: lm.Mean.of(state.apply(p, x)[0] * 0.0))(state.params, x)
        return state.apply_gradients(grads), {"loss": loss}

    noisy = lm.compose(lm.accumulate(parts), lm.dp_sgd(clip=0.5, noise=2.0))(step)
    state = noisy.init(lm.TrainState.create(net, lm.optim.sgd(1.0)))
    new, _ = noisy(state, torch.randn(8, 400, dtype=torch.float64))
    moved = new.params["weight"] - state.params["weight"]
    assert moved.std().item() == pytest.approx(2.0 * 0.5 / 8, rel=0.02)
    assert abs(moved.mean().item()) < 4 * (2.0 * 0.5 / 8) / 20_000**0.5
    assert int(new.slots["dp_sgd"]) == 1


@pytest.mark.parametrize("parts", [1, 3])
def test_private_divides_by_the_expected_size(parts: int) -> None:
    """Whatever the number of rows that were drawn, so that the update says of it only what the noise hides."""
    job = Job(rows=6, loss="scalar", optimizer="sgd")
    moved = {}
    for size in (None, 6, 12):
        private = lm.dp_sgd(clip=0.1, noise=0.0, batch_size=size)
        step = lm.compose(*[lm.accumulate(parts)] * (parts > 1), private)(job.step)
        new, _ = step(step.init(job.state()), job.batch())
        moved[size] = lm.tree.map(lambda a, b: a - b, new.params, job.state().params)
    assert_same(moved[6], moved[None])
    assert_same(lm.tree.map(lambda x: x * 2, moved[12]), moved[None])
    noisy = lm.dp_sgd(clip=1.0, noise=3.0, batch_size=100)(lambda s, x: (s.apply_gradients(zeros(s, x)), {}))
    net = torch.nn.Linear(400, 50, bias=False).double()
    state = noisy.init(lm.TrainState.create(net, lm.optim.sgd(1.0)))
    new, _ = noisy(state, torch.randn(8, 400, dtype=torch.float64))
    assert (new.params["weight"] - state.params["weight"]).std().item() == pytest.approx(0.03, rel=0.02)


def zeros(state: lm.TrainState, x: torch.Tensor) -> Any:
    return lm.value_and_grad(lambda p, x: lm.Mean.of(state.apply(p, x)[0] * 0.0))(state.params, x)[1]


def test_private_noise_is_a_function_of_seed_and_step() -> None:
    job = Job()
    step = lm.dp_sgd(clip=1.0, noise=1.0)(job.step)
    state = step.init(job.state())
    one, _ = step(state, job.batch())
    assert_same(step(state, job.batch())[0], one, exact=True)
    other, _ = step(state.replace(seed=state.seed + 1), job.batch())
    assert not torch.equal(other.params["0.weight"], one.params["0.weight"])
    later, _ = step(state.replace(step=state.step + 1), job.batch())
    assert not torch.equal(later.params["0.weight"], one.params["0.weight"])


def test_private_in_chunks_is_private() -> None:
    job = Job(rows=7)
    whole, chunked = (lm.dp_sgd(clip=0.1, noise=0.0, chunk=c)(job.step) for c in (None, 3))
    assert_same(chunked(chunked.init(job.state()), job.batch()), whole(whole.init(job.state()), job.batch()))


# ----------------------------------------------------------------------------------------------- seeded


def test_seeded_makes_dropout_a_function_of_the_state() -> None:
    job = Job(model="dropout", rows=6)
    step = lm.seeded()(job.step)
    state = job.state()
    torch.manual_seed(1)
    one = step(state, job.batch())
    torch.manual_seed(2)
    assert_same(step(state, job.batch()), one, exact=True)
    lm.check_purity(step, state, job.batch())


def test_seeded_draws_anew_for_each_step_and_seed() -> None:
    job = Job(model="dropout", rows=6)
    step = lm.seeded()(job.step)
    state = job.state()
    loss, later, other = (
        step(s, job.batch())[1]["loss"].compute()
        for s in (state, state.replace(step=state.step + 1), state.replace(seed=state.seed + 1))
    )
    assert len({float(loss), float(later), float(other)}) == 3


def test_seeded_leaves_the_generator_as_it_was() -> None:
    job = Job(model="dropout")
    before = torch.get_rng_state()
    lm.seeded()(job.step)(job.state(), job.batch())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "inner", [lm.remat(torch.nn.Dropout), lm.guard(), lm.donate(), lm.ema(0.9)], ids=lambda t: t.name
)
def test_dropout_draws_are_kept(inner: lm.Transform) -> None:
    job = Job(model="dropout", rows=6)
    step = lm.compose(lm.seeded(), inner)(job.step)
    new, metrics = train(step, step.init(job.state()), job.batches(3))
    expected, numbers = train(lm.seeded()(job.step), job.state(), job.batches(3))
    assert_same((learned(new), metrics), (learned(expected), numbers), exact=True)


@pytest.mark.parametrize("around", [[], [lm.accumulate(2)], [lm.guard("raise"), lm.accumulate(2)]], ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_an_empty_batch_of_dp_sgd_is_the_noise_alone(around: list[lm.Transform], noise: float) -> None:
    net = torch.nn.Linear(2, 1)
    net.register_buffer("seen", torch.zeros(()))

    def step(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            out, buffers = state.apply(params, batch)
            return out.square().mean(), lm.Aux(buffers, {"rows": lm.Sum.of(torch.ones(len(batch)))})

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, **aux.metrics}

    wrapped = lm.compose(*around, lm.dp_sgd(1.0, noise, batch_size=4))(step)
    before = wrapped.init(lm.TrainState.create(net, lm.optim.sgd(1.0)))
    after, metrics = wrapped(before, torch.ones(0, 2))
    moved = torch.cat([(after.params[name] - p).flatten() for name, p in before.params.items()])
    assert bool((moved != 0).all()) == bool(noise)
    assert moved.isfinite().all()
    assert float(lm.compute_metrics(metrics)["loss"]) == 0.0
    assert int(lm.compute_metrics(metrics)["rows"]) == 0
    assert int(after.slots["dp_sgd"]) == 1
