"""Goodput: where the time of a run went, on a clock that the tests move; and which rank keeps the others waiting."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen.parallel.comm.wait_time import WAIT_TIME, StepTime
from lumen.train import goodput
from lumen.train.goodput import OVERHEADS, STEPS, Goodput, GoodputRecorder
from lumen.train.stragglers import Stragglers


class Now:
    """A clock that goes on only by `pass_`."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.seconds

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds


class Wall:
    """The time of day, which goes on with a clock, and between two runs."""

    def __init__(self, now: Now) -> None:
        self.now, self.between = now, 0.0

    def time(self) -> float:
        return 1.7e9 + self.now.seconds + self.between


# ------------------------------------------------------------------------------------------- the recorder


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 10),
            st.floats(0, 10),
            st.lists(st.tuples(st.sampled_from(["validation", "checkpoint", "logging"]), st.floats(0, 10))),
        ),
        max_size=6,
    )
)
def test_every_second_counts_once(steps: list[tuple[float, float, list[tuple[str, float]]]]) -> None:
    now = Now()
    recorder, began = GoodputRecorder(now), now.seconds
    expected = dict.fromkeys((STEPS, *OVERHEADS), 0.0)

    def batches() -> Any:
        for fetch, _, _ in steps:
            now.pass_(fetch)
            yield fetch

    for i, _ in enumerate(recorder.batches(batches)):
        fetch, compute, events = steps[i]
        now.pass_(compute)
        expected["data" if i else "startup"] += fetch
        expected[STEPS if i else "startup"] += compute
        for name, seconds in events:
            with recorder.during(name), recorder.during("logging"):  # what is inside belongs to it
                now.pass_(seconds)
            expected[name] += seconds
        assert recorder.measured().total == pytest.approx(now.seconds - began)
    assert recorder.measured().seconds == pytest.approx(expected, abs=1e-9)
    assert 0 <= recorder.measured().ratio <= 1


def test_steps_that_were_undone_are_no_goodput() -> None:
    now = Now()
    recorder = GoodputRecorder(now)
    for i in recorder.batches(lambda: range(5)):
        if i == 2:
            saved = recorder.state_dict()
        now.pass_(2.0)
    recorder.undo(saved)  # steps 2, 3 and 4
    assert recorder.measured().seconds == {
        STEPS: 2.0, "startup": 2.0, "data": 0.0, "validation": 0.0, "checkpoint": 0.0, "logging": 0.0, "rewind": 6.0,
        "restart": 0.0,
    }  # fmt: skip


def test_shown_with_the_largest_loss_first() -> None:
    shown = repr(Goodput({STEPS: 3.0, "data": 0.25, "startup": 0.75, "restart": 0.0}))
    assert shown == "Goodput(75.0% of 4.0 s; startup 18.8%, data 6.2%)"
    assert (repr(Goodput()), Goodput().ratio) == ("Goodput(0.0% of 0.0 s)", 0.0)


# ------------------------------------------------------------------------------------------- a run


class Sink:
    """A sink that takes 3 seconds."""

    def __init__(self, now: Now) -> None:
        self.now, self.rows = now, []

    def log(self, step: int, values: Any) -> None:
        self.now.pass_(3.0)
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        pass


class Data:
    """Six batches, each of which takes a second to come."""

    def __init__(self, now: Now) -> None:
        self.now = now

    def __iter__(self) -> Any:
        for _ in range(6):
            self.now.pass_(1.0)
            yield torch.ones(2)


def fit(now: Now, until: lm.train.clock.Until, directory: Any = None, **options: Any) -> tuple[lm.Result, Sink]:
    """The first step takes 10 seconds, the others 4, a validation 5 and a save 2."""
    sink, calls = Sink(now), iter([10.0])

    def step(state: Any, batch: Any) -> Any:
        now.pass_(next(calls, 4.0))
        return {"n": state["n"] + 1}, {"loss": batch.sum()}

    def measure(state: Any, batch: Any) -> Any:
        now.pass_(5.0)
        return {"loss": batch.sum()}

    checkpoint = None if directory is None else lm.Checkpointer(directory, every=lm.Every(steps=3))
    runner = lm.Runner(step, checkpoint=checkpoint, sinks=[sink], log_every=2, progress=False, time_fn=now)
    validate = lm.Validate(measure, [torch.ones(1)], every=lm.Every(steps=4))
    return runner.fit({"n": torch.tensor(0)}, Data(now), until=until, validate=validate, **options), sink


def test_a_run_says_where_its_time_went() -> None:
    result, sink = fit(Now(), lm.Steps(6))
    assert result.goodput.seconds == {
        STEPS: 20.0,
        "startup": 11.0,
        "data": 5.0,
        "validation": 8.0,  # with its sink
        "checkpoint": 0.0,
        "logging": 9.0,
        "rewind": 0.0,
        "restart": 0.0,
    }
    assert result.goodput.ratio == 20 / 53
    rows = [row for _, row in sink.rows if "goodput" in row]
    assert [row["goodput"] for row in rows] == [4 / 16, 12 / 29, 20 / 50]
    assert [row["data_wait"] for row in rows] == [2 / 16, 2 / 13, 2 / 21]
    assert "goodput 38%, startup 21%, logging 17%, validation 15%, data 9%" in result._repr_html_()


@pytest.mark.filterwarnings("ignore:this run resumes at batch 3")
def test_a_resumed_run_counts_what_was_before(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = Now()
    wall = Wall(now)
    monkeypatch.setattr(goodput, "time", wall)
    first, _ = fit(now, lm.Steps(3), tmp_path)
    wall.between = 1000.0
    again, _ = fit(now, lm.Steps(6), tmp_path, resume="auto")
    assert first.goodput.seconds[STEPS] == 8.0
    assert again.goodput.seconds[STEPS] == 8.0 + 2 * 4.0  # the third step is the first of its process
    assert again.goodput.seconds["restart"] == 1003.0  # with what was logged after the last save
    assert again.goodput.seconds["startup"] == 2 * 10.0 + 1.0 + 1.0 + 3.0  # skips three batches again
    fork, _ = fit(now, lm.Steps(6), tmp_path / "other", resume=tmp_path)
    assert fork.goodput.seconds["restart"] == again.goodput.seconds["restart"]  # another run, whenever it begins


def test_saving_counts_while_it_blocks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = Now()
    store = lm.checkpoint.Store
    save = store.save
    monkeypatch.setattr(store, "save", lambda *args, **kwargs: (now.pass_(2.0), save(*args, **kwargs))[1])
    result, _ = fit(now, lm.Steps(6), tmp_path)
    assert result.goodput.seconds["checkpoint"] == 4.0
    assert result.goodput.seconds[STEPS] == 20.0


@pytest.mark.parametrize("steps", [10, 20])
def test_a_step_reads_the_clock_twice(steps: int) -> None:
    now = Now()
    runner = lm.Runner(lambda state, batch: (state, {}), log_every=10**6, progress=False, time_fn=now)
    runner.fit({}, [torch.ones(1)] * steps, until=lm.Steps(steps))
    few = now.readings
    runner.fit({}, [torch.ones(1)] * (steps + 7), until=lm.Steps(steps + 7))
    assert now.readings - 2 * few == 2 * 7


# ------------------------------------------------------------------------------------------- stragglers


class Group:
    """The group of a run, as far as stragglers look at it."""

    is_main, step_seconds = True, 0.0


def watch(*windows: list[tuple[float, float]]) -> list[str]:
    """What is warned of after these windows."""
    watched = Stragglers(Group(), GoodputRecorder(Now()))  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for window in windows:
            watched.numbers(window)
    return [str(warning.message) for warning in caught]


SLOW, EVEN, OTHER = [(10.0, 0.0), (8.0, 7.0), (10.0, 0.0)], [(10.0, 0.0)] * 3, [(30.0, 0.0), (10.0, 0.0), (10.0, 0.0)]


def test_a_rank_that_stays_slow_is_named_once() -> None:
    (warning,) = watch(SLOW, SLOW, SLOW, SLOW, SLOW)
    assert warning.startswith("rank 1 has been the slowest rank in the last 3 windows")
    assert "1.5 times as long as the median rank's, and 47% of that is waiting for data" in warning


@pytest.mark.parametrize(
    "windows",
    [
        (SLOW, SLOW),
        (SLOW, SLOW, EVEN, SLOW, SLOW),
        (SLOW, OTHER) * 3,
        [[(step / 30, data / 30) for step, data in SLOW]] * 89,  # 29 seconds altogether: not yet three windows
    ],
    ids=["two windows", "even between", "now one and now another", "short"],
)
def test_a_rank_that_is_slow_for_a_while_is_not(windows: Any) -> None:
    assert watch(*windows) == []


def test_short_windows_are_added_up() -> None:
    assert len(watch(*[[(step / 30, data / 30) for step, data in SLOW]] * 95)) == 1


def test_of_two_ranks_the_slower_one_is_compared_with_the_faster() -> None:
    watched = Stragglers(Group(), GoodputRecorder(Now()))  # type: ignore[arg-type]
    assert watched.numbers([(1.0, 0.5), (0.5, 0.0)]) == {"slowest_rank": 0, "slowest_ratio": 3.0}
    assert watched.numbers([(0.0, 0.0), (0.0, 0.0)]) == watched.numbers([(1.0, 0.0)]) == watched.numbers([]) == {}


def test_waiting_in_a_collective_is_not_a_rank_s_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Now()
    monkeypatch.setattr(WAIT_TIME, "time_fn", now)

    class Work:
        def wait(self) -> None:
            now.pass_(6.0)

    step_time = StepTime(now)
    WAIT_TIME.wait(Work())  # between two steps
    step_time.begin()
    now.pass_(1.0)
    WAIT_TIME.wait(Work())
    now.pass_(0.5)
    step_time.end()
    assert step_time.seconds == 1.5
