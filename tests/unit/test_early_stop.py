"""EarlyStop: what it remembers, and what it refuses. When it ends a run: tests/parity/test_early_stop.py."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lumen as lm
from lumen.errors import HyperparameterError, InexactWarning, StepError
from lumen.train.callbacks import CallbackContext
from lumen.train.clock import Clock
from lumen.train.early_stop import EarlyStop

NAN, INF = float("nan"), float("inf")


class Run:
    """Publishes numbers to a callback as a Runner does, until it asks to stop."""

    def __init__(self, callback, step=0):
        self.callback = callback
        self.clock = Clock(step=step)
        self.newest = {}
        self.reasons = []
        callback.on_start(self.view({}))

    def view(self, metrics):
        return CallbackContext(self.clock, None, metrics, stop=self.reasons.append)

    def publish(self, **metrics):
        metrics = {name.replace("_", "/"): value for name, value in metrics.items()}
        self.clock.step += 1
        self.newest |= metrics
        self.callback.on_log(self.view(metrics))

    def validate(self, **metrics):
        self.publish(**metrics)
        self.callback.on_validate(self.view(self.newest))

    def end(self):
        self.callback.on_end(self.view(self.newest))


values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, NAN, INF, -INF]), st.integers(-64, 64).map(lambda n: n / 16))
rules = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "patience": st.integers(1, 5),
        "min_delta": st.sampled_from([0.0, 0.25, 1.0]),
        "threshold": st.sampled_from([None, -3.0, 3.0]),
        "divergence": st.sampled_from([None, -2.0, 2.0]),
        "check_finite": st.booleans(),
    }
)


@given(rules, st.lists(values, min_size=1, max_size=30), st.data())
def test_interrupted_and_restored_is_uninterrupted(rule, series, data):
    cut = data.draw(st.integers(0, len(series)))
    whole = Run(EarlyStop(monitor="val/loss", **rule))
    for value in series:
        whole.validate(val_loss=value)

    first = Run(EarlyStop(monitor="val/loss", **rule))
    for value in series[:cut]:
        first.validate(val_loss=value)
    # A run that was asked to stop is not interrupted any more: there is nothing left of it.
    if first.reasons:
        assert first.reasons == whole.reasons
        return
    second = EarlyStop(monitor="val/loss", **rule)
    second.load_state_dict(json.loads(json.dumps(first.callback.state_dict(), allow_nan=False)))
    second = Run(second, step=max(cut, 1))
    for value in series[cut:]:
        second.validate(val_loss=value)
    assert second.reasons == whole.reasons
    if cut:
        assert second.callback.state_dict() == whole.callback.state_dict()


def test_it_asks_once():
    run = Run(EarlyStop(monitor="train/loss", patience=1))
    for _ in range(4):
        run.publish(train_loss=1.0)
    assert run.reasons == ["train/loss has not improved on 1 for 1 report"]


def test_a_run_from_the_beginning_has_no_memory_and_one_that_goes_on_has():
    callback = EarlyStop(monitor="val/loss", patience=2)
    for step, bad, reports in ((0, 1, 2), (0, 1, 2), (7, 2, 3)):
        run = Run(callback, step=step)
        run.validate(val_loss=1.0)
        run.validate(val_loss=1.0)  # of the third run, which its first report has ended
        assert callback.state_dict() == {"best": 1.0, "bad": bad, "reports": reports}


def test_reports_of_others_are_none_of_its_business():
    run = Run(EarlyStop(monitor="val/loss", patience=1))
    run.publish(train_loss=1.0)
    run.publish(train_loss=1.0)
    run.validate(val_loss=1.0)
    run.publish(train_loss=1.0)
    run.end()
    assert run.reasons == []


def test_a_name_that_the_validation_does_not_give_is_refused_at_the_first_one():
    run = Run(EarlyStop(monitor="val/los"))
    run.publish(train_loss=1.0, lr=0.1)
    with pytest.raises(StepError, match=r"'val/los'.*'lr', 'train/loss', 'val/loss'"):
        run.validate(val_loss=1.0)


def test_a_name_that_training_does_not_give_is_refused_at_the_second_report():
    run = Run(EarlyStop(monitor="train/los"))
    run.publish(train_loss=1.0)
    with pytest.raises(StepError, match="'train/loss'"):
        run.publish(train_loss=1.0)


def test_another_validation_does_not_make_it_miss_its_own():
    run = Run(EarlyStop(monitor="test/loss"))
    for _ in range(3):
        run.validate(val_loss=1.0)
    run.validate(test_loss=1.0)
    run.end()


def test_a_metric_that_another_callback_logs_after_the_validation_is_in_time():
    run = Run(EarlyStop(monitor="val/f1", mode="max"))
    run.publish(val_loss=1.0)
    run.publish(val_f1=0.5)
    run.callback.on_validate(run.view(run.newest))
    run.end()


def test_the_lanes_of_an_ensemble_are_not_one_number():
    run = Run(EarlyStop(monitor="val/loss"))
    run.newest = {"val/loss/0": 1.0, "val/loss/1": 2.0}
    with pytest.raises(StepError, match="'val/loss/0', 'val/loss/1'"):
        run.validate()


def test_a_runner_ends_where_its_validation_got_no_better():
    def step(state, batch):
        def loss_fn(params, batch):
            return (state.apply(params, batch)[0] ** 2).mean()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    def eval_step(state, batch):
        return {"distance": (state.step - 6).abs().double()}  # least at step 6

    data = [torch.ones(4, 2)]
    runner = lm.Runner(step, callbacks=[EarlyStop(monitor="val/distance", patience=3)], progress=False)
    validate = lm.Validate(eval_step, data, every=lm.Every(steps=2))
    for _ in range(2):  # the second run has forgotten the first
        state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
        result = runner.fit(state, data, until=lm.Steps(100), validate=validate)
        assert (result.clock.step, result.reason) == (12, "val/distance has not improved on 0 for 3 reports")

    runner = lm.Runner(step, callbacks=[EarlyStop(monitor="val/loss")], progress=False)
    with pytest.raises(StepError, match="'val/distance'"):
        runner.fit(state, data, until=lm.Steps(100), validate=validate)


def test_a_metric_that_never_came_is_told_at_the_end():
    run = Run(EarlyStop(monitor="val/loss"))
    run.publish(train_loss=1.0)
    with pytest.warns(InexactWarning, match=r"'val/loss'.*never published.*'train/loss'.*lm\.Validate"):
        run.end()


@pytest.mark.parametrize(
    "rule",
    [
        {"mode": "least"},
        {"patience": 0},
        {"patience": 1.5},
        {"min_delta": -0.1},
        {"min_delta": math.nan},
        {"threshold": math.nan},
        {"divergence": math.inf},
    ],
)
def test_bad_rules_are_refused(rule):
    with pytest.raises(HyperparameterError):
        EarlyStop(monitor="val/loss", **rule)
