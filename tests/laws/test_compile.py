"""`compile`: the same numbers from one region, traced anew exactly when it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import lumen as lm
from lumen.transforms._support.recorded_views import relax_views
from tests.tiers import pick

from .models import STEADY, Job, assert_same, jobs, train

SCALE = 1.0
aten = torch.ops.aten


def traced(*inner: lm.Transform) -> Any:
    return lm.compose(lm.compile(backend="eager"), *inner)


@settings(max_examples=12)
@given(job=jobs(STEADY))
def test_the_traced_step_is_the_step(job: Job) -> None:
    fast = traced()(job.step)
    assert_same(train(fast, job.state(), job.batches(2)), train(job.step, job.state(), job.batches(2)))


@pytest.mark.parametrize(("model", "loss"), [("conv_bn_train", "scalar"), ("attention", "masked")])
def test_the_compiled_step_is_the_step(model: str, loss: str) -> None:
    job = Job(model=model, loss=loss, optimizer="sgd")
    assert_same(
        train(lm.compile()(job.step), job.state(), job.batches(2)),
        train(job.step, job.state(), job.batches(2)),
    )


def test_a_compiled_stack_is_the_step() -> None:
    job = Job(model="linear", loss="masked", rows=4)
    stack = (lm.unroll(2), lm.guard("raise"), lm.clip(1e9), lm.ema(0.9), lm.donate(), lm.accumulate(2))
    fast = lm.compose(lm.compile(), *stack)(job.step)
    state = fast.init(job.state())
    before = [t.data_ptr() for t in lm.tree.leaves(state)]
    state, metrics = train(fast, state, [lm.stack(job.batches(2))])
    assert [t.data_ptr() for t in lm.tree.leaves(state)] == before, "donated memory is written again"
    assert_same((fast.export(state), metrics), train(job.step, job.state(), job.batches(2)))


def counted(job: Job) -> tuple[Any, list[int]]:
    """The job's step, and a list that grows each time its Python runs."""
    runs: list[int] = []

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        runs.append(1)
        return job.step(state, batch)

    return step, runs


def test_python_runs_once_for_each_signature() -> None:
    job = Job()
    step, runs = counted(job)
    fast = traced()(step)
    state, _ = train(fast, job.state(), job.batches(4))
    assert len(runs) == 1
    state, _ = fast(state, job.batch(rows=3))
    assert len(runs) == 2
    fast(state, job.batch(rows=job.rows))
    assert len(runs) == 2


def test_a_changed_learning_rate_is_no_new_signature() -> None:
    job = Job(optimizer="sgd")
    step, runs = counted(job)
    fast = traced()(step)
    state = job.state()
    fast(state, job.batch())
    slower = state.replace(opt_state=state.opt_state.replace(hparams={"lr": torch.zeros((), dtype=torch.float64)}))
    new, _ = fast(slower, job.batch())
    assert len(runs) == 1
    assert_same(new.params, state.params, exact=True)


def test_a_run_is_traced_once_and_once_more_for_its_last_batch() -> None:
    """Whatever changes from step to step: a schedule's learning rate, the step, the loss scale, a skipped update."""
    runs: list[int] = []

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        runs.append(1)

        def loss_fn(params: Any, batch: Any) -> Any:
            return (state.apply(params, batch)[0] * 2.0**-8).square().mean()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    fast = traced(lm.guard(), lm.donate(), lm.precision("fp16"))(step)
    tx = lm.optim.sgd(lm.optim.cosine(0.1, steps=10))
    state = fast.init(lm.TrainState.create(nn.Linear(3, 2), tx, seed=0))
    scales, data = set(), torch.ones(4, 3)
    for number in range(6):
        state, _ = fast(state, data * 1e5 if number == 2 else data)  # an overflow, after which the scale is less
        scales.add(float(state.slots["precision"].scale))
    assert len(scales) > 1
    assert len(runs) == 1
    for rows in (2, 4, 2):
        state, _ = fast(state, data[:rows])
    assert len(runs) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_of_padded_batches_is_traced_once_and_is_the_run_of_the_smaller_ones(optimizer: str) -> None:
    """Whatever an epoch ends with: repeated rows count nothing, neither in the gradient nor in a metric."""
    runs: list[int] = []

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        runs.append(1)

        def loss_fn(params: Any, batch: Any) -> Any:
            out, _ = state.apply(params, batch["x"])
            return lm.Mean.of((out[:, 0] - batch["y"]).square(), batch.get("weight"))

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    net = nn.Linear(3, 1).double()
    tx = {"adamw": lm.optim.adamw(1e-2), "sgd": lm.optim.sgd(0.1)}[optimizer]
    data = {"x": torch.randn(10, 3).double(), "y": torch.randn(10).double()}
    found, expected = (
        train(each, each.init(lm.TrainState.create(net, tx, seed=0)), [*2 * [*lm.Loader(data, 4, pad=pad)]])
        for each, pad in ((traced(lm.guard())(step), True), (lm.guard()(step), False))
    )
    assert len(runs) == 1 + 6
    assert_same(found, expected)


def scaled(job: Job, read: Any) -> Any:
    """A step whose metric depends on a Python value."""

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        return state, {"scaled": state.params["0.bias"].sum() * read()}

    return step


def test_a_changed_global_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job()
    fast = traced()(scaled(job, lambda: SCALE))
    _, one = fast(job.state(), job.batch())
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    _, three = fast(job.state(), job.batch())
    torch.testing.assert_close(three["scaled"], 3 * one["scaled"])


def test_a_changed_closure_value_is_seen() -> None:
    job = Job()
    scale = 1.0

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        return state, {"scaled": state.params["0.bias"].sum() * scale}

    fast = traced()(step)
    _, one = fast(job.state(), job.batch())
    scale = 3.0
    _, three = fast(job.state(), job.batch())
    torch.testing.assert_close(three["scaled"], 3 * one["scaled"])


def test_a_global_with_the_name_of_an_attribute_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, where `state, metrics = fast(state, batch)` makes new globals at each step."""
    calls: list[int] = []

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        calls.append(1)
        return state, {"sum": state.params["0.bias"].sum()}

    job = Job()
    held = [{}, {}, {}]  # alive together, so that each is another object
    monkeypatch.setitem(globals(), "params", held[0])
    fast, state = traced()(step), job.state()
    for each in held:
        monkeypatch.setitem(globals(), "params", each)
        fast(state, job.batch())
    assert len(calls) == 1


def test_evaluation_mode_is_another_signature() -> None:
    job = Job(model="conv_bn_train", loss="scalar")

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        loss, _ = job.loss_fn(state)(state.params, batch)
        return state, {"loss": loss}

    fast = traced()(step)
    for state in (job.state(), job.state().eval(), job.state()):
        torch.testing.assert_close(fast(state, job.batch())[1]["loss"], step(state, job.batch())[1]["loss"])


def test_an_item_breaks_the_graph_once_and_is_right() -> None:
    job = Job()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        new, metrics = job.step(state, batch)
        size = float(metrics["loss"].compute().item())  # the line to be named
        return new, {**metrics, "seen": size}

    line = step.__code__.co_firstlineno + 2
    fast = lm.compile()(step)
    with pytest.warns(lm.GraphBreakWarning) as caught:
        first = fast(job.state(), job.batch())
    assert len(caught) == 1
    assert f"{__file__}:{line}" in str(caught[0].message)
    assert_same(first, step(job.state(), job.batch()), exact=True)
    second = fast(job.state(), job.batch(1))  # a second warning would be an error here
    assert_same(second, step(job.state(), job.batch(1)), exact=True)


@pytest.mark.parametrize("inner", [(lm.donate(),), (lm.guard(), lm.ema(0.9), lm.donate(), lm.accumulate(2))])
def test_a_broken_graph_still_runs_all_transforms(inner: tuple[lm.Transform, ...]) -> None:
    job = Job()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        new, metrics = job.step(state, batch)
        return new, {**metrics, "seen": float(metrics["loss"].compute())}

    fast = traced(*inner)(step)
    with pytest.warns(lm.GraphBreakWarning):
        state, _ = fast(fast.init(job.state()), job.batch())
    assert_same(fast.export(state), job.step(job.state(), job.batch())[0])


@pytest.mark.parametrize("backend", pick(["eager"], ["eager", "inductor"]))
def test_donated_memory_is_written_again(backend: str) -> None:
    job = Job(rows=4)
    fast = lm.compose(lm.compile(backend=backend), lm.donate())(job.step)
    state = fast.init(job.state())
    before = [t.data_ptr() for t in lm.tree.leaves(state)]
    new, _ = train(fast, state, job.batches(2))
    assert [t.data_ptr() for t in lm.tree.leaves(new)] == before
    assert_same(new, train(job.step, job.state(), job.batches(2))[0])


def test_without_donation_the_old_state_is_kept() -> None:
    job = Job(model="conv_bn_train")
    fast = traced()(job.step)
    state = job.state()
    fast(state, job.batch())
    assert_same(state, job.state(), exact=True)


@pytest.mark.parametrize("other", ["batch", "state", "optimizer", "value"])
def test_many_signatures_are_said_once_and_what_is_other(other: str) -> None:
    job = Job(model="linear", optimizer="sgd", loss="scalar")
    start, factor = job.state(), 1.0

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        new, metrics = job.step(state, batch)
        return new, {**metrics, "factor": state.params["weight"].sum() * factor}

    fast = traced()(step)

    def call(number: int) -> None:
        nonlocal factor
        factor = float(number) if other == "value" else 1.0
        state = start
        if other == "optimizer":
            state = job.state()
        elif other == "state":
            state = start.replace(slots={"extra": torch.zeros(number)})
        fast(state, job.batch(rows=number if other == "batch" else 3))

    said = {
        "batch": "a batch with a different structure, shape or dtype",
        "state": "different shapes or dtypes in the state",
        "optimizer": "a state with a different structure, optimizer or model",
        "value": "a different Python value that the step reads",
    }
    for number in range(1, 8):
        call(number)
    with pytest.warns(lm.InexactWarning, match=rf"8 times, the last time for {said[other]}( \([^()]*\))?\.$"):
        call(8)
    call(9)  # a second warning would be an error here


def test_python_numbers_in_the_state_are_part_of_the_signature() -> None:
    def step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], Any]:
        return {**state, "x": state["x"] * state["power"]}, {}

    fast = traced()(step)
    for power in (2, 3, 2):
        state, _ = fast({"x": torch.tensor(5.0), "power": power}, torch.zeros(1))
        assert float(state["x"]) == 5.0 * power
        assert state["power"] == power


class EmptyCache(nn.Module):
    """Attention that joins its keys to an empty cache, as models of transformers do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = (layer(x).view(3, 5, 2, 2).transpose(1, 2) for layer in (self.query, self.key))
        key = torch.cat([torch.tensor([], dtype=x.dtype), key], dim=-2)
        return torch.softmax(query @ key.transpose(2, 3), -1)


def attention_step(state: Any, x: Any) -> tuple[Any, Any]:
    loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].square().mean())(state.params, x)
    return state.apply_gradients(grads), {"loss": loss}


def test_a_cat_with_an_empty_tensor_compiles() -> None:
    """The compiler's own rule for it gives other strides than those that the recorder saw."""
    x, net = torch.randn(3, 5, 4, dtype=torch.float64), EmptyCache().double()
    fast = lm.compose(lm.compile(), lm.donate())(attention_step)
    state = fast.init(lm.TrainState.create(net, lm.optim.sgd(0.1)))
    assert_same(fast(state, x), attention_step(lm.TrainState.create(net, lm.optim.sgd(0.1)), x))


def test_a_view_that_is_written_to_stays_a_view() -> None:
    """Of a copy in its place the write would be lost."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.view(6)[1:3].add_(1.0)
        torch._foreach_mul_([y.view(3, 2)], 3.0)
        return y.view(1, 6) + (x + 1).view(1, 6)

    graph = make_fx(function)(torch.ones(2, 3))
    relax_views(graph)
    views = [n.target for n in graph.graph.nodes if n.target in (aten.view.default, aten.reshape.default)]
    assert views == [*3 * [aten.view.default], aten.reshape.default]
    assert_same(graph(torch.ones(2, 3)), function(torch.ones(2, 3)), exact=True)


@pytest.mark.parametrize("blocks", [None, "1.*"])
def test_a_model_that_asks_whether_it_is_compiled_hears_yes(blocks: Any) -> None:
    """As under torch.compile; its answer decides which operations a library dares to use."""
    heard: list[bool] = []

    class Asks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heard.append(torch.compiler.is_compiling())
            return super().forward(x)

    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Asks(4, 4))).double()
    state, x = lm.TrainState.create(net, lm.optim.sgd(0.1)), torch.ones(3, 4, dtype=torch.float64)
    fast = lm.compile(backend="eager", blocks=blocks)(attention_step)
    assert_same(fast(state, x), attention_step(state, x))
    assert heard.pop() is False  # the step as it is
    assert heard
    assert all(heard)
    assert not torch.compiler.is_compiling()


@pytest.mark.parametrize("inner", [(), (lm.donate(),)])
def test_whatever_else_cannot_be_traced_runs_uncompiled_with_one_warning(inner: tuple[lm.Transform, ...]) -> None:
    job = Job()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        new, metrics = job.step(state, batch)
        metrics["aligned"] = float(metrics["loss"].compute().data_ptr() % 2)
        return new, metrics

    fast = traced(*inner)(step)
    with pytest.warns(lm.GraphBreakWarning, match=r"cannot be compiled: .*, in step, led to RuntimeError: ") as caught:
        state, _ = fast(fast.init(job.state()), job.batch())
    assert len(caught) == 1
    assert_same(fast.export(state), step(job.state(), job.batch())[0])
    fast(state, job.batch())  # a second warning would be an error here


def test_an_error_of_the_step_itself_is_raised_as_it_is() -> None:
    job = Job()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        traced()(step)(job.state(), job.batch())


def test_a_tensor_at_two_places_of_the_first_state_is_two_inputs() -> None:
    """The graph is used for later states of the same shapes, where the places differ."""
    job = Job()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        a, b = state.slots["a"], state.slots["b"]
        return state.replace(slots={"a": a + 1, "b": b}), {}

    fast, shared = traced()(step), torch.zeros(())
    state, _ = train(fast, job.state().replace(slots={"a": shared, "b": shared}), job.batches(3))
    assert (float(state.slots["a"]), float(state.slots["b"])) == (3.0, 0.0)
