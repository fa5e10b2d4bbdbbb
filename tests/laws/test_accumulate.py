"""`accumulate`: the gradient of a whole batch from uneven microbatches, exactly."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lumen as lm
from lumen.core import rules
from lumen.core.rules import Primitive
from lumen.core.step import Transform

from .models import STEADY, Job, assert_same, jobs, learned, train


@settings(max_examples=40)
@given(job=jobs(rows=(1, 11)), data=st.data())
def test_any_number_of_parts(job: Job, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, job.rows + 3))  # an epoch's last batch may have fewer rows
    state, metrics = lm.accumulate(k)(job.step)(job.state(), job.batch())
    expected, numbers = job.step(job.state(), job.batch())
    assert_same((learned(state), metrics), (learned(expected), numbers))


@settings(max_examples=40)
@given(job=jobs(rows=(1, 11)), size=st.integers(1, 13))
def test_any_size_of_part(job: Job, size: int) -> None:
    state, metrics = lm.accumulate(microbatch=size)(job.step)(job.state(), job.batch())
    expected, numbers = job.step(job.state(), job.batch())
    assert_same((learned(state), metrics), (learned(expected), numbers))


@settings(max_examples=40)
@given(job=jobs(rows=(2, 11)), data=st.data())
def test_sums_in_one_buffer_are_bitwise_those_of_separate_gradients(job: Job, data: st.DataObject) -> None:
    """A rule inside, even one that does nothing, is to see each microbatch's gradient by itself."""
    k = data.draw(st.integers(1, job.rows))
    apart = rules.with_rules({Primitive.GRADIENT: lambda next, call: next(call)}, job.step)
    found, expected = (lm.accumulate(k)(step)(job.state(), job.batch()) for step in (job.step, apart))
    assert_same(found, expected, exact=True)


def test_a_rule_inside_sees_each_microbatch_alone() -> None:
    seen: list[torch.Tensor] = []

    def doubled(next: Any, call: Any) -> Any:
        answer = next(call)
        seen.append(answer.grads["w"])
        return answer.replace(grads=lm.tree.map(lambda g: 2 * g, answer.grads))

    def step(params: Any, batch: torch.Tensor) -> tuple[Any, Any]:
        return params, lm.value_and_grad(lambda params, x: (params["w"] * x).mean())(params, batch)[1]

    params, batch = {"w": torch.tensor(1.0)}, torch.tensor([1.0, 2.0, 4.0])
    _, grads = lm.accumulate(3)(rules.with_rules({Primitive.GRADIENT: doubled}, step))(params, batch)
    assert [g.item() for g in seen] == [1.0, 2.0, 4.0]
    torch.testing.assert_close(grads["w"], torch.tensor(14.0 / 3))


@pytest.mark.parametrize("engine", ["auto", "func"])
def test_one_gradient_for_two_leaves_and_none_for_a_third(engine: Any) -> None:
    """What autograd hands out twice is summed twice, in memory of its own; a leaf without a gradient has zeros."""

    def step(params: Any, batch: torch.Tensor) -> tuple[Any, Any]:
        loss_fn = lambda params, x: ((params["a"] + params["b"]) * x).sum(-1).mean()  # noqa: E731
        return params, lm.value_and_grad(loss_fn, engine=engine)(params, batch)[1]

    params = {name: torch.ones(2) for name in ("a", "b", "unused")}
    batch = torch.arange(6.0).reshape(3, 2)
    for k in (1, 3):
        _, grads = lm.accumulate(k)(step)(params, batch)
        assert_same(grads, step(params, batch)[1])
        assert len({g.data_ptr() for g in grads.values()}) == 3
        assert all(p.grad is None for p in params.values())


def test_parts_without_a_counted_row() -> None:
    """A masked loss whose first microbatch counts nothing: a mean of means would be NaN."""
    job = Job(loss="masked", form="tuple", rows=6)
    x, y, _ = job.batch()
    batch = (x, y, torch.tensor([False, False, False, True, False, True]))
    state, metrics = lm.accumulate(3)(job.step)(job.state(), batch)
    expected, numbers = job.step(job.state(), batch)
    assert_same((learned(state), metrics), (learned(expected), numbers))


@given(job=jobs(STEADY, rows=(3, 8)))
@settings(max_examples=10)
def test_one_part_is_the_step_itself(job: Job) -> None:
    assert_same(lm.accumulate(1)(job.step)(job.state(), job.batch()), job.step(job.state(), job.batch()))


def test_batchnorm_statistics_are_the_mean_of_the_parts_by_rows() -> None:
    job = Job(model="conv_bn_train", form="tuple", rows=7)
    state = job.state()
    x, _, _ = job.batch()
    new, _ = lm.accumulate(3)(job.step)(state, job.batch())
    parts = [(state.apply(state.params, part)[1], len(part)) for part in torch.tensor_split(x, 3)]
    for name in ("1.running_mean", "1.running_var"):
        by_hand = sum(buffers[name] * rows for buffers, rows in parts) / len(x)
        torch.testing.assert_close(new.buffers[name], by_hand, rtol=1e-12, atol=1e-12)
    assert int(new.buffers["1.num_batches_tracked"]) == 1


def test_batchnorm_gradient_is_the_mean_of_the_parts_by_rows() -> None:
    job = Job(model="conv_bn_train", form="tuple", rows=7, loss="scalar", optimizer="sgd")
    state = job.state()
    x, y, mask = job.batch()
    new, _ = lm.accumulate(2)(job.step)(state, (x, y, mask))
    cut = [(x[:4], y[:4], mask[:4]), (x[4:], y[4:], mask[4:])]
    grads = [lm.value_and_grad(job.loss_fn(state), has_aux=True)(state.params, part)[1] for part in cut]
    mean = lm.tree.map(lambda a, b: (4 * a + 3 * b) / 7, *grads)
    assert_same(new.params, state.apply_gradients(mean).params)


@settings(max_examples=10)
@given(rows=st.integers(3, 8))
def test_an_inner_gradient_sees_its_own_microbatch(rows: int) -> None:
    """A gradient penalty per row: the inner `value_and_grad` belongs to the loss, and is not split."""
    job = Job(form="tuple", rows=rows, optimizer="sgd")
    state, (x, y, mask) = job.state(), job.batch()

    def step(state: lm.TrainState, batch: tuple[torch.Tensor, ...]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
        def loss_fn(params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, ...]) -> lm.Mean:
            def total(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
                return state.apply(params, x)[0].square().sum()

            _, slope = lm.value_and_grad(total)(batch[0], batch[0])
            return lm.Mean.of(slope.square().sum(-1))

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    assert_same(lm.accumulate(3)(step)(state, (x, y, mask)), step(state, (x, y, mask)))


def test_two_gradients_in_one_step() -> None:
    """Alternating updates of one state: each gradient call is split, none is counted twice."""
    job = Job(optimizer="sgd", rows=5)

    def step(state: lm.TrainState, batch: object) -> tuple[lm.TrainState, dict[str, object]]:
        state, first = job.step(state, batch)
        state, second = job.step(state, batch)
        return state, {"first": first["loss"], "second": second["loss"]}

    assert_same(lm.accumulate(2)(step)(job.state(), job.batch()), step(job.state(), job.batch()))


def test_a_step_of_several_batches_trains_as_without() -> None:
    job = Job(model="attention", loss="masked", rows=7)
    assert_same(
        train(lm.accumulate(4)(job.step), job.state(), job.batches(5)),
        train(job.step, job.state(), job.batches(5)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_grads_are_summed_wide(dtype: torch.dtype) -> None:
    """1,000 rows of gradient 1: a 16-bit sum of microbatches would stop at 256 or 2,048."""

    def step(state: lm.TrainState, batch: torch.Tensor) -> tuple[lm.TrainState, dict[str, object]]:
        def loss_fn(params: dict[str, torch.Tensor], batch: torch.Tensor) -> lm.Mean:
            out, _ = state.apply(params, batch)
            return lm.Mean.of(out)

        _, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"grad": lm.Last(grads["weight"])}

    state = lm.TrainState.create(nn.Linear(1, 1, bias=False).to(dtype), lm.optim.sgd(0.1))
    _, metrics = lm.accumulate(microbatch=1)(step)(state, torch.ones(4000, 1, dtype=dtype))
    assert metrics["grad"].compute().item() == 1.0


class watched(Transform):  # noqa: N801
    """Notes, as each gradient is begun, how many tensors of those before it are still held."""

    name = "watched"

    def __init__(self) -> None:
        self.given: list[weakref.ref[torch.Tensor]] = []
        self.held: list[int] = []

    def wrap(self, step: Any) -> Any:
        def rule(next: Any, call: Any) -> Any:
            self.held.append(sum(ref() is not None for ref in self.given))
            answer = next(call)
            self.given[:] = [weakref.ref(g) for g in answer.grads.values()]
            return answer

        return rules.with_rules({Primitive.GRADIENT: rule}, step)


def test_a_part_is_let_go_once_it_is_added() -> None:
    def step(state: Any, x: torch.Tensor) -> Any:
        loss, grads = lm.value_and_grad(lambda p, x: (x @ p["w"]).square().mean())(state, x)
        return grads, {"loss": loss}

    inner = watched()
    lm.compose(lm.accumulate(4), inner)(step)({"w": torch.ones(3)}, torch.randn(8, 3))
    assert inner.held == [0, 1, 0, 0]  # the first part is what the second is added to
