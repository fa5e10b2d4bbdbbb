"""What a Runner can be asked besides `fit`, and what `fit` can be told."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import re
import signal

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from lumen.errors import BatchError, CheckpointError, CheckpointMismatchError, StepError
from lumen.train.run_log import learning_rates


def step(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, batch["x"])
        return lm.Mean.of((out - batch["y"]) ** 2)

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def eval_step(state, batch):
    out, _ = state.apply(state.params, batch["x"])
    return {"loss": lm.Mean.of((out - batch["y"]) ** 2)}


def make_state(tx=None, seed=0):
    torch.manual_seed(seed)
    return lm.TrainState.create(torch.nn.Linear(3, 1), tx or lm.optim.sgd(0.05))


def make_data(rows=12):
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(rows, 3, generator=generator), "y": torch.randn(rows, 1, generator=generator)}


def loader(rows=12, batch_size=4):
    return lm.Loader(make_data(rows), batch_size=batch_size, seed=0)


def runner(**options):
    return lm.Runner(step, **{"progress": False, **options})


def same(a, b):
    return all(torch.equal(a.params[name], b.params[name]) for name in a.params)


class Recorded:
    """A validation metric that takes these values, one for each validation."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, state, batch):
        return {"loss": torch.tensor(next(self.values))}

    def validate(self, **options):
        return lm.Validate(self, [make_data(2)], **options)


# ------------------------------------------------------------------------------------------- asked


def test_predictions_come_in_the_order_of_the_data():
    data = make_data(7)
    state = make_state()
    rows = lm.Loader(data, batch_size=3, shuffle=False)

    def predict_step(state, batch):
        out, _ = state.apply(state.params, batch["x"])
        return {"y": out, "mean": out.mean(), "names": [f"row {x:.3f}" for x in batch["x"][:, 0].tolist()]}

    found = runner().predict(predict_step, state, rows)
    torch.testing.assert_close(found["y"], state.apply(state.params, data["x"])[0])
    assert found["mean"].shape == (3,)
    assert found["names"] == [f"row {x:.3f}" for x in data["x"][:, 0].tolist()]
    assert not found["y"].requires_grad
    assert runner().predict(predict_step, state, rows, limit=1)["y"].shape == (3, 1)


def test_predictions_one_by_one_hold_nothing_back():
    read = []

    def batches():
        for i in range(5):
            read.append(i)
            yield torch.full((2,), float(i))

    stream = lm.predict(lambda state, batch: batch + 1, {}, batches())
    assert next(stream).tolist() == [1.0, 1.0]
    assert len(read) <= 2
    assert len(list(stream)) == 4


def test_prediction_runs_in_evaluation_mode_and_under_precision():
    net = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(3, 1))
    state = lm.TrainState.create(net, lm.optim.sgd(0.1))
    dtypes = []

    def predict_step(state, batch):
        out, _ = state.apply(state.params, batch["x"])
        dtypes.append(torch.is_grad_enabled())
        return out

    first = lm.Runner(step, transforms=[lm.precision("bf16")]).predict(predict_step, state, loader())
    again = lm.Runner(step, transforms=[lm.precision("bf16")]).predict(predict_step, state, loader())
    plain = lm.Runner(step).predict(predict_step, state, loader())
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    assert not any(dtypes)


def test_predictions_that_do_not_fit_together():
    outputs = iter([{"a": torch.ones(1)}, {"b": torch.ones(1)}])
    with pytest.raises(BatchError, match="missing a; unexpected b"):
        runner().predict(lambda state, batch: next(outputs), {}, [torch.ones(1)] * 2)
    with pytest.raises(BatchError, match="no batch"):
        runner().predict(lambda state, batch: batch, {}, [])


def test_smoke_runs_one_batch_of_everything_and_leaves_no_trace(tmp_path):
    called, sink = [], lm.sinks.Memory()

    class Watch(lm.Callback):
        def on_start(self, view):
            called.append(view)

    seen = []

    def counting(state, batch):
        seen.append(len(batch["x"]))
        return eval_step(state, batch)

    state = make_state(lm.optim.chain(lm.optim.sgd(0.1), lm.optim.reduce_on_plateau(monitor="val/loss")))
    before = lm.tree.map(torch.clone, state)
    job = runner(
        transforms=[lm.ema(0.9), lm.donate()],
        checkpoint=lm.Checkpointer(tmp_path / "run"),
        sinks=[sink],
        callbacks=[Watch()],
    )
    validate = [lm.Validate(counting, loader()), lm.Validate(counting, loader(), name="other", use="ema")]
    result = job.smoke(state, loader(), validate=validate)
    assert result.clock.step == 1
    assert len(seen) == 2
    assert {"train/loss", "val/loss", "other/loss"} <= result.metrics.keys()
    assert (sink.rows, called) == ([], [])
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(a, b) for a, b in zip(lm.tree.tensors(before), lm.tree.tensors(state), strict=True))


def test_smoke_finds_what_would_fail_hours_later():
    def broken(state, batch):
        return {"loss": batch["z"]}

    with pytest.raises(KeyError, match="z"):
        runner().smoke(make_state(), loader(), validate=lm.Validate(broken, loader(), every=lm.Every(epochs=100)))

    class Opaque:
        pass

    @lm.dataclass
    class Odd(lm.TrainState):
        extra: object = None

    with pytest.raises(CheckpointError, match="extra"):
        runner().smoke(Odd.create(torch.nn.Linear(3, 1), lm.optim.sgd(0.1), extra=Opaque()), loader())


def test_overfitting_a_batch_brings_its_loss_to_nothing():
    state = make_state(lm.optim.adam(0.1))
    result = runner(transforms=[lm.donate()]).overfit(state, loader(batch_size=3), until=lm.Steps(400))
    assert result.metrics["train/loss"] < 1e-4
    assert int(state.step) == 0
    assert runner().overfit(state, loader(), batches=2).clock.epoch == 50  # 100 steps over the same two


@pytest.mark.parametrize("transforms", [(), (lm.unroll(2), lm.donate())], ids=str)
def test_lr_find_through_the_runner(tmp_path, transforms):
    found = runner(transforms=transforms).lr_find(make_state(), loader(), steps=30, plot=tmp_path / "lr.png")
    assert 1e-6 < found.suggestion < 10
    assert (tmp_path / "lr.png").stat().st_size > 1000


def test_evaluate_with_a_limit():
    data = loader(12)
    whole, first = (runner().evaluate(eval_step, make_state(), data, limit=limit)["loss"] for limit in (None, 1))
    assert whole != first
    with pytest.raises(BatchError, match="limit=0"):
        runner().evaluate(eval_step, make_state(), data, limit=0)


# ------------------------------------------------------------------------------------------- told


def test_a_limit_bounds_each_epoch_and_goes_on_exactly(tmp_path):
    sink = lm.sinks.Memory()
    validate = lm.Validate(eval_step, loader(), limit=1)
    result = runner(sinks=[sink]).fit(make_state(), loader(), until=lm.Epochs(3), limit=2, validate=validate)
    assert (result.clock.step, result.clock.rows) == (6, 24)
    assert sink["val/loss"][0] == [2, 4, 6]
    options = {"checkpoint": lm.Checkpointer(tmp_path, every=lm.Every(steps=1))}
    runner(**options).fit(make_state(), loader(), until=lm.Steps(3), limit=2)
    again = runner(**options).fit(make_state(seed=9), loader(), until=lm.Epochs(3), limit=2, resume="auto")
    assert same(again.state, result.state)


def test_ends_after_so_many_tokens():
    batches = [{"mask": torch.ones(2, 5), "ids": torch.zeros(2, 5, dtype=torch.int64)}] * 7

    def noop(state, batch):
        return state.replace(step=state.step + 1), {}

    result = lm.Runner(noop, progress=False).fit(make_state(), batches, until=lm.Tokens(35) | lm.Epochs(9))
    assert (result.clock.tokens, result.clock.step, result.reason) == (40, 4, "Tokens(35) | Epochs(9)")
    result = lm.Runner(noop, progress=False, tokens=lambda batch: 100).fit(make_state(), batches, until=lm.Tokens(250))
    assert result.clock.step == 3
    with pytest.raises(BatchError, match="tokens=lambda"):
        runner().fit(make_state(), loader(), until=lm.Tokens(5))


def test_tokens_rows_and_throughput_are_logged():
    now = itertools.count().__next__
    sink = lm.sinks.Memory()
    batches = [{"x": torch.ones(2, 3), "y": torch.zeros(2, 1)}] * 8
    job = runner(
        sinks=[sink],
        log_every=4,
        tokens=lambda batch: 10 * len(batch["x"]),
        mfu=1000.0,
        time_fn=lambda: float(now()),
        callbacks=[lm.Callback()],
    )
    job.fit(make_state(), batches, until=lm.Epochs(1) | lm.Seconds(1000))
    values = dict(sink.rows[-1][1])
    assert values["rows_per_second"] == pytest.approx(2 * values["steps_per_second"])
    assert values["tokens_per_second"] == pytest.approx(20 * values["steps_per_second"])
    flops = lm.flops_of(step, make_state(), batches[0])
    assert values["mfu"] == pytest.approx(flops * values["steps_per_second"] / 1000.0)


@pytest.mark.parametrize("transforms", [(), (lm.unroll(4),)], ids=str)
def test_rows_are_counted_from_shapes(transforms):
    result = runner(transforms=transforms).fit(make_state(), loader(10), until=lm.Epochs(2))
    assert result.clock.rows == 20


def test_validation_over_several_sets_by_name():
    data = {"near": loader(), "far": lm.Loader(make_data(4), batch_size=2)}
    result = runner().fit(make_state(), loader(), until=lm.Epochs(1), validate=lm.Validate(eval_step, data))
    assert {"val/near/loss", "val/far/loss"} <= result.metrics.keys()
    expected = lm.evaluate(eval_step, result.state, data["far"])["loss"]
    assert result.metrics["val/far/loss"] == pytest.approx(expected)
    with pytest.raises(BatchError, match="empty dict"):
        lm.Validate(eval_step, {})


def test_seconds_between_validations_are_those_of_the_clock():
    now = itertools.count(step=7).__next__
    sink = lm.sinks.Memory()
    validate = lm.Validate(eval_step, loader(), every=lm.Every(seconds=60))
    runner(sinks=[sink], time_fn=lambda: float(now())).fit(
        make_state(), [make_data(4)] * 40, until=lm.Epochs(1), validate=validate
    )
    assert len(sink["val/loss"][0]) >= 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_is_fed_as_torch_feeds_its_scheduler(seed, mode):
    generator = torch.Generator().manual_seed(seed)
    series = torch.rand(25, generator=generator).round(decimals=1).tolist()
    settings = {"factor": 0.5, "patience": seed % 3, "cooldown": seed % 2, "mode": mode}
    sink = lm.sinks.Memory()
    tx = lm.optim.chain(lm.optim.sgd(0.1), lm.optim.reduce_on_plateau(**settings, monitor="val/loss"))
    validate = Recorded(series).validate(every=lm.Every(steps=1))
    job = runner(sinks=[sink], log_every=1)
    job.fit(make_state(tx), [make_data(4)] * 25, until=lm.Epochs(1), validate=validate)
    # The rate at step n is that after the n-1 reports before it.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, eps=1e-9, **settings)
    expected = []
    for value in series:
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(value)
    assert sink["lr"][1] == pytest.approx(expected)


def test_plateau_in_a_sweep_is_fed_lane_by_lane():
    plateau = lm.optim.reduce_on_plateau(patience=0, factor=0.5, threshold=0.5, monitor="val/loss")
    tx = lm.optim.chain(lm.optim.sgd(0.1), plateau)
    job = runner(transforms=[lm.sweep(lr=[1e-9, 0.05])])
    validate = lm.Validate(eval_step, loader(), every=lm.Every(steps=1))
    result = job.fit(make_state(tx), loader(), until=lm.Steps(3), validate=validate)
    scales = [leaf for path, leaf in lm.tree.named_tensors(result.state.opt_state) if path.endswith("scale")]
    assert scales[0][0] < 1  # hardly learns at all


@pytest.mark.parametrize(("monitor", "says"), [(None, 'monitor="val/loss"'), ("test/loss", "are named val")])
def test_a_plateau_that_nothing_feeds(monitor, says):
    tx = lm.optim.chain(lm.optim.sgd(0.1), lm.optim.reduce_on_plateau(monitor=monitor))
    with pytest.raises(StepError, match=says):
        runner().fit(make_state(tx), loader(), until=lm.Steps(1), validate=lm.Validate(eval_step, loader()))


def test_plateaus_of_a_partition_each_get_the_metric_that_they_monitor():
    def monitoring(name):
        return lm.optim.chain(lm.optim.sgd(0.1), lm.optim.reduce_on_plateau(patience=0, factor=0.5, monitor=name))

    tx = lm.optim.partition({"*bias": monitoring("val/flat")}, default=monitoring("val/falling"))

    def falling(state, batch):
        return {"flat": torch.ones(()), "falling": 1.0 / state.step}

    validate = lm.Validate(falling, loader(), every=lm.Every(steps=1))
    result = runner().fit(make_state(tx), loader(), until=lm.Steps(3), validate=validate)
    scales = {leaf.item() for path, leaf in lm.tree.named_tensors(result.state.opt_state) if path.endswith("scale")}
    assert scales == {0.25, 1.0}


class Logging(lm.Callback):
    """Publishes a number after each validation, as only a callback of the user's own does."""

    def on_validate(self, view):
        view.log({"mine": 1.0})


def watching(tmp_path, best=None, plateau=None, **options):
    tx = lm.optim.chain(lm.optim.sgd(0.1), lm.optim.reduce_on_plateau(monitor=plateau)) if plateau else None
    checkpoint = lm.Checkpointer(tmp_path, monitor=best) if best else None
    seen = []

    def counted(state, batch):
        seen.append(1)
        return step(state, batch)

    job = lm.Runner(counted, progress=False, checkpoint=checkpoint, log_every=2, **options)
    data = {"clean": loader(), "noisy": loader()} if "clean" in f"{best}{plateau}" else loader()
    try:
        job.fit(make_state(tx), loader(), until=lm.Epochs(3), validate=lm.Validate(eval_step, data))
    except StepError as error:
        return len(seen), str(error)
    return len(seen), ""


@pytest.mark.parametrize(
    ("watched", "steps", "says"),
    [
        ({"best": "val/lss"}, 3, r"Checkpointer\(monitor='val/lss', mode='min'\).*'lr'.*'train/loss', 'val/loss'"),
        ({"best": "train/lss"}, 2, r"'train/lss'.*'train/loss'"),
        ({"best": "val_loss"}, 0, r"'val_loss'.*'val/…'.*Write \"val/loss\""),
        ({"best": "vall/loss"}, 0, r"'vall/loss'.*'val/…'"),
        ({"best": "val_loss", "callbacks": [lm.EarlyStop(monitor="val/loss")]}, 0, "'val/…'"),
        ({"best": "val/lss", "callbacks": [Logging()]}, 3, r"'mine'.*'val/loss'"),
        ({"plateau": "val/lss"}, 3, r"plateau\(monitor='val/lss'\).*What was: 'val/loss'\."),
        ({"plateau": "val/mine", "callbacks": [Logging()]}, 3, "monitor='val/mine'"),
        ({"plateau": "val/clean/lss"}, 3, "'val/clean/loss', 'val/noisy/loss'"),
        ({"best": "val/loss"}, 9, "^$"),
        ({"best": "train/loss"}, 9, "^$"),
        ({"best": "lr"}, 9, "^$"),
        ({"best": "mine", "callbacks": [Logging()]}, 9, "^$"),
        ({"plateau": "val/clean/loss"}, 9, "^$"),
    ],
)
def test_a_monitored_name_that_there_is_not_is_an_error_by_the_first_validation(tmp_path, watched, steps, says):
    done, error = watching(tmp_path, **watched)
    assert done == steps
    assert re.search(says, error), error


def test_a_name_that_no_callback_came_to_publish_is_a_warning_at_the_end(tmp_path):
    with pytest.warns(lm.InexactWarning, match=r"monitor='main', mode='min'.*'mine'"):
        assert watching(tmp_path, best="main", callbacks=[Logging()]) == (9, "")


@pytest.mark.parametrize(
    ("series", "patience", "epochs"), [([6, 5, 5, 5, 5, 5], 3, 5), ([6, 5, 4, 4, 3, 3], 1, 4), ([3, 2, 1], 1, 3)]
)
def test_early_stopping_ends_after_the_epoch_that_lightning_ends_after(series, patience, epochs):
    validate = Recorded(map(float, series)).validate()
    job = runner(callbacks=[lm.EarlyStop(monitor="val/loss", patience=patience)])
    result = job.fit(make_state(), loader(), until=lm.Epochs(len(series)), validate=validate)
    assert result.clock.epoch == epochs
    assert ("has not improved" in result.reason) == (epochs < len(series))


def test_a_run_that_a_callback_ended_stays_ended(tmp_path):
    def job():
        stop = lm.EarlyStop(monitor="val/loss", patience=1)
        return runner(callbacks=[stop], checkpoint=lm.Checkpointer(tmp_path, every=lm.Every(steps=2)))

    def fit(**options):
        validate = Recorded([1.0] * 9).validate(every=lm.Every(steps=2))
        return job().fit(make_state(), loader(), until=lm.Epochs(9), validate=validate, **options)

    first = fit()
    again = fit(resume="auto")
    assert again.clock.step == first.clock.step == 4
    assert again.reason == first.reason == "val/loss has not improved on 1 for 1 report"
    assert same(again.state, first.state)


def test_early_stopping_goes_on_counting_after_an_interruption(tmp_path):
    series = [6.0, 5.0, 5.0, 5.0, 5.0, 5.0]

    def job():
        return runner(callbacks=[lm.EarlyStop(monitor="val/loss", patience=3)], checkpoint=lm.Checkpointer(tmp_path))

    job().fit(make_state(), loader(), until=lm.Epochs(3), validate=Recorded(series[:3]).validate())
    result = job().fit(
        make_state(), loader(), until=lm.Epochs(6), validate=Recorded(series[3:]).validate(), resume="auto"
    )
    assert result.clock.epoch == 5


# ------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("k", "kept"), [(2, {2, 4}), (3, {2, 3, 4})])
def test_the_best_k_are_those_that_lightning_keeps(tmp_path, k, kept):
    checkpoint = lm.Checkpointer(tmp_path, monitor="val/loss", mode="min", keep_best=k)
    validate = Recorded([10, 9, 2.8, 5, 2.5]).validate()
    runner(checkpoint=checkpoint).fit(make_state(), [make_data(4)], until=lm.Epochs(5), validate=validate)
    assert {step - 1 for step in checkpoint.store.steps()} == kept  # one step an epoch
    assert checkpoint.best().name == "5"


def test_a_best_validation_is_kept_though_no_save_was_due(tmp_path):
    checkpoint = lm.Checkpointer(tmp_path, every=lm.Every(steps=1000), monitor="val/loss", mode="min")
    validate = Recorded([3.0, 1.0, 2.0, float("nan")]).validate(every=lm.Every(steps=3))
    runner(checkpoint=checkpoint).fit(make_state(), loader(), until=lm.Steps(12), validate=validate)
    assert checkpoint.store.steps() == [6, 12]
    assert checkpoint.best().name == "6"


def test_a_save_each_60_seconds_of_7_second_batches(tmp_path):
    seconds = [0.0]

    def slow(state, batch):
        seconds[0] += 7.0
        return step(state, batch)

    checkpoint = lm.Checkpointer(tmp_path, every=lm.Every(seconds=60), keep=None)
    saved = []

    class Count(lm.Callback):
        def on_checkpoint(self, view):
            saved.append(view.clock.step)

        def on_step(self, view):
            if view.clock.step == 128:
                assert len(saved) == 14  # without the one at the end of the run

    job = lm.Runner(slow, progress=False, checkpoint=checkpoint, callbacks=[Count()], time_fn=lambda: seconds[0])
    job.fit(make_state(), [make_data(4)] * 128, until=lm.Epochs(1))
    assert saved == [9 * i for i in range(1, 15)] + [128]
    assert checkpoint.store.steps() == saved


def test_keep_last_and_every_nth(tmp_path):
    checkpoint = lm.Checkpointer(tmp_path, every=lm.Every(steps=2), keep=2, keep_every=6)
    runner(checkpoint=checkpoint).fit(make_state(), loader(), until=lm.Steps(15))
    assert checkpoint.store.steps() == [6, 12, 14, 15]


def test_a_directory_with_checkpoints_is_not_begun_anew(tmp_path):
    options = {"checkpoint": lm.Checkpointer(tmp_path)}
    runner(**options).fit(make_state(), loader(), until=lm.Epochs(1))
    with pytest.raises(CheckpointError, match=r"up to step 3.*resume=\"auto\""):
        runner(**options).fit(make_state(), loader(), until=lm.Epochs(2))
    again = runner(**options).fit(make_state(), loader(), until=lm.Epochs(1), resume="auto")
    assert (again.clock.step, again.reason) == (3, "Epochs(1)")  # it was through already


def test_going_on_from_a_path_into_another_directory(tmp_path):
    whole = runner(checkpoint=lm.Checkpointer(tmp_path / "a", every=lm.Every(steps=2), keep=None))
    expected = whole.fit(make_state(), loader(), until=lm.Epochs(2))
    for path in (tmp_path / "a", tmp_path / "a" / "checkpoints" / "4"):
        other = lm.Checkpointer(tmp_path / f"from-{path.name}")
        result = runner(checkpoint=other).fit(make_state(seed=3), loader(), until=lm.Epochs(2), resume=path)
        assert same(result.state, expected.state)
    with pytest.raises(CheckpointError, match="nowhere"):
        runner().fit(make_state(), loader(), until=lm.Epochs(2), resume=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="Checkpointer"):
        runner().fit(make_state(), loader(), until=lm.Epochs(2), resume="auto")


def test_going_on_with_another_model_or_other_data_says_what_differs(tmp_path):
    runner(checkpoint=lm.Checkpointer(tmp_path)).fit(make_state(), loader(), until=lm.Epochs(1))
    wide = lm.TrainState.create(torch.nn.Linear(3, 2), lm.optim.adam(0.1))
    job = runner(checkpoint=lm.Checkpointer(tmp_path))
    with pytest.raises(CheckpointMismatchError, match="params/weight"):
        job.fit(wide, loader(), until=lm.Epochs(2), resume="auto")
    with pytest.raises(BatchError, match=r"batch_size=4 \(here 6\)"):
        job.fit(make_state(), loader(batch_size=6), until=lm.Epochs(2), resume="auto")


def test_callbacks_may_join_and_leave_between_two_parts_of_a_run(tmp_path):
    def part(epochs, *callbacks):
        job = runner(checkpoint=lm.Checkpointer(tmp_path), callbacks=callbacks)
        validate = lm.Validate(eval_step, loader())
        return job.fit(make_state(), loader(), until=lm.Epochs(epochs), resume="auto", validate=validate)

    part(1)
    first, second = lm.EarlyStop(monitor="val/loss", patience=50), lm.EarlyStop(monitor="train/loss", patience=60)
    part(2, first, second)
    again = lm.EarlyStop(monitor="val/loss", patience=50), lm.EarlyStop(monitor="train/loss", patience=60)
    part(2, _Fail(at=-1), *again)
    assert [each.state_dict() for each in again] == [first.state_dict(), second.state_dict()]
    with pytest.warns(lm.InexactWarning, match="state of a callback EarlyStop") as caught:
        part(3)
    assert len(caught) == 2


def test_what_is_logged_beside_the_numbers(tmp_path):
    @dataclasses.dataclass
    class Config:
        lr: float = 0.05
        layers: tuple[int, ...] = (3, 1)
        rate: float = math.inf

    sink = lm.sinks.Memory()
    checkpoint = lm.Checkpointer(tmp_path / "run")
    job = runner(
        transforms=[lm.ema(0.9)],
        config=Config(),
        sinks=[sink, lm.sinks.JSONL(tmp_path / "metrics.jsonl")],
        checkpoint=checkpoint,
    )
    job.fit(make_state(), loader(), until=lm.Epochs(1))
    for found in (
        sink.configuration,
        json.loads((tmp_path / "metrics.config.json").read_text()),
        lm.checkpoint.metadata(checkpoint.latest())["meta"],
    ):
        assert found["config"] == {"lr": 0.05, "layers": [3, 1], "rate": "inf"}
        assert found["step"] == "lm.ema(0.9)(step)"
        assert found["versions"]["torch"] == torch.__version__
        assert "git" in found
    with pytest.raises(StepError, match="mapping or a dataclass"):
        runner(config=3)


@dataclasses.dataclass
class Widths:
    layers: tuple[int, ...] = (3, 1)


def test_a_configuration_keeps_its_nested_lists():
    plain = {"model": {"widths": [8, [2, "x"]], "lr": 0.1}, "names": ["a", None]}
    like_omegaconf = collections.UserDict(
        {"model": {"widths": collections.UserList([8, (2, "x")]), "lr": 0.1}, "names": ["a", None]}
    )
    assert runner(config=like_omegaconf).description()["config"] == plain
    assert runner(config={"all": [Widths()]}).description()["config"] == {"all": [{"layers": [3, 1]}]}
    omegaconf = pytest.importorskip("omegaconf")
    assert runner(config=omegaconf.OmegaConf.create(plain)).description()["config"] == plain


def test_each_group_of_a_partition_logs_its_learning_rate():
    rules = {"bias": lm.optim.sgd(0.5)}
    for default, expected in ((lm.optim.sgd(lm.optim.linear(0.25, 4, 0.0)), [0.5, 0.25]), (lm.optim.freeze(), [])):
        tx = lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.partition(rules, default=default))
        metrics = runner(log_every=1).fit(make_state(tx), loader(), until=lm.Steps(1)).metrics
        assert metrics["lr"] == 0.5
        assert [metrics[name] for name in sorted(metrics) if name.startswith("lr/")] == expected


def test_each_lane_of_an_ensemble_logs_its_learning_rate(tmp_path):
    rates = [0.5, 0.25, 0.125]

    def logged(tx, lanes, **options):
        metrics = (
            runner(transforms=[lanes], log_every=1, **options).fit(make_state(tx), loader(), until=lm.Steps(1)).metrics
        )
        return {name: rate for name, rate in metrics.items() if name.split("/")[0] == "lr"}

    assert logged(lm.optim.sgd(1.0), lm.sweep(lr=rates)) == {"lr/0": 0.5, "lr/1": 0.25, "lr/2": 0.125}
    assert logged(lm.optim.sgd(lm.optim.linear(0.5, 4, 0.0)), lm.ensemble(2)) == {"lr/0": 0.5, "lr/1": 0.5}
    parts = lm.optim.partition({"bias": lm.optim.sgd(0.5)}, default=lm.optim.sgd(0.25))
    assert logged(parts, lm.ensemble(2)) == {"lr/0/0": 0.5, "lr/0/1": 0.5, "lr/1/0": 0.25, "lr/1/1": 0.25}
    only = lm.optim.partition({"bias": lm.optim.sgd(0.5)}, default=lm.optim.freeze())
    assert logged(only, lm.ensemble(2)) == {"lr/0": 0.5, "lr/1": 0.5}
    best = lm.Checkpointer(tmp_path, monitor="lr/1", mode="min")
    assert logged(lm.optim.sgd(1.0), lm.sweep(lr=rates), checkpoint=best)["lr/1"] == 0.25
    with pytest.warns(lm.InexactWarning, match=r"'lr' has 65 numbers.*lm\.optim\.learning_rate"):
        learning_rates(lm.sweep(lr=[0.5] * 65).init(make_state(lm.optim.sgd(1.0))).opt_state)


def test_half_merged_torchmetrics_survive_an_interruption(tmp_path):
    torchmetrics = pytest.importorskip("torchmetrics")
    auroc = lm.metrics.from_torchmetrics(torchmetrics.classification.BinaryAUROC())

    def scored(state, batch):
        state, metrics = step(state, batch)
        scores = batch["x"][:, 0].sigmoid()
        return state, {**metrics, "auroc": auroc.of(scores, (batch["y"][:, 0] > 0).long())}

    def run(directory, until, resume="never"):
        sink = lm.sinks.Memory()
        job = lm.Runner(
            scored,
            progress=False,
            sinks=[sink],
            log_every=5,
            checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=3)),
        )
        job.fit(make_state(), loader(10), until=until, resume=resume)
        return sink

    whole = run(tmp_path / "whole", lm.Steps(10))
    first = lm.Runner(
        scored,
        progress=False,
        log_every=5,
        checkpoint=lm.Checkpointer(tmp_path / "parts", every=lm.Every(steps=3)),
        callbacks=[_Fail(at=8)],
    )
    with pytest.raises(RuntimeError, match="a fault"):
        first.fit(make_state(), loader(10), until=lm.Steps(10))
    again = run(tmp_path / "parts", lm.Steps(10), resume="auto")
    assert again["train/auroc"][1] == whole["train/auroc"][1][1:]
    assert again["train/loss"][1] == whole["train/loss"][1][1:]


class _Fail(lm.Callback):
    def __init__(self, at):
        self.at = at

    def on_step(self, view):
        if view.clock.step == self.at:
            raise RuntimeError("a fault")


def test_an_exception_saves_what_is_whole(tmp_path):
    checkpoint = lm.Checkpointer(tmp_path, every=lm.Every(steps=100))
    with pytest.raises(RuntimeError, match="a fault"):
        runner(checkpoint=checkpoint, callbacks=[_Fail(at=5)]).fit(make_state(), loader(), until=lm.Epochs(3))
    assert checkpoint.store.steps() == [5]

    def failing(state, batch):
        if int(state.step) == 7:
            raise ZeroDivisionError
        return step(state, batch)

    for name, transforms, kept in (("pure", [], [7]), ("donated", [lm.donate()], [])):
        checkpoint = lm.Checkpointer(tmp_path / name, every=lm.Every(steps=100))
        job = lm.Runner(failing, progress=False, transforms=transforms, checkpoint=checkpoint)
        with pytest.raises(ZeroDivisionError):
            job.fit(make_state(), loader(), until=lm.Epochs(3))
        assert checkpoint.store.steps() == kept  # a donated state may have been half-way


def test_callbacks_log_to_the_sinks_and_hear_what_is_published():
    heard, sink = [], lm.sinks.Memory()

    class Note(lm.Callback):
        def on_step(self, view):
            if view.clock.step == 2:
                view.log({"note": 1.5, "text": lm.sinks.Text("two"), "rows": float(len(view.batch["x"]))})

        def on_log(self, view):
            heard.append(sorted(view.metrics))

    runner(sinks=[sink], callbacks=[Note()], log_every=3).fit(make_state(), loader(), until=lm.Epochs(1))
    assert sink["note"] == ([2], [1.5])
    assert sink["rows"][1] == [4.0]
    assert heard[0] == ["note", "rows", "text"]
    assert "train/loss" in heard[1]


def test_a_thousand_bf16_ones_sum_to_a_thousand():
    def ones(state, batch):
        return state.replace(step=state.step + 1), {"n": lm.Sum.of(batch), "mean": lm.Mean.of(batch)}

    sink = lm.sinks.Memory()
    batches = [torch.ones(1, dtype=torch.bfloat16)] * 1000
    lm.Runner(ones, progress=False, sinks=[sink], log_every=10**6).fit(make_state(), batches, until=lm.Epochs(1))
    assert sink["train/n"][1] == [1000.0]
    assert sink["train/mean"][1] == [1.0]


def test_nothing_waits_for_the_device_between_two_logging_points(tmp_path, monkeypatch):
    monkeypatch.setattr("lumen.transforms._ema.readable_on_host", lambda leaves: False)  # as on a device
    monkeypatch.setattr("lumen.transforms._guard._FinitenessCheck.is_fine_on_host", lambda check: False)
    waits = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _f=original, _n=name, **k: waits.append(_n) or _f(self, *a, **k)
        )
    at = []

    class Watch(lm.Callback):
        def on_step(self, view):
            at.append(len(waits))

    job = runner(
        transforms=[lm.guard("skip"), lm.ema(0.9), lm.donate(), lm.accumulate(2)],
        callbacks=[Watch()],
        checkpoint=lm.Checkpointer(tmp_path, every=lm.Every(steps=1000)),
        sinks=[lm.sinks.JSONL(tmp_path / "m.jsonl")],
        log_every=20,
    )
    job.fit(make_state(lm.optim.adamw(0.01)), [make_data(4)] * 39, until=lm.Epochs(1))
    assert at[0] <= at[18] == at[1]  # the first step may look at its input
    assert at[38] == at[20]


def test_classification_metrics_in_a_validation():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = lm.metrics.from_torchmetrics(
        torchmetrics.MetricCollection([torchmetrics.classification.MulticlassAccuracy(3, average=None)])
    )

    def scored(state, batch):
        logits = F.pad(batch["x"], (0, 0))
        return {"by": metric.of(logits, batch["y"][:, 0].abs().round().clamp(max=2).long())}

    result = runner().fit(make_state(), loader(), until=lm.Epochs(1), validate=lm.Validate(scored, loader()))
    assert {f"val/by/MulticlassAccuracy/{i}" for i in range(3)} <= result.metrics.keys()


# ------------------------------------------------------------------------------------- a last validation


def measured(steps, *, into, eval_step=eval_step, every=2, last=True, **options):
    memory = lm.sinks.Memory()
    validate = lm.Validate(eval_step, [make_data(4)], every=lm.Every(steps=every), last=last)
    checkpoint = lm.Checkpointer(into, every=lm.Every(steps=2))
    result = runner(sinks=[memory], checkpoint=checkpoint).fit(
        make_state(), loader(), until=lm.Steps(steps), validate=validate, **options
    )
    rows = [(step, values["val/loss"]) for step, values in memory.rows if "val/loss" in values]
    return result, rows


@pytest.mark.parametrize(
    ("steps", "last", "at"), [(5, True, [2, 4, 5]), (5, False, [2, 4]), (4, True, [2, 4]), (1, True, [1])]
)
def test_a_last_validation_where_the_rhythm_has_none(steps, last, at, tmp_path):
    result, rows = measured(steps, last=last, into=tmp_path)
    assert [step for step, _ in rows] == at
    assert result.metrics["val/loss"] == rows[-1][1]
    assert measured(steps, last=last, into=tmp_path, resume="auto")[1] == []  # it is over, and was measured


def test_a_last_validation_that_a_signal_broke_off_is_done_by_the_run_that_goes_on(tmp_path):
    calls = itertools.count(1)

    def broken_off(state, batch):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return eval_step(state, batch)

    whole = measured(5, into=tmp_path / "whole", every=4)[1]
    data = [make_data(4)] * 2  # the signal is seen before the second batch
    validate = lm.Validate(broken_off, data, every=lm.Every(steps=4), last=True)
    checkpoint = lm.Checkpointer(tmp_path / "broken", every=lm.Every(steps=2))
    with pytest.raises(lm.Interrupted):
        runner(checkpoint=checkpoint).fit(make_state(), loader(), until=lm.Steps(5), validate=validate)
    assert lm.Checkpointer(tmp_path / "broken").latest().name == "5"
    after, rows = measured(5, into=tmp_path / "broken", every=4, resume="auto")
    assert rows == whole[-1:] == [(5, after.metrics["val/loss"])]


# ------------------------------------------------------------------------------------------- signals


class Raises(lm.Callback):
    """Raises a signal after the second step; what is to come of others meanwhile is in `handlers`."""

    def __init__(self, number):
        self.number, self.handlers = number, {}

    def on_step(self, view):
        if view.clock.step == 2:
            others = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
            self.handlers = {number: signal.getsignal(number) for number in others}
            signal.raise_signal(self.number)


@pytest.fixture
def usr1_as_term():
    """The line of docs/runner.md."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_a_signal_ended_leaves_a_mark_until_it_begins_again(number, usr1_as_term, tmp_path):
    checkpoint = lm.Checkpointer(tmp_path)
    with pytest.raises(lm.Interrupted) as caught:
        runner(checkpoint=checkpoint, callbacks=[Raises(number)]).fit(make_state(), loader(), until=lm.Steps(9))
    assert caught.value.code == 75
    assert json.loads(checkpoint.interrupted.read_text()) == {"reason": "SIGTERM", "step": 2}
    assert checkpoint.latest().name == "2"
    found = []

    class Looks(lm.Callback):
        def on_start(self, view):
            found.append(checkpoint.interrupted.exists())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runner(checkpoint=checkpoint, callbacks=[Looks()]).fit(make_state(), loader(), until=lm.Steps(9), resume="auto")
    assert found == [False]
    assert not checkpoint.interrupted.exists()  # an error is no reason to start it again


def test_other_signals_are_left_alone(tmp_path):
    callback = Raises(signal.SIGTERM)
    with pytest.raises(lm.Interrupted):
        runner(callbacks=[callback]).fit(make_state(), loader(), until=lm.Steps(9))
    assert callback.handlers
    assert callback.handlers == {number: signal.getsignal(number) for number in callback.handlers}
    assert not any(map(callable, callback.handlers.values())), "as the shell has set them: nohup ignores SIGHUP"
