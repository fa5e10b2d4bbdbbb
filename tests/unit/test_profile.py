"""Profile: what it writes, when it is on, and that it is off afterwards whatever happens."""

import json
import re
import tempfile
from pathlib import Path

import pytest
import torch

import lumen as lm
from lumen.errors import HyperparameterError
from lumen.train.callbacks import CallbackContext
from lumen.train.clock import Clock
from lumen.train.profile import Profile

CALL = CallbackContext(Clock(), None)
RULE = {"wait": 1, "warmup": 1, "active": 2}


@pytest.fixture
def directory():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path) / "not" / "there"


def run(callback, steps):
    """So many steps; each multiplies matrices of a size that tells it from the others."""
    callback.on_start(CALL)
    for i in range(steps):
        torch.mm(torch.ones(i + 1, 3), torch.ones(3, 5))
        callback.on_step(CALL)


def is_on():
    return torch.autograd._profiler_enabled()


def traces(directory):
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.pt.trace.json"))]


def names(trace):
    return [event.get("name", "") for event in trace["traceEvents"]]


def calls(table, op):
    """The number of calls of `op`: the last column of the table."""
    return int(re.search(rf"^ +{re.escape(op)} .* (\d+) *$", table, re.MULTILINE)[1])


def test_the_active_steps_are_written_for_tensorboard(directory):
    callback = Profile(directory, **RULE)
    run(callback, 10)
    callback.on_end(CALL)
    (trace,) = traces(directory)
    assert names(trace).count("aten::mm") == 2
    assert sorted(name for name in set(names(trace)) if name.startswith("ProfilerStep")) == [
        "ProfilerStep#2",
        "ProfilerStep#3",
    ]
    # What the TensorBoard plugin looks for: worker, span, ending.
    (path,) = directory.glob("*.json")
    assert re.fullmatch(r"(.*?)(\.\d+)?\.pt\.trace\.json", path.name)[2]
    table = path.with_name(path.name.replace(".pt.trace.json", ".txt")).read_text()
    assert calls(table, "aten::mm") == 2


def test_it_is_off_after_the_last_cycle_and_each_cycle_has_its_own_events(directory):
    callback = Profile(directory, repeat=2, **RULE)
    callback.on_start(CALL)
    on = []
    for _ in range(12):
        torch.mm(torch.ones(2, 3), torch.ones(3, 5))
        callback.on_step(CALL)
        on.append(is_on())
    # On from the end of the warm-up step to that of the last active one.
    assert on == [False, True, True, False] * 2 + [False] * 4
    assert callback._profiler is None
    assert [names(trace).count("aten::mm") for trace in traces(directory)] == [2, 2]
    assert [calls(path.read_text(), "aten::mm") for path in directory.glob("*.txt")] == [2, 2]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("ending", ["end", "exception"])
def test_it_is_off_wherever_the_run_ends(directory, steps, ending):
    callback = Profile(directory, **RULE)
    run(callback, steps)
    if ending == "end":
        callback.on_end(CALL)
    else:
        callback.on_exception(CALL, ValueError())
    assert not is_on()
    assert len(traces(directory)) == (steps >= 2)  # what was recorded, of the step under way at least


def test_what_cannot_be_written_does_not_hide_the_error(directory):
    callback = Profile(directory, **RULE)
    directory.parent.mkdir()
    directory.write_text("a file is in the way")
    run(callback, 3)
    error = ValueError("the error")
    callback.on_exception(CALL, error)
    assert not is_on()
    assert "the profile was lost as well: FileExistsError" in error.__notes__[0]


def test_it_profiles_a_runner_and_again_in_its_next_run(directory):
    def step(state, batch):
        def loss_fn(params, batch):
            out, _ = state.apply(params, batch)
            return (out**2).mean()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    runner = lm.Runner(step, callbacks=[Profile(directory, **RULE)], progress=False)
    for _ in range(2):
        runner.fit(state, [torch.ones(4, 2)] * 6, until=lm.Epochs(1))
    assert len(traces(directory)) == 2
    assert "autograd::engine::evaluate_function: AddmmBackward0" in names(traces(directory)[0])

    def broken(state, batch):
        if state.step >= 3:
            raise ValueError("the step's own")
        return step(state, batch)

    runner = lm.Runner(broken, callbacks=[Profile(directory, **RULE)], progress=False)
    with pytest.raises(ValueError, match="the step's own"):
        runner.fit(state, [torch.ones(4, 2)] * 6, until=lm.Epochs(1))
    assert not is_on()
    assert len(traces(directory)) == 3


def test_memory_and_stacks_are_recorded_and_the_trace_can_be_left_out(directory):
    callback = Profile(directory, memory=True, stacks=True, **RULE)
    run(callback, 4)
    (trace,) = traces(directory)
    assert "[memory]" in names(trace)
    assert any("test_profile.py" in name for name in names(trace))
    (table,) = directory.glob("*.txt")
    assert "Self CPU Mem" in table.read_text()

    other = directory / "other"
    run(Profile(other, trace=False, **RULE), 4)
    assert [path.suffix for path in other.iterdir()] == [".txt"]


@pytest.mark.parametrize("rule", [{"wait": -1}, {"warmup": 0}, {"active": 0}, {"repeat": 0}, {"active": 1.5}])
def test_bad_counts_are_refused(rule):
    with pytest.raises(HyperparameterError, match=next(iter(rule))):
        Profile("nowhere", **rule)
