"""The Runner: what it drives, logs, validates, and when it ends."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import lumen as lm
from lumen.errors import BatchError, HyperparameterError, OrderError, StepError
from lumen.train.progress import Lines, make_progress


def step(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, batch["x"])
        return lm.Mean.of((out - batch["y"]) ** 2), lm.Aux(metrics={"rows": lm.Sum.of(torch.ones(len(batch["x"])))})

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss, **aux.metrics}


def eval_step(state, batch):
    out, _ = state.apply(state.params, batch["x"])
    return {"loss": lm.Mean.of((out - batch["y"]) ** 2)}


def make_state(tx=None):
    torch.manual_seed(0)
    return lm.TrainState.create(torch.nn.Linear(3, 1), tx or lm.optim.sgd(0.05))


def make_data(rows=10):
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(rows, 3, generator=generator), "y": torch.randn(rows, 1, generator=generator)}


def fit(state=None, data=None, *, until=None, validate=None, **kwargs):
    data = lm.Loader(make_data(), batch_size=4, seed=0) if data is None else data
    runner = lm.Runner(step, progress=False, **kwargs)
    return runner.fit(state or make_state(), data, until=until or lm.Epochs(2), validate=validate)


def by_hand(loader, epochs, state=None):
    state = state or make_state()
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            state, _ = step(state, batch)
    return state


def same(a, b):
    return all(torch.equal(a.params[name], b.params[name]) for name in a.params)


def test_fit_is_the_loop_written_by_hand():
    result = fit()
    assert same(result.state, by_hand(lm.Loader(make_data(), batch_size=4, seed=0), 2))
    assert (result.clock.step, result.clock.epoch, result.reason) == (6, 2, "Epochs(2)")


@pytest.mark.parametrize(
    "transforms", [(lm.unroll(2),), (lm.compile(backend="eager"), lm.unroll(2), lm.donate())], ids=str
)
def test_unrolled_fit_takes_the_same_steps(transforms):
    # Three batches an epoch, the last one smaller: groups of two, and what is left one by one.
    result = fit(transforms=transforms, until=lm.Epochs(2))
    plain = by_hand(lm.Loader(make_data(), batch_size=4, seed=0), 2)
    assert result.clock.step == 6
    for name, value in plain.params.items():
        torch.testing.assert_close(result.state.params[name], value)


@pytest.mark.parametrize("until", [lm.Steps(7), lm.Epochs(2), lm.Epochs(3) | lm.Steps(11)], ids=str)
@pytest.mark.parametrize("kind", ["columns", "samples", "list"])
def test_unrolled_fit_takes_the_same_steps_from_any_data(kind, until):
    """Batches that are read stacked, or stacked when they have come."""
    columns = make_data(20)
    samples = [{key: leaf[i] for key, leaf in columns.items()} for i in range(20)]
    loaders = {"columns": lambda: lm.Loader(columns, 4), "samples": lambda: lm.Loader(samples, 4)}
    make = loaders.get(kind, lambda: list(lm.Loader(columns, 4).epoch(0)))
    plain = fit(data=make(), until=until)
    for size in (2, 3):
        result = fit(data=make(), transforms=(lm.unroll(size),), until=until)
        assert dataclasses.replace(result.clock, seconds=0) == dataclasses.replace(plain.clock, seconds=0)
        assert same(result.state, plain.state)


def test_unrolled_fit_stops_at_the_very_step():
    data = itertools.repeat(make_data(4))
    result = fit(data=data, transforms=(lm.unroll(4),), until=lm.Steps(7))
    assert (result.clock.step, int(result.state.step)) == (7, 7)


def test_ends_at_whichever_limit_comes_first():
    assert fit(until=lm.Steps(4) | lm.Epochs(9)).clock.step == 4
    assert fit(until=lm.Steps(400) | lm.Epochs(1)).clock.step == 3
    now = itertools.count().__next__
    assert fit(until=lm.Seconds(3) | lm.Steps(400), time_fn=lambda: float(now())).clock.step < 10


def test_steps_count_from_the_beginning_of_training():
    first = fit(until=lm.Steps(2))
    second = fit(state=first.state, until=lm.Steps(5))
    assert int(second.state.step) == 5


def test_logged_metrics_are_exact_over_uneven_batches():
    sink = lm.sinks.Memory()
    fit(sinks=[sink], until=lm.Epochs(1), log_every=3)
    steps, losses = sink["train/loss"]
    state, total = make_state(), 0.0
    for batch in lm.Loader(make_data(), batch_size=4, seed=0).epoch(0):
        state, metrics = step(state, batch)
        total += float(metrics["loss"].total)
    assert list(steps) == [3]
    assert losses[0] == pytest.approx(total / 10)
    assert sink["train/rows"][1] == [10.0]
    assert sink["lr"][1] == [0.05]


def test_no_number_is_read_between_logging_points(monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append("tolist") or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append("item") or original(self))
    seen = []

    class Count(lm.Callback):
        def on_step(self, view):
            seen.append(len(reads))

    data = [make_data(4)] * 20
    fit(data=data, until=lm.Epochs(1), log_every=20, callbacks=[Count()])
    assert len(set(seen)) == 1
    assert len(reads) > seen[-1]


def test_validation_runs_when_due_and_in_evaluation_mode():
    modes, sink = [], lm.sinks.Memory()

    def spying(state, batch):
        modes.append((state.apply_fn.module.training, torch.is_grad_enabled()))
        return eval_step(state, batch)

    validate = lm.Validate(spying, lm.Loader(make_data(5), batch_size=2, shuffle=False), every=lm.Every(steps=2))
    result = fit(validate=validate, sinks=[sink], until=lm.Steps(6))
    assert list(sink["val/loss"][0]) == [2, 4, 6]
    assert set(modes) == {(False, False)}
    data = make_data(5)
    expected = eval_step(result.state, data)["loss"].compute()
    assert result.metrics["val/loss"] == pytest.approx(float(expected))


def test_validation_by_epochs_and_under_two_names():
    sink = lm.sinks.Memory()
    loader = lm.Loader(make_data(5), batch_size=5)
    both = [
        lm.Validate(eval_step, loader, name="a"),
        lm.Validate(eval_step, loader, name="b", every=lm.Every(epochs=2)),
    ]
    fit(validate=both, sinks=[sink], until=lm.Epochs(4))
    assert list(sink["a/loss"][0]) == [3, 6, 9, 12]
    assert list(sink["b/loss"][0]) == [6, 12]


def test_a_limit_in_steps_at_the_end_of_an_epoch_still_ends_the_epoch():
    sink = lm.sinks.Memory()
    loader = lm.Loader(make_data(5), batch_size=5)
    result = fit(validate=lm.Validate(eval_step, loader), sinks=[sink], until=lm.Steps(6))
    assert list(sink["val/loss"][0]) == [3, 6]
    assert (result.clock.epoch, result.reason) == (2, "Steps(6)")


def test_validation_of_averaged_params():
    loader = lm.Loader(make_data(5), batch_size=5)
    result = fit(transforms=[lm.ema(0.5)], validate=lm.Validate(eval_step, loader, use="ema"))
    averaged = result.state.replace(params=lm.ema.params(result.state))
    assert result.metrics["val/loss"] == pytest.approx(lm.evaluate(eval_step, averaged, loader)["loss"])
    assert "ema" not in result.export().slots


def test_a_sweep_is_driven_and_validated_lane_by_lane():
    sink = lm.sinks.Memory()
    rates = [0.1, 0.01]
    loader = lm.Loader(make_data(5), batch_size=5, shuffle=False)
    result = fit(transforms=[lm.sweep(lr=rates)], validate=lm.Validate(eval_step, loader), sinks=[sink])
    for i, rate in enumerate(rates):
        alone = fit(state=make_state(lm.optim.sgd(rate)), validate=lm.Validate(eval_step, loader))
        assert result.metrics[f"val/loss/{i}"] == pytest.approx(alone.metrics["val/loss"], rel=1e-5)


def test_callbacks_see_the_run_and_can_stop_it():
    calls = []

    class Watch(lm.Callback):
        def on_start(self, view):
            calls.append("start")

        def on_step(self, view):
            calls.append(int(view.state.step))
            if view.clock.step == 4:
                view.stop("seen enough")

        def on_end(self, view):
            calls.append("end")

    result = fit(callbacks=[Watch()], until=lm.Epochs(9))
    assert calls == ["start", 1, 2, 3, 4, "end"]
    assert result.reason == "seen enough"


def test_an_exception_comes_through_with_its_place_and_sinks_closed():
    closed, told = [], []

    class Sink:
        def log(self, step, values): ...

        def close(self):
            closed.append(True)

    class Watch(lm.Callback):
        def on_exception(self, view, error):
            told.append(error)

    def failing(state, batch):
        if int(state.step) == 4:
            raise ZeroDivisionError("the user's own")
        return step(state, batch)

    runner = lm.Runner(failing, progress=False, sinks=[Sink()], callbacks=[Watch()])
    with pytest.raises(ZeroDivisionError, match="own") as caught:
        runner.fit(make_state(), lm.Loader(make_data(), batch_size=4), until=lm.Epochs(3))
    assert caught.value.__notes__ == ["raised in step 5 (epoch 1, batch 1)"]
    assert (closed, told) == ([True], [caught.value])


@pytest.mark.parametrize(
    "data",
    [
        [make_data(4), make_data(6)],
        torch.utils.data.DataLoader(list(zip(*make_data().values(), strict=True)), batch_size=4),
        [{name: value.numpy() for name, value in make_data(4).items()}],
    ],
    ids=["list", "DataLoader", "numpy"],
)
def test_any_iterable_is_data(data):
    def tolerant(state, batch):
        batch = batch if isinstance(batch, dict) else dict(zip("xy", batch, strict=True))
        assert isinstance(batch["x"], torch.Tensor)
        return step(state, batch)

    result = lm.Runner(tolerant, progress=False).fit(make_state(), data, until=lm.Epochs(2))
    assert result.clock.epoch == 2
    assert result.clock.step == 2 * len(data)


def test_a_generator_is_one_epoch():
    result = fit(data=(make_data(4) for _ in range(3)), until=lm.Epochs(5))
    assert (result.clock.step, result.reason) == (3, "the data ended after 1 epochs")


def test_evaluate_needs_no_fit():
    runner = lm.Runner(step, progress=False)
    values = runner.evaluate(eval_step, make_state(), lm.Loader(make_data(7), batch_size=3))
    assert values["loss"] == pytest.approx(float(eval_step(make_state(), make_data(7))["loss"].compute()))


def test_lines_off_a_terminal(capsys):
    lm.Runner(step, log_every=3, progress="lines").fit(
        make_state(), lm.Loader(make_data(), batch_size=4), until=lm.Epochs(2)
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 3/6  epoch 0  ")
    assert "loss" in lines[0]
    assert isinstance(make_progress(True), Lines)


def test_progress_knows_how_long_a_run_is_that_begins_with_a_step_behind_it(capsys):
    state, _ = step(make_state(), make_data())
    lm.Runner(step, log_every=6).fit(state, lm.Loader(make_data(), batch_size=4), until=lm.Epochs(2))
    assert "step 7/7 " in capsys.readouterr().out


def test_the_bar_is_drawn(capsys):
    result = lm.Runner(step, log_every=3, progress="bar").fit(
        make_state(), lm.Loader(make_data(), batch_size=4), until=lm.Epochs(2)
    )
    assert result.clock.step == 6
    assert "6/6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: fit(data=[]), BatchError, "empty"),
        (lambda: fit(data=iter(())), BatchError, "empty"),
        (lambda: fit(data=3), BatchError, "iterable"),
        (lambda: fit(until=5), StepError, r"lm\.Steps"),
        (lambda: lm.Steps(0), HyperparameterError, "positive"),
        (lambda: lm.Epochs(True), HyperparameterError, "positive"),
        (lambda: lm.Every(), HyperparameterError, "steps=500"),
        (lambda: fit(transforms=[lm.accumulate(2), lm.compile()]), OrderError, r"lm\.compile\(\)\(lm\.accumulate\(2\)"),
        (lambda: lm.evaluate(eval_step, make_state(), []), BatchError, "empty"),
        (lambda: lm.evaluate(lambda s, b: (s, {}), make_state(), [make_data()]), StepError, "dict of metrics"),
        (lambda: lm.Validate(eval_step, [], use="best"), StepError, "ema"),
        (lambda: lm.Runner(3), StepError, "function"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_numbers_of_nested_and_numpy_metrics_have_names():
    sink = lm.sinks.Memory()

    def nested(state, batch):
        state, metrics = step(state, batch)
        return state, {"loss": metrics["loss"], "by": {"a": torch.tensor([1.0, 2.0]), "b": 3}, "n": np.float32(4.0)}

    lm.Runner(nested, progress=False, sinks=[sink]).fit(make_state(), [make_data()], until=lm.Steps(1))
    assert [sink[f"train/{name}"][1] for name in ("by/a/0", "by/a/1", "by/b", "n")] == [[1.0], [2.0], [3.0], [4.0]]


def test_a_metric_too_long_to_log_is_not_dropped_in_silence():
    def wide(state, batch):
        return step(state, batch)[0], {"loss": torch.tensor(1.0), "rows": torch.zeros(100)}

    sink = lm.sinks.Memory()
    with pytest.warns(lm.InexactWarning, match="'train/rows' has 100 numbers"):
        lm.Runner(wide, progress=False, sinks=[sink]).fit(make_state(), [make_data()], until=lm.Steps(1))
    assert sink["train/loss"][1] == [1.0]
