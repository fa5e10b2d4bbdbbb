"""What the Runner adds to a step: microseconds above the user's own loop over the same step.

    python benchmarks/runner.py

The step does next to nothing, so that what is left is the loop. The user's loop keeps the metrics and writes their
means as a line of JSON each 50 steps, as the Runner does into its JSONL sink. Rounds are interleaved; the figure is the
median over rounds of the difference of a pair, with the quartiles. The Runner is timed from its first to its last
step, without what it does once at the beginning and the end.

To be expected on two cores of a server: 2 to 6 µs more than the loop that logs, whatever the step costs itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import timing
import torch
from rich.console import Console
from rich.table import Table

import lumen as lm

LOG_EVERY = 50


class Timed:
    """The same batch again and again, with the time from the first to the last."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.batch = {"x": torch.ones(8, 4)}
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        yield self.batch  # what a loop does once happens before the clock starts
        began = time.perf_counter()
        for _ in range(self.steps):
            yield self.batch
        self.seconds = time.perf_counter() - began


LOSS = lm.Mean(torch.tensor(3.0), torch.tensor(8.0))


def step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Nothing but what every step has: a new state, and a metric."""
    return state.replace(step=state.step + 1), {"loss": LOSS}


def make_state() -> lm.TrainState:
    """A state with a few params."""
    return lm.TrainState.create(torch.nn.Linear(4, 2), lm.optim.sgd(0.1))


def write_means(file: TextIO, number: int, held: list[Any]) -> None:
    """A line of JSON with the means of what was held."""
    means = {name: float(value) for name, value in lm.compute_metrics(lm.merge_metrics(held)).items()}
    file.write(json.dumps({"step": number, **means}) + "\n")
    file.flush()
    held.clear()


def own_loop(steps: int, folder: Path) -> float:
    """The loop that a user writes."""
    state, data, held = make_state(), Timed(steps), []
    with (folder / "own.jsonl").open("w") as file:
        for number, batch in enumerate(data, 1):
            state, metrics = step(state, batch)
            held.append(metrics)
            if number % LOG_EVERY == 0:
                write_means(file, number, held)
    return data.seconds / steps * 1e6


def runner(steps: int, folder: Path) -> float:
    """`Runner.fit`."""
    data = Timed(steps)
    sink = lm.sinks.JSONL(folder / "runner.jsonl")
    lm.Runner(step, sinks=[sink], log_every=LOG_EVERY, progress=False).fit(make_state(), data, until=lm.Epochs(1))
    return data.seconds / steps * 1e6


def runner_saving(steps: int, folder: Path) -> float:
    """With a checkpointer that is not due, limits in seconds and in epochs, and a callback."""
    data = Timed(steps)
    lm.Runner(
        step,
        sinks=[lm.sinks.JSONL(folder / "saving.jsonl")],
        checkpoint=lm.Checkpointer(tempfile.mkdtemp(dir=folder), every=lm.Every(seconds=3600)),
        callbacks=[lm.EarlyStop("train/loss", patience=10**9)],
        log_every=LOG_EVERY,
        progress=False,
    ).fit(make_state(), data, until=lm.Epochs(1) | lm.Seconds(3600))
    return data.seconds / steps * 1e6


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args()
    timing.hold_threads(1)
    variants = {"own loop": own_loop, "Runner": runner, "Runner, saving, timed, watched": runner_saving}
    found: dict[str, list[float]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, measure in variants.items():
                found[name].append(measure(options.steps, Path(folder)))
    table = Table(title=f"µs per step, medians of {options.rounds} rounds of {options.steps} steps")
    for name in ("", "µs/step", "above the own loop", "quartiles"):
        table.add_column(name, justify="right" if name else "left")
    for name, times in found.items():
        above = [a - b for a, b in zip(times, found["own loop"], strict=True)]
        low, middle, high = statistics.quantiles(above, n=4)
        table.add_row(name, f"{statistics.median(times):.1f}", f"{middle:+.1f}", f"{low:+.1f} – {high:+.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
