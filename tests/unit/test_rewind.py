"""`Runner(rewind=…)`: the run goes back to a checkpoint, and leaves out the batches since, exactly."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

import lumen as lm
from lumen import checkpoint
from lumen.errors import HyperparameterError, RewindError, StepError


def step(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, batch)
        return lm.Mean.of(out.square())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss, "steps": lm.Sum(torch.tensor(1))}


def make_state():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    return lm.TrainState.create(net, lm.optim.adam(0.01))


def batches(count, bad=()):
    """A list of batches, some of which are not finite."""
    draws = torch.Generator().manual_seed(1)
    made = [torch.randn(3, 2, generator=draws) for _ in range(count)]
    return [x * math.nan if index in bad else x for index, x in enumerate(made)]


GUARDED = (lm.guard(),)


class Reports(lm.Callback):
    """Keeps a report of each logging point, in the checkpoint."""

    def __init__(self):
        self.seen = []

    def on_log(self, view):
        self.seen.append((view.clock.step, view.metrics["train/loss"]))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = [tuple(entry) for entry in state["seen"]]


def run(directory, data, until, *, rewind=None, resume="never", transforms=GUARDED, **options):
    sink, callback = lm.sinks.JSONL(directory / "log.jsonl"), Reports()
    runner = lm.Runner(
        step,
        transforms=transforms,
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=5), keep=None),
        rewind=rewind,
        sinks=[sink],
        callbacks=[callback],
        log_every=4,
        progress=False,
        **options,
    )
    torch.manual_seed(5)
    result = runner.fit(make_state(), data, until=until, resume=resume)
    return result, [json.loads(line) for line in sink.path.read_text().splitlines()], callback.seen


def assert_equal_runs(found, expected, resumed=False):
    (result, rows, seen), (other, other_rows, other_seen) = found, expected
    for (path, leaf), (_, expected_leaf) in zip(*map(lm.tree.named_tensors, (result.state, other.state)), strict=True):
        assert torch.equal(leaf, expected_leaf), path
    for name in ("step", "train/loss", "train/steps", "lr"):
        assert repr([row[name] for row in rows]) == repr([row[name] for row in other_rows]), name
    assert repr(seen) == repr(other_seen)
    if not resumed:  # the history is that of one call of `fit`
        assert repr(result.history["train/loss"]) == repr(other.history["train/loss"])
        assert repr(result.history.extremes("train/loss")) == repr(other.history.extremes("train/loss"))
    assert (result.clock.step, result.clock.rows) == (other.clock.step, other.clock.rows)


BAD = (12, 13, 14)
REWIND = lm.Rewind(after=3, steps=4, limit=2)


@pytest.mark.parametrize("transforms", [(lm.guard(),), (lm.guard(), lm.donate()), (lm.unroll(2), lm.guard())])
def test_the_run_is_one_whose_data_never_held_the_batches(tmp_path, transforms):
    data = batches(30, BAD)
    found = run(tmp_path / "a", data, lm.Steps(20), rewind=REWIND, transforms=transforms)
    at = 17 if transforms[0].name == "unroll" else 16  # an unrolled step may log one step late
    expected = run(tmp_path / "b", [*data[:10], *data[at:]], lm.Steps(20), transforms=transforms)
    assert_equal_runs(found, expected)
    assert found[0].clock.batch == expected[0].clock.batch + at - 10  # the cursor has gone on
    meta = checkpoint.metadata(lm.Checkpointer(tmp_path / "a").latest())["meta"]
    assert meta["rewind"]["skips"] == [{"from": at, "to": 10, "first": [0, 10], "next": [0, at]}]


def test_a_run_resumed_after_going_back_is_the_uninterrupted_one(tmp_path):
    data = batches(30, BAD)
    expected = run(tmp_path / "a", data, lm.Steps(20), rewind=REWIND)
    for newest in (16, 10):
        directory = tmp_path / str(newest)
        assert run(directory, data, lm.Steps(16), rewind=REWIND)[0].clock.step == 16  # for the second time
        for saved in lm.Checkpointer(directory).store.steps():
            if saved > newest:
                shutil.rmtree(directory / "checkpoints" / str(saved))
        found = run(directory, data, lm.Steps(20), rewind=REWIND, resume="auto")
        assert_equal_runs(found, expected, resumed=True)


def test_it_goes_back_over_the_end_of_an_epoch(tmp_path):
    data = batches(14, (12, 13))
    found = run(tmp_path / "a", data, lm.Steps(20), rewind=lm.Rewind(after=2, steps=4))
    epochs = [*data[:10], *data[2:]]  # batches 10 to 13 and 0 to 1 are left out
    expected = run(tmp_path / "b", epochs, lm.Steps(20))
    assert_equal_runs(found, expected)
    assert (found[0].clock.epoch, found[0].clock.batch) == (1, 12)


def test_the_number_of_times_is_bounded(tmp_path):
    with pytest.raises(RewindError, match=r"gone back 2 times already, which is Rewind\(after=3, steps=4, limit=2\)'s"):
        run(tmp_path, batches(60, range(10, 60)), lm.Steps(40), rewind=REWIND)


def test_without_an_old_enough_checkpoint_it_is_an_error(tmp_path):
    with pytest.raises(RewindError, match=r"no checkpoint is 50 steps old: there are those of \[5, 10, 15\]"):
        run(tmp_path, batches(30, BAD), lm.Steps(20), rewind=lm.Rewind(after=3, steps=50))


def test_fewer_skipped_updates_change_nothing(tmp_path):
    data = batches(30, BAD)
    found = run(tmp_path / "a", data, lm.Steps(20), rewind=lm.Rewind(after=4, steps=4))
    assert_equal_runs(found, run(tmp_path / "b", data, lm.Steps(20)))


def test_what_cannot_go_back_is_refused(tmp_path):
    saver = lm.Checkpointer(tmp_path, keep=3)
    guarded = [lm.guard()]
    for options, match in (
        ({"transforms": guarded}, "saves none"),
        ({"checkpoint": saver}, "no guard that skips"),
        ({"checkpoint": saver, "transforms": [lm.guard("raise")]}, "no guard that skips"),
        ({"checkpoint": lm.Checkpointer(tmp_path), "transforms": guarded}, "keeps only the newest"),
    ):
        with pytest.raises(StepError, match=match):
            lm.Runner(step, rewind=lm.Rewind(), **options)
    for name, value in (("after", 0), ("steps", -1), ("limit", 0)):
        with pytest.raises(HyperparameterError, match=name):
            lm.Rewind(**{name: value})
