"""Nothing of a run is alive when it is over: it goes by reference counts, without waiting for the cyclic collector."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref

import pytest
import torch

import lumen as lm
from lumen import tree


class BrokenError(Exception):
    """What a data set raises."""


class Data:
    """Rows that a weak reference may watch; row `bad` cannot be read."""

    def __init__(self, bad=None):
        self.bad = bad

    def __len__(self):
        return 8

    def __getitem__(self, row):
        if row == self.bad:
            raise BrokenError
        return torch.full((3,), float(row))


def step(state, batch):
    def loss_fn(params, batch):
        return lm.Mean.of(state.apply(params, batch)[0].square())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


class Sink:
    """A sink that may fail."""

    def __init__(self, broken):
        self.broken = broken

    def log(self, step, values):
        if self.broken:
            raise BrokenError

    def close(self):
        pass


def measure(state, batch):
    return {"loss": lm.Mean.of(state.apply(state.params, batch)[0])}


def run(how, watched, where, directory, workers=0):
    """One call of a Runner, which fails `where`; what it makes and is given goes to `watched`, and is dropped."""
    data = Data(bad=1 if where == "data" else None)
    loader = lm.Loader(data, batch_size=4, shuffle=False, workers=workers)
    state = lm.TrainState.create(torch.nn.Linear(3, 1), lm.optim.adam(0.1), seed=0)

    def kept(state, batch):
        new, metrics = step(state, batch)
        watched.extend(weakref.ref(leaf) for leaf in (*tree.tensors(new), *tree.tensors(batch)))
        if where == "step":
            raise BrokenError
        return new, metrics

    watched.extend(weakref.ref(each) for each in (data, loader, *tree.tensors(state)))
    runner = lm.Runner(
        kept,
        transforms=[lm.guard("skip"), lm.ema(0.9), lm.accumulate(2)],
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=1)) if how in ("fit", "again") else None,
        sinks=[lm.sinks.JSONL(directory / "metrics.jsonl"), Sink(broken=where == "sink")],
        log_every=1,
        progress=False,
    )
    watched.append(weakref.ref(runner))
    if how == "fit":
        runner.fit(state, loader, until=lm.Epochs(2), validate=lm.Validate(measure, loader))
    elif how == "again":
        runner.fit(state, loader, until=lm.Epochs(3), resume="auto")
    elif how == "overfit":
        runner.overfit(state, loader, until=lm.Steps(3))
    elif how == "smoke":
        runner.smoke(state, loader, validate=lm.Validate(measure, loader))
    elif how == "evaluate":
        runner.evaluate(measure, state, loader)
    elif how == "predict":
        runner.predict(measure, state, loader)
    else:
        runner.lr_find(state, loader, steps=10)


def _ends(thread):
    return thread.name.startswith(("lumen", "QueueFeeder"))


def held():
    """Processes, open files and threads of this process; a thread that has done its work may still be ending."""
    until = time.monotonic() + 5
    while any(_ends(each) for each in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.001)
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        processes = len(file.read().split())
    return processes, len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def assert_gone(how, where, directory, workers=0, error=BrokenError):
    """Run it, and look at once for what is left of it."""
    watched = []
    directory.mkdir(exist_ok=True)
    try:
        run(how, watched, where, directory, workers)
        assert where is None
    except error:
        assert where is not None
    assert watched
    assert not [type(each()) for each in watched if each() is not None], how


def test_nothing_is_alive_when_a_run_returns_or_raises(tmp_path, uncollected):
    assert_gone("fit", None, tmp_path / "first")  # Orbax starts threads of its own, once
    before = held()
    for how in ("fit", "again", "overfit", "smoke", "evaluate", "predict", "lr_find"):
        assert_gone(how, None, tmp_path / how.replace("again", "fit"))
        if how != "again":
            assert_gone(how, "data", tmp_path / "data")
        if how not in ("again", "evaluate", "predict"):
            assert_gone(how, "step", tmp_path / "step")
        assert held() == before, how
    assert_gone("fit", "sink", tmp_path / "sink")
    os.remove(tmp_path / "fit" / "checkpoints" / "6" / "meta" / "metadata")  # damaged, before the run goes on
    assert_gone("again", "checkpoint", tmp_path / "fit", error=lm.LumenError)
    assert held() == before


def test_worker_processes_end_with_their_loader(tmp_path, uncollected):
    assert_gone("overfit", None, tmp_path, workers=1)  # multiprocessing opens what it keeps, once
    before = held()
    assert_gone("overfit", None, tmp_path, workers=1)
    assert_gone("lr_find", "step", tmp_path, workers=1)
    assert_gone("evaluate", "data", tmp_path, workers=1)
    assert held() == before


@pytest.mark.parametrize(
    "transforms", [[lm.donate()], [lm.compile(backend="eager"), lm.donate()]], ids=["donate", "compile"]
)
def test_nothing_is_alive_under_donation_and_compilation(transforms, tmp_path, uncollected):
    def one():
        data = Data()
        loader = lm.Loader(data, batch_size=4, shuffle=False)
        state = lm.TrainState.create(torch.nn.Linear(3, 1), lm.optim.adam(0.1), seed=0)
        checkpoint = lm.Checkpointer(tmp_path, every=lm.Every(steps=1))
        runner = lm.Runner(step, transforms=transforms, checkpoint=checkpoint, progress=False)
        result = runner.fit(state, loader, until=lm.Epochs(2))
        given = [data, loader, runner, *tree.tensors(state), *tree.tensors(result.state)]
        return [weakref.ref(each) for each in given]

    assert not [type(each()) for each in one() if each() is not None]
