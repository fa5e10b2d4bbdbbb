"""What the Runner adds to a step, beside a handwritten loop over the same step.

The step does next to nothing, so only the loop is measured. The handwritten loop keeps the metrics and writes their
means as a line of JSON every 50 steps, as the Runner does with its JSONL sink. The Runner is timed from its first to
its last step, without its work at the beginning and the end. The metric "added" is the median over rounds of the
difference to the handwritten loop.

Expected on two cores of a server: 2 to 6 µs more than the loop that logs, whatever the step itself costs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

import lumen as lm
from benchmarks import timing
from benchmarks.options import Options
from benchmarks.rows import Row, quartiles, timed

LOG_EVERY = 50


class Timed:
    """The same batch repeatedly, with the time from the first to the last."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.batch = {"x": torch.ones(8, 4)}
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        yield self.batch  # a loop's initial work happens before the clock starts
        began = time.perf_counter()
        for _ in range(self.steps):
            yield self.batch
        self.seconds = time.perf_counter() - began


LOSS = lm.Mean(torch.tensor(3.0), torch.tensor(8.0))


def step(state: Any, batch: Any) -> tuple[Any, Any]:
    """A minimal step: a new state, and a metric."""
    return state.replace(step=state.step + 1), {"loss": LOSS}


def make_state() -> lm.TrainState:
    """A state with a few params."""
    return lm.TrainState.create(torch.nn.Linear(4, 2), lm.optim.sgd(0.1))


def write_means(file: TextIO, number: int, held: list[Any]) -> None:
    """A line of JSON with the means of the metrics so far."""
    means = {name: float(value) for name, value in lm.compute_metrics(lm.merge_metrics(held)).items()}
    file.write(json.dumps({"step": number, **means}) + "\n")
    file.flush()
    held.clear()


def own_loop(steps: int, folder: Path) -> float:
    """A handwritten loop."""
    state, data, held = make_state(), Timed(steps), []
    with (folder / "own.jsonl").open("w") as file:
        for number, batch in enumerate(data, 1):
            state, metrics = step(state, batch)
            held.append(metrics)
            if number % LOG_EVERY == 0:
                write_means(file, number, held)
    return data.seconds / steps


def runner(steps: int, folder: Path) -> float:
    """`Runner.fit`."""
    data = Timed(steps)
    sink = lm.sinks.JSONL(folder / "runner.jsonl")
    lm.Runner(step, sinks=[sink], log_every=LOG_EVERY, progress=False).fit(make_state(), data, until=lm.Epochs(1))
    return data.seconds / steps


def runner_saving(steps: int, folder: Path) -> float:
    """`Runner.fit` with a checkpointer that is never due, limits in seconds and in epochs, and a callback."""
    data = Timed(steps)
    lm.Runner(
        step,
        sinks=[lm.sinks.JSONL(folder / "saving.jsonl")],
        checkpoint=lm.Checkpointer(tempfile.mkdtemp(dir=folder), every=lm.Every(seconds=3600)),
        callbacks=[lm.EarlyStop(monitor="train/loss", patience=10**9)],
        log_every=LOG_EVERY,
        progress=False,
    ).fit(make_state(), data, until=lm.Epochs(1) | lm.Seconds(3600))
    return data.seconds / steps


BASE = "own loop"
VARIANTS = {BASE: own_loop, "Lumen: Runner": runner, "Lumen: Runner, saving, timed, watched": runner_saving}


def measure(options: Options) -> list[Row]:
    """One case."""
    steps = options.pick(5000, 500)
    case = f"{steps:,} steps of nothing"
    with tempfile.TemporaryDirectory() as folder:
        measures = {
            label: lambda each=each: each(steps, Path(folder)) for label, each in options.chosen(VARIANTS, BASE).items()
        }
        times = timing.take_turns(measures, options.times(15))
    rows = timed("runner", case, times, BASE)
    for label in [label for label in times if label != BASE]:
        above = [1e6 * (mine - own) for mine, own in zip(times[label], times[BASE], strict=True)]
        rows.append(Row("runner", case, label, "added", "µs", quartiles(above)[1]))
    return rows
