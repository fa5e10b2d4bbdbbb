"""`lm.guard(spike=…)` skips the outliers of the published rule, and nothing else."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen.core.primitives import Gradient, UpdateCall
from lumen.optim import sgd
from lumen.transforms._support.spikes import SpikeCheck, SpikeWindow
from tests.tiers import pick

from .models import Job, assert_same, learned, train

WINDOW = 20


def published(series: list[tuple[float, float]], factor: float, window: int) -> list[bool]:
    """The steps that OLMo-core's `SkipStepOptimizer` would skip: its rule, in plain Python and float64."""
    skipped = []
    for index, values in enumerate(series):
        before = series[max(0, index - window) : index]
        enough = min(index, window) + 1 >= max(20, window // 2)
        skipped.append(
            enough
            and any(
                value - statistics.fmean(past) > factor * statistics.stdev(past)
                for value, past in zip(values, zip(*before, strict=True), strict=True)
            )
        )
    return skipped


def ours(series: list[tuple[float, float]], factor: float, window: int) -> list[bool]:
    """The same decisions by Lumen: the gradient is one number, which is its norm."""
    kept = SpikeWindow.empty(window, torch.device("cpu"))
    skipped = []
    for loss, norm in series:
        check = SpikeCheck(kept, factor)
        grads = {"w": torch.tensor(norm)}
        check.add(Gradient(torch.tensor(loss), grads))
        check.is_spike(UpdateCall(sgd(0.1), grads, None, grads), None, False)
        kept, is_spike, _ = check.result(None)
        skipped.append(bool(is_spike))
    return skipped


@settings(max_examples=pick(12, 100), deadline=None)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 90),
    window=st.sampled_from([20, 25, 48]),
    factor=st.sampled_from([1.0, 2.5, 6.0]),
    level=st.sampled_from([0.0, 3.0, 100.0]),
)
def test_the_steps_skipped_are_those_of_the_published_rule(
    seed: int, length: int, window: int, factor: float, level: float
) -> None:
    draws = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, 2, generator=draws)
    jumps = (torch.rand(length, 2, generator=draws) < 0.08) * torch.randn(length, 2, generator=draws).abs() * 30
    shift = (torch.arange(length)[:, None] > 60) * 9.0  # a lasting change of level
    series = [(level + a, level + abs(b) + 0.1) for a, b in (noise + jumps + shift).tolist()]
    series = [(float(torch.tensor(a)), float(torch.tensor(b))) for a, b in series]  # as float32 has them
    assert ours(series, factor, window) == published(series, factor, window)


JOB = Job(model="linear", optimizer="sgd", rows=4)
SPIKE = {"spike": 6.0, "window": WINDOW}


def run_of(count: int, at: dict[int, Any]) -> list[Any]:
    return [at.get(number, JOB.batch(number % 7)) for number in range(count)]


def spike_batch() -> Any:
    return lm.tree.map(lambda leaf: leaf * 1e3 if leaf.is_floating_point() and leaf.dim() > 1 else leaf, JOB.batch(3))


STACKS: dict[str, tuple[lm.Transform, ...]] = {
    "alone": (),
    "donate": (lm.donate(),),
    "accumulate": (lm.accumulate(2),),
    "clip": (lm.clip(1e9),),
}


@pytest.mark.parametrize("inside", STACKS)
def test_a_spike_is_left_out_bitwise_and_the_other_steps_are_the_same(inside: str) -> None:
    """The run equals one whose data never had the batch, except for the counter of steps."""
    data = run_of(30, {24: spike_batch()})
    step = lm.compose(lm.guard(**SPIKE), *STACKS[inside])(JOB.step)
    state, _ = train(step, step.init(JOB.state()), data)
    plain = lm.compose(lm.guard(), *STACKS[inside])(JOB.step)
    expected, _ = train(plain, plain.init(JOB.state()), [*data[:24], *data[25:]])
    assert_same(state.params, expected.params, exact=True)
    slot = state.slots["guard"]
    assert (int(slot.skipped), int(slot.spikes.spikes), int(slot.spikes.count)) == (1, 1, 30)


def test_there_is_no_verdict_before_the_window_is_filled_enough() -> None:
    step = lm.guard(**SPIKE)(JOB.step)
    for at, skipped in ((18, 0), (19, 1)):  # with its own, 19 and 20 values
        state, _ = train(step, step.init(JOB.state()), run_of(at + 1, {at: spike_batch()}))
        assert int(state.slots["guard"].skipped) == skipped


def test_what_is_not_finite_is_skipped_and_does_not_enter_the_window() -> None:
    bad = lm.tree.map(lambda leaf: leaf * math.nan if leaf.is_floating_point() else leaf, JOB.batch(3))
    step = lm.guard(**SPIKE)(JOB.step)
    state, _ = train(step, step.init(JOB.state()), run_of(26, {5: bad, 24: spike_batch()}))
    slot = state.slots["guard"]
    assert (int(slot.skipped), int(slot.spikes.spikes), int(slot.spikes.count)) == (2, 1, 25)
    assert bool(slot.spikes.values.isfinite().all())


def test_decisions_are_the_same_compiled_unrolled_and_in_lanes() -> None:
    data = run_of(26, {23: spike_batch()})
    step = lm.guard(**SPIKE)(JOB.step)
    expected, _ = train(step, step.init(JOB.state()), data)
    for outer in (lm.compile(backend="eager"), lm.unroll(13), lm.ensemble(2)):
        stacked = lm.compose(outer, lm.guard(**SPIKE))(JOB.step)
        batches = [lm.stack(data[:13]), lm.stack(data[13:])] if outer.name == "unroll" else data
        state, _ = train(stacked, stacked.init(JOB.state()), batches)
        assert state.slots["guard"].spikes.spikes.flatten().tolist() in ([1], [1, 1]), outer
        if outer.name == "ensemble":
            state = stacked.export(state)[0]
        assert_same(learned(state)["params"], learned(expected)["params"])


@pytest.mark.parametrize("outer", [(), (lm.unroll(2),), (lm.ensemble(2),)])
def test_raise_names_the_value_its_statistics_and_the_step(outer: tuple[lm.Transform, ...]) -> None:
    step = lm.compose(*outer, lm.guard("raise", **SPIKE))(JOB.step)
    data = run_of(24, {22: spike_batch()})
    if outer and outer[0].name == "unroll":
        data = [lm.stack(data[i : i + 2]) for i in range(0, 24, 2)]
    state, _ = train(step, step.init(JOB.state()), data[:-2] if len(data) == 24 else data[:-1])
    before = lm.guard("raise", **SPIKE)(JOB.step) if not outer else None
    with pytest.raises(lm.SpikeError) as caught:
        step(state, data[-2] if len(data) == 24 else data[-1])
    text = str(caught.value)
    assert all(part in text for part in ("the loss is", "at step 22", "spike=6.0"))
    if before is not None:
        mean, std = state.slots["guard"].spikes.statistics()
        assert f"mean {float(mean[0]):.6g}, standard deviation {float(std[0]):.6g}" in text


def test_a_dump_of_a_spike_is_replayed(tmp_path: Any) -> None:
    step = lm.guard("dump", tmp_path, **SPIKE)(JOB.step)
    state, _ = train(step, step.init(JOB.state()), run_of(22, {}))
    with pytest.raises(lm.SpikeError, match="lumen replay") as caught:
        step(state, spike_batch())
    with pytest.raises(lm.SpikeError) as again:
        lm.replay(tmp_path / "step-22", step, JOB.state())
    assert str(caught.value).startswith(str(again.value))


def test_a_resumed_run_decides_as_the_uninterrupted_one(tmp_path: Any) -> None:
    data = run_of(34, {25: spike_batch(), 31: spike_batch()})
    step = lm.guard(**SPIKE)(JOB.step)
    halfway, _ = train(step, step.init(JOB.state()), data[:27])
    lm.checkpoint.save(tmp_path / "a", halfway)
    resumed, _ = train(step, lm.checkpoint.restore(tmp_path / "a", step.init(JOB.state())), data[27:])
    expected, _ = train(step, step.init(JOB.state()), data)
    assert_same(dict(lm.tree.named_tensors(resumed)), dict(lm.tree.named_tensors(expected)), exact=True)


def test_the_norm_is_that_of_the_update_without_frozen_leaves() -> None:
    """Huge gradients of what the optimizer freezes are no outlier."""
    tx = lm.optim.freeze("bias", lm.optim.sgd(0.1))
    job = replace(JOB, optimizer="sgd")
    step = lm.guard(**SPIKE)(job.step)
    state = job.state()
    state = step.init(state.replace(tx=tx, opt_state=tx.init(state.params)))
    norms = []
    for batch in run_of(3, {}):
        grads = lm.value_and_grad(job.loss_fn(state), has_aux=True)(state.params, batch)[1]
        norms.append(float(lm.optim.global_norm({"weight": grads["weight"]})))
        state, _ = step(state, batch)
    assert state.slots["guard"].spikes.values[1, :3].tolist() == pytest.approx(norms, rel=1e-6)


def test_a_step_with_two_updates_is_refused() -> None:
    def step(state: Any, batch: Any) -> Any:
        for _ in range(2):
            state, metrics = JOB.step(state, batch)
        return state, metrics

    guarded = lm.guard(**SPIKE)(step)
    with pytest.raises(lm.LumenError, match="makes several updates"):
        guarded(guarded.init(JOB.state()), JOB.batch(0))


@pytest.mark.parametrize("outer", [lm.accumulate(2), lm.sam(0.1), lm.precision("bf16")])
def test_the_guard_must_be_outside_of_what_splits_or_scales(outer: lm.Transform) -> None:
    with pytest.raises(lm.LumenError, match=r"Write: lm.guard\('skip', spike=6.0, window=20\)"):
        lm.compose(outer, lm.guard(**SPIKE))
    lm.compose(outer, lm.guard())


def test_other_misuse_is_refused() -> None:
    with pytest.raises(lm.LumenError, match="privacy budget"):
        lm.compose(lm.guard(spike=6.0), lm.dp_sgd(1.0, 1.0))
    for wrong, match in (({"spike": 0.0}, "positive"), ({"spike": math.nan}, "positive"), ({"window": 19}, "20 at")):
        with pytest.raises(lm.LumenError, match=match):
            lm.guard(**{"spike": 6.0, **wrong})
    for made, run in ((lm.guard(), lm.guard(**SPIKE)), (lm.guard(**SPIKE), lm.guard(spike=6.0))):
        state = made(JOB.step).init(JOB.state())
        with pytest.raises(lm.LumenError, match="other settings"):
            run(JOB.step)(state, JOB.batch(0))
