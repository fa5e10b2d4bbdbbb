"""A run that is stopped anywhere, and gone on with, is bitwise the run that was not stopped."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from tests.tiers import pick

ROWS, CLASSES = 44, 3


class Net(torch.nn.Module):
    """Dropout and BatchNorm: random numbers and buffers."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.4), torch.nn.Linear(8, CLASSES))

    def forward(self, x):
        return self.head(self.body(x))


def step(state, batch):
    def loss_fn(params, batch):
        logits, buffers = state.apply(params, batch["x"])
        loss = lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"))
        return loss, lm.Aux(buffers=buffers, metrics={"accuracy": lm.Mean.of(logits.argmax(-1) == batch["y"])})

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, **aux.metrics}


def eval_step(state, batch):
    logits, _ = state.apply(state.params, batch["x"])
    return {"loss": lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"))}


class Samples:
    """Rows read one by one, each with a random augmentation."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(ROWS, 5, generator=generator)
        self.y = torch.randint(CLASSES, (ROWS,), generator=generator)

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"x": self.x[index] + 0.1 * torch.randn(5), "y": self.y[index]}


class StopAt(lm.Callback):
    """Sends this process a signal after a step, or in the middle of a validation."""

    def __init__(self, at=None):
        self.at = at

    def on_step(self, view):
        if self.at is not None and view.clock.step >= self.at:
            self.at = None
            os.kill(os.getpid(), signal.SIGTERM)


class Job:
    """All that a run is made of, made anew each time, as in another process."""

    def __init__(
        self, directory, *, transforms=(), workers=0, plateau=False, stop=None, stop_in_validation=None, load=None
    ):
        torch.manual_seed(0)
        adamw = lm.optim.adamw(lm.optim.warmup_cosine(0.05, 40, 4)) if not plateau else lm.optim.adamw(0.05)
        tx = (
            lm.optim.chain(adamw, lm.optim.reduce_on_plateau(patience=0, factor=0.5, monitor="val/loss"))
            if plateau
            else adamw
        )
        self.state = lm.TrainState.create(Net(), tx, seed=3)
        self.loader = load() if load else lm.Loader(Samples(), batch_size=8, seed=2, workers=workers)
        self.sinks = [lm.sinks.JSONL(directory / "metrics.jsonl"), lm.sinks.CSV(directory / "metrics.csv")]
        self.validated = 0
        self.stop_in_validation = stop_in_validation
        self.runner = lm.Runner(
            step,
            transforms=[make() for make in transforms],
            checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=5), keep=2, monitor="val/loss", mode="min"),
            sinks=self.sinks,
            callbacks=[StopAt(stop), lm.EarlyStop(monitor="val/loss", patience=50)],
            log_every=4,
            progress=False,
        )

    def evaluate(self, state, batch):
        self.validated += 1
        if self.validated == self.stop_in_validation:
            os.kill(os.getpid(), signal.SIGTERM)
        return eval_step(state, batch)

    def run(self):
        torch.manual_seed(4)  # what is drawn before the run must not matter
        rows = Samples()
        held_out = lm.Loader({"x": rows.x, "y": rows.y}, batch_size=16, shuffle=False)
        validate = lm.Validate(self.evaluate, held_out, every=lm.Every(steps=7))
        return self.runner.fit(self.state, self.loader, until=lm.Epochs(4), validate=[validate], resume="auto")


def logged(directory):
    """What was logged, without what is measured in seconds."""
    import csv
    import json

    timed = ("time", "steps_per_second", "rows_per_second", "goodput", "data_wait", "slowest_rank", "slowest_ratio")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    with (directory / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return [[{k: v for k, v in row.items() if k not in timed} for row in rows] for rows in (lines, table)]


def same(a, b):
    left, right = lm.tree.named_tensors(a), lm.tree.named_tensors(b)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        assert x.dtype == y.dtype, path
        assert torch.equal(x, y), path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The directory and the result of a run that is not stopped: made once for each set of options."""
    made = {}

    def run(options):
        key = tuple((name, options[name]) for name in sorted(options))
        key = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in key)
        if key not in made:
            directory = tmp_path_factory.mktemp("whole")
            made[key] = directory, Job(directory, **options).run()
        return made[key]

    return run


def check(uninterrupted, tmp_path, stops, **options):
    parts = tmp_path / "parts"
    whole, expected = uninterrupted(options)
    for stop in stops:
        with pytest.raises(lm.Interrupted) as caught:
            Job(parts, **options, **stop).run()
        assert caught.value.code == 75
        assert caught.value.result.reason == "SIGTERM"
    found = Job(parts, **options).run()
    same(found.state, expected.state)
    assert logged(parts) == logged(whole)
    assert (found.clock.step, found.clock.epoch, found.clock.rows, found.reason) == (24, 4, 4 * ROWS, "Epochs(4)")
    timed = ("steps_per_second", "rows_per_second", "goodput", "data_wait", "slowest_rank", "slowest_ratio")
    assert {k: v for k, v in found.metrics.items() if k not in timed} == {
        k: v for k, v in expected.metrics.items() if k not in timed
    }
    kept, wanted = (lm.Checkpointer(directory, monitor="val/loss", mode="min") for directory in (parts, whole))
    assert (kept.latest().name, kept.best().name) == (wanted.latest().name, wanted.best().name)


SETTINGS = {
    "plain": {},
    "seeded": {"transforms": [lm.seeded]},
    "donate": {"transforms": [lm.donate]},
    "ema, donate": {"transforms": [lambda: lm.ema(0.9), lm.donate]},
    "fp16": {"transforms": [lambda: lm.precision("fp16")]},
    "accumulate, bf16": {"transforms": [lambda: lm.accumulate(2), lambda: lm.precision("bf16")]},
    "unroll": {"transforms": [lambda: lm.unroll(3)]},
    "plateau": {"plateau": True},
    "workers": {"workers": 2},
    "torch loader": {"load": lambda: torch.utils.data.DataLoader(Samples(), batch_size=8, shuffle=True)},
    "compiled": {"transforms": [lambda: lm.compile(backend="eager"), lm.donate]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_twice(name, uninterrupted, tmp_path):
    check(uninterrupted, tmp_path, [{"stop": 9}, {"stop": 18}], **SETTINGS[name])


MOMENTS = [1, 3, 5, 6, 7, 8, 10, 12, 14, 18, 20, 21, 22, 23]  # each kind of moment
EMA_FP16 = [lambda: lm.ema(0.9), lambda: lm.precision("fp16")]


# One run that is stopped at each of the moments, one after the other; under `make test-all` also a run for each.
@pytest.mark.parametrize("moments", [MOMENTS, *pick([], [[at] for at in MOMENTS])], ids=str)
def test_stopped_at_any_step(moments, uninterrupted, tmp_path):
    check(uninterrupted, tmp_path, [{"stop": at} for at in moments], plateau=True, transforms=EMA_FP16)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_stopped_in_the_middle_of_a_validation(at, uninterrupted, tmp_path):
    check(uninterrupted, tmp_path, [{"stop_in_validation": at}], plateau=True)
