"""`successive_halving`: each trial is its own run, the rule is the published one, and resuming is exact."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen import errors
from lumen.data import Cursor
from lumen.train.batch_stream import BatchStream
from lumen.train.device_feed import open_batches
from lumen.train.distributed import ProcessGroupContext
from lumen.train.halving_rungs import make_rungs

from .models import PLAIN, STEADY, Job, assert_same, jobs, train

RATES = (0.3, 1e-4, 0.1, 0.03, 0.01)
STACKS = {
    "plain": lambda lanes: lanes,
    "donated": lambda lanes: lm.compose(lanes, lm.donate()),
    "averaged": lambda lanes: lm.compose(lanes, lm.guard(), lm.ema(0.5)),
}


def eval_step(job: Job) -> Any:
    def evaluate(state: Any, batch: Any) -> dict[str, Any]:
        value, aux = job.loss_fn(state)(state.params, batch)
        return {"loss": value, **aux.metrics}

    return evaluate


def search(step: Any, state: Any, data: Any, **options: Any) -> lm.HalvingResult:
    defaults = {"monitor": "train/loss", "min_steps": 2, "max_steps": 6, "eta": 2, "progress": False}
    return lm.successive_halving(step, state, data, **{**defaults, **options})


# ------------------------------------------------------------------------------- each trial is its own run


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=2)
@given(job=jobs(STEADY, losses=("mean",), rows=(3, 5)), lanes=st.sampled_from([None, 1, 2, 3]))
def test_each_trial_is_trained_as_alone(name: str, job: Job, lanes: int | None) -> None:
    """On the same batches, whatever the number of lanes: its metrics at each rung, and the best one's state."""
    batches, val = job.batches(4), [job.batch(9), job.batch(10)]
    validate = lm.Validate(eval_step(job), val)
    result = search(
        STACKS[name](lm.sweep(lr=RATES))(job.step),
        job.state(),
        batches,
        monitor="val/loss",
        validate=validate,
        lanes=lanes,
    )
    for trial in result.trials:
        alone = lm.optim.with_learning_rate(job.state(), trial.values["lr"])
        state = result.step.init(alone)
        for step in range(trial.steps):
            state, _ = result.step(state, batches[step % 4])
            if step + 1 in result.rungs:
                expected = lm.evaluate(validate.step, state, val)["loss"]
                assert trial.metrics[result.rungs.index(step + 1)] == pytest.approx(expected, rel=1e-9)
        if trial is result.best:
            assert_same(result.state, state)
            assert_same(result.export(), result.step.export(state))
            assert list(result.state.slots) == list(state.slots)
    tables = by_rung(result)
    assert [*map(set, tables), {result.best.number}] == chosen(tables, len(RATES), 2, "min")


def test_a_compiled_step_is_compiled_again_for_fewer_lanes() -> None:
    job, sweep = Job(), lm.sweep(lr=[1e-3, 0.1])
    traced = lm.compose(lm.compile(backend="eager"), sweep, lm.donate())(job.step)
    result = search(traced, job.state(), job.batches(2), max_steps=4)
    assert_same(result.state, search(sweep(job.step), job.state(), job.batches(2), max_steps=4).state)
    assert [len(rung) for rung in by_rung(result)] == [2, 1]


@settings(max_examples=2)
@given(job=jobs(PLAIN, rows=(3, 5)))
def test_trials_of_an_ensemble_have_seeds_of_their_own(job: Job) -> None:
    """The metric is that of training, merged over the steps since the last rung."""

    def step(state: Any, batch: Any) -> Any:
        noisy = state.replace(params=lm.tree.map(lambda p: p + lm.random.normal(state.key) / 9, state.params))
        return job.step(noisy, batch)

    members, batches = lm.ensemble(4), job.batches(6)
    result = search(members(step), job.state(), batches, lanes=3)
    seeds = members.init(job.state()).seed
    for trial, seed in zip(result.trials, seeds, strict=True):
        state = job.state().replace(seed=seed)
        for metric, (begin, end) in zip(trial.metrics, itertools.pairwise((0, *result.rungs)), strict=False):
            state, metrics = train(step, state, batches[begin:end])
            assert metric == pytest.approx(float(metrics["loss"]), rel=1e-9)
        if trial is result.best:
            assert_same(result.state, state)


def test_a_state_for_each_trial_and_its_own_state_does_not_change() -> None:
    job, net = Job(), torch.nn.Linear(4, 3).double()
    states = [job.state().replace(params=lm.tree.map(lambda p, i=i: p * i, job.state().params)) for i in range(3)]
    before = lm.tree.map(torch.clone, states)
    step = lm.compose(lm.ensemble(3), lm.donate())(job.step)
    results = [search(step, initial, job.batches(2)) for initial in (states, lambda i: states[i])]
    assert_same(results[0].state, results[1].state, exact=True)
    assert_same(states, before, exact=True)
    with pytest.raises(errors.StateError, match=r"ensemble\(3\)\.init got 2 states"):
        search(step, states[:2], job.batches(2))
    with pytest.raises(errors.StepError, match="the state is a module"):
        search(step, net, job.batches(2))


# ------------------------------------------------------------------------------- the rule


def by_rung(result: lm.HalvingResult) -> list[dict[int, float]]:
    """The metrics of each rung's trials, by their numbers."""
    return [
        {trial.number: trial.metrics[rung] for trial in result.trials if trial.rung >= rung}
        for rung in range(len(result.rungs))
    ]


def is_better(a: float, b: float, mode: str) -> bool:
    """Whether one metric is strictly better than another; NaN is worse than any number."""
    if math.isnan(a) or math.isnan(b):
        return not math.isnan(a) and math.isnan(b)
    return a < b if mode == "min" else a > b


def first(table: Any, trials: set[int], count: int, mode: str) -> set[int]:
    """The trials that fewer than `count` others precede: by a better metric, or an equal one and a lower number."""

    def precedes(i: int, j: int) -> bool:
        return is_better(table[i], table[j], mode) or (not is_better(table[j], table[i], mode) and i < j)

    return {i for i in trials if sum(precedes(j, i) for j in trials - {i}) < count}


def chosen(tables: Sequence[Any], trials: int, eta: int, mode: str) -> list[set[int]]:
    """The trials at each rung, and the best: of S_k go on the first ⌊|S_k| / eta⌋, which are ordered by their losses.

    With eta = 2 it is the rule of Jamieson and Talwalkar, which leaves open how to order NaN and equal losses.
    """
    alive = [set(range(trials))]
    for table in tables[:-1]:
        alive.append(first(table, alive[-1], max(1, len(alive[-1]) // eta), mode))
    return [*alive, first(tables[-1], alive[-1], 1, mode)]


METRIC = st.one_of(st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf]), st.floats(-2, 2, width=32))


@settings(max_examples=25)
@given(
    table=st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(METRIC, min_size=n, max_size=n), min_size=3, max_size=3)
    ),
    eta=st.integers(2, 4),
    mode=st.sampled_from(["min", "max"]),
    lanes=st.sampled_from([None, 1, 2, 4]),
)
def test_the_choice_is_that_of_the_published_rule(table: Any, eta: int, mode: str, lanes: int | None) -> None:
    """Over random tables of metrics, with NaN, infinities and ties; the rungs are at steps 1, eta and eta²."""
    trials, steps = len(table[0]), [eta**i for i in range(3)]
    values = torch.tensor(table, dtype=torch.float64)

    def step(state: Any, batch: Any) -> Any:
        rung = (state["step"] + 1 > torch.tensor(steps)).sum().clamp(max=2)
        return {**state, "step": state["step"] + 1}, {"loss": lm.Last(values[rung, state["trial"]])}

    states = [{"trial": torch.tensor(i), "step": torch.tensor(0)} for i in range(trials)]
    *expected, best = chosen(table, trials, eta, mode)
    options = {"mode": mode, "eta": eta, "min_steps": 1, "max_steps": eta**2, "lanes": lanes}
    if any(all(math.isnan(table[rung][i]) for i in alive) for rung, alive in enumerate(expected)):
        with pytest.raises(errors.NonFiniteError, match="train/loss is NaN in all"):
            search(lm.ensemble(trials)(step), states, [torch.zeros(1)], **options)
        return
    result = search(lm.ensemble(trials)(step), states, [torch.zeros(1)], **options)
    assert [set(rung) for rung in by_rung(result)] == expected
    for rung, found in enumerate(by_rung(result)):
        assert list(found.values()) == pytest.approx([table[rung][i] for i in found], nan_ok=True)
    assert {result.best.number} == {result.ranked()[0].number} == {int(result.state["trial"])} == best


@given(st.integers(1, 200), st.integers(2, 6), st.integers(1, 50), st.integers(0, 2000))
def test_rungs_end_at_the_most_steps(trials: int, eta: int, least: int, more: int) -> None:
    rungs = make_rungs(trials, eta, least, least + more)
    assert rungs[0].step == least
    assert rungs[-1].step == least + more
    assert sum(rung.steps for rung in rungs) == least + more
    assert all(b.step == a.step * eta for a, b in itertools.pairwise(rungs[:-1]))
    assert rungs[-1].step <= rungs[-2].step * eta if len(rungs) > 1 else more == 0
    assert [rung.size for rung in rungs] == [max(1, trials // eta**i) for i in range(len(rungs))]
    assert [rung.keep for rung in rungs] == [rung.size for rung in rungs[1:]] + [1]


class Watch(lm.Transform):
    """Keeps weak references to the lanes that steps are called with."""

    name, level = "watch", "seeded"
    lanes: dict[int, list[Any]] = {}

    def wrap_host(self, step: Any) -> Any:
        def run(state: Any, batch: Any) -> Any:
            Watch.lanes.setdefault(len(state.step), []).append(weakref.ref(state.params["0.weight"]))
            dropped = [seen for lanes, seen in Watch.lanes.items() if lanes != len(state.step)]
            assert all(reference() is None for seen in dropped for reference in seen)
            return step(state, batch)

        return run


@pytest.mark.parametrize("donates", [False, True])
def test_dropped_lanes_are_freed(donates: bool) -> None:
    job = Job()
    Watch.lanes = {}
    inside = [lm.donate()] if donates else []
    step = lm.compose(Watch(), lm.sweep(lr=[10.0**-i for i in range(1, 9)]), *inside)(job.step)
    result = search(step, job.state(), job.batches(3), min_steps=1, max_steps=8)
    assert list(Watch.lanes) == [8, 4, 2, 1]
    for leaf in lm.tree.tensors(result.state):
        assert leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()


def test_trials_get_the_same_batches_from_a_loader_however_many_run_at_once() -> None:
    job = Job()
    data = lm.Loader(job.batch(rows=7), 2, seed=3)
    results = [
        search(lm.sweep(lr=RATES)(job.step), job.state(), data, lanes=lanes, max_steps=9) for lanes in (None, 1, 2)
    ]
    for result in results[1:]:
        assert [trial.metrics for trial in result.trials] == [
            pytest.approx(trial.metrics) for trial in results[0].trials
        ]
        assert_same(result.state, results[0].state)


def test_a_stream_reads_on_where_it_was_and_again_from_before() -> None:
    opened = []

    class Data(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            opened.append(len(opened))
            return super().__iter__()

    data = Data(torch.arange(3))
    stream = BatchStream(open_batches(data, {}, ProcessGroupContext({})))
    assert [int(x) for x in stream.read(Cursor(), 2)] == [0, 1]
    assert [int(x) for x in stream.read(stream.position, 3)] == [2, 0, 1]
    assert stream.position == Cursor(1, 2)
    assert len(opened) == 2
    assert [int(x) for x in stream.read(Cursor(0, 1), 3)] == [1, 2, 0]


# ------------------------------------------------------------------------------- resuming


class KilledError(Exception):
    """The process is killed."""


def test_a_killed_search_resumes_bitwise(tmp_path: Path) -> None:
    """With a part of the first rung done, and of the last one; dropout draws from torch's generators."""
    job, calls, killed_at = Job(model="dropout"), itertools.count(1), 0
    data = lm.Loader(job.batch(rows=9), 4, seed=1)

    def step(state: Any, batch: Any) -> Any:
        if next(calls) == killed_at:
            raise KilledError
        return job.step(state, batch)

    def run(directory: str, **options: Any) -> lm.HalvingResult:
        torch.manual_seed(5)
        runs = lm.compose(lm.sweep(lr=[*RATES, 3e-3]), lm.ema(0.9))(step)
        options = {"lanes": 2, "max_steps": 4, "directory": tmp_path / directory, "resume": "auto", **options}
        return search(runs, job.state(), data, **options)

    expected = run("alone")
    assert next(calls) == 11, "of six trials, and of three, two at a time, two steps each"
    for killed_at in (4, 9):
        calls = itertools.count(1)
        with pytest.raises(KilledError) as raised:
            run(f"killed at {killed_at}")
        assert "raised in rung" in raised.value.__notes__[0]
        result = run(f"killed at {killed_at}")
        assert result == expected
        assert_same(result.state, expected.state, exact=True)
    killed_at = next(calls)
    assert run("alone") == expected, "it is through, and trains nothing"
    with pytest.raises(errors.CheckpointError, match="has monitor 'train/loss', and this one 'train/accuracy'"):
        run("alone", monitor="train/accuracy")
    with pytest.raises(errors.CheckpointError, match=r'To resume that search, write resume="auto"'):
        run("alone", resume="never")


def test_the_table_has_the_best_first() -> None:
    job = Job()
    result = search(lm.sweep(lr=[1e-4, 0.1, 1e-3], seed=[1, 2, 3])(job.step), job.state(), job.batches(1), eta=3)
    assert result.table().splitlines()[0].split() == ["trial", "lr", "seed", "step", "2", "step", "6"]
    assert result.table().splitlines()[1].split()[:3] == ["1", "0.1", "2"]
    assert repr(result).startswith("HalvingResult(train/loss ")
    assert "of trial 1, lr=0.1, seed=2; 3 trials)" in repr(result)


# ------------------------------------------------------------------------------- bad input


def bad(**options: Any) -> Any:
    job = Job()
    step = options.pop("step", lm.sweep(lr=RATES)(job.step))
    return search(step, options.pop("state", job.state()), options.pop("data", job.batches(2)), **options)


VALIDATE = lm.Validate(lambda state, batch: {"loss": torch.zeros(())}, [torch.zeros(1)])
BAD = {
    "no lanes": ({"step": lambda state, batch: (state, {})}, errors.StepError, "has no lanes to search over"),
    "eta": ({"eta": 1}, errors.HyperparameterError, "eta=1 is not allowed: give a whole number from 2"),
    "steps": ({"min_steps": 9}, errors.HyperparameterError, "max_steps=6 is not allowed: give a whole number from 9"),
    "no lanes at once": ({"lanes": 0}, errors.HyperparameterError, "lanes=0 is not allowed"),
    "mode": ({"mode": "least"}, errors.HyperparameterError, "mode='least' is unknown; give 'min' or 'max'"),
    "resume": ({"resume": "always"}, errors.HyperparameterError, "resume='always' is unknown"),
    "nowhere": ({"resume": "auto"}, errors.CheckpointError, 'write directory="runs/search"'),
    "no metric": ({"monitor": "loss"}, errors.StepError, r"which are called 'train/…'"),
    "no such metric": ({"monitor": "train/los"}, errors.StepError, r"returns 'loss', 'accuracy', 'rows'"),
    "no validation": ({"monitor": "val/loss"}, errors.StepError, r"write validate=lm\.Validate\(eval_step"),
    "unused": ({"validate": VALIDATE}, errors.StepError, r"called val/…\. .*leave out validate"),
    "several numbers": (
        {"step": lm.ensemble(2)(lambda state, batch: (state, {"loss": torch.zeros(3)}))},
        errors.StepError,
        r"has the shape \[3\] in each trial",
    ),
    "a plan of its own": (
        {"monitor": "val/loss", "validate": lm.Validate(VALIDATE.step, [], every=lm.Every(steps=1))},
        errors.StepError,
        "Leave them out",
    ),
    "nothing to validate on": (
        {"monitor": "val/loss", "validate": lm.Validate(VALIDATE.step, [])},
        errors.BatchError,
        "the data to evaluate on is empty",
    ),
    "validation data once": (
        {"monitor": "val/loss", "validate": lm.Validate(VALIDATE.step, iter([1]))},
        errors.BatchError,
        "which can be read once",
    ),
    "no data": ({"data": []}, errors.BatchError, "it is empty"),
    "data once, for many": ({"data": iter([1]), "lanes": 1}, errors.BatchError, "or leave out lanes"),
    "data once, to resume": ({"data": iter([1]), "directory": "x"}, errors.BatchError, "or leave out directory"),
    "data ends": ({"data": iter(Job().batches(3))}, errors.BatchError, "gave no batch in epoch 1"),
    "a batch each": (
        {"step": lm.ensemble(2, batch_dim=0)(lambda state, batch: (state, {}))},
        errors.OrderError,
        "Leave out batch_dim",
    ),
    "ddp": (
        {"step": lm.compose(lm.ensemble(2), lm.ddp())(lambda state, batch: (state, {}))},
        errors.OrderError,
        r"does not take lm\.ddp: lanes cannot be reduced over processes",
    ),
    "unroll": (
        {"step": lm.compose(lm.unroll(2), lm.ensemble(2))(lambda state, batch: (state, {}))},
        errors.OrderError,
        r"does not take lm\.unroll",
    ),
    "another's name": ({"reduction_factor": 4}, errors.ArgumentError, r"no argument 'reduction_factor'.*Write: eta=3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, error, says = BAD[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says):
        bad(**options)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.WorldError, match="this is one of 2 that were started together"):
        bad()
