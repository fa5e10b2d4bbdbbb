"""The axes: what grows, in which sizes, and the work whose cost is measured at each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lumen as lm
from benchmarks import leaves, ours, tasks

Work = Callable[[int], object]  # does something this number of times


@dataclass(frozen=True)
class Axis:
    """One axis: `build(size, folder)` makes the work, the cost of which is stated for each `unit`.

    Without `build` the sizes are numbers of processes: see ranks.py.

    `time` and `memory` are the slopes that are expected at most. A section of work is done at least `least` times, and
    just so often, without warm-up, if it `is_long`.
    """

    title: str
    unit: str
    sizes: tuple[int, ...]
    build: Callable[[int, Path], Work] | None
    time: float = 1.0
    memory: float = 1.0
    least: int = 2
    is_long: bool = False


def trained(net: torch.nn.Module, batch: Any, *transforms: lm.Transform) -> Work:
    """Steps on the same batch, with a state in place."""
    fast = lm.compose(*transforms, lm.donate())(ours.step)
    state = fast.init(ours.state_of(net))
    del net

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = fast(state, batch)

    return run


def _batch(rows: int, width: int, classes: int) -> tasks.Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, width, generator=generator), torch.randint(0, classes, (rows,), generator=generator)


def params(count: int, _folder: Path) -> Work:
    """An MLP with two square matrices."""
    width = round((count / 2) ** 0.5)
    return trained(tasks.mlp(width, width, width), _batch(4, width, width))


def leaf_count(count: int, _folder: Path) -> Work:
    """Params of 16 entries each."""
    return leaves.lumen(count)


def microbatches(count: int, _folder: Path) -> Work:
    """Microbatches of 16 rows: the batch grows with their number."""
    return trained(tasks.mlp(64, 256, 256, 10), _batch(16 * count, 64, 10), lm.accumulate(count))


def lanes(count: int, _folder: Path) -> Work:
    """Lanes of a small MLP."""
    fast = lm.compose(lm.ensemble(count), lm.donate())(ours.step)
    first = ours.state_of(tasks.mlp(16, 64, 64, 4))
    state, batch = fast.init(lambda _seed: first), _batch(32, 16, 4)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = fast(state, batch)

    return run


class Indices:
    """Rows that are their own indices, so that nothing but choosing and collating them costs time."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


def rows(count: int, _folder: Path) -> Work:
    """Shuffled batches."""
    loader = lm.Loader(Indices(count), batch_size=64)

    def forever() -> Iterator[Any]:
        for epoch in itertools.count():
            yield from loader.epoch(epoch)

    batches = forever()
    return lambda steps: [next(batches) for _ in range(steps)]


def first_batch(count: int, _folder: Path) -> Work:
    """A new Loader, up to its first batch."""
    data = Indices(count)

    def run(times: int) -> None:
        for _ in range(times):
            next(lm.Loader(data, batch_size=64).epoch(0))

    return run


def _small_state() -> lm.TrainState:
    return lm.TrainState.create(torch.nn.Linear(4, 2), lm.optim.sgd(0.1))


def metrics(count: int, folder: Path) -> Work:
    """Steps of `Runner.fit` that return so many metrics, logged every 50 steps as a line of JSON."""
    values = {f"m{i}": lm.Mean(torch.tensor(float(i)), torch.tensor(8.0)) for i in range(count)}

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        return state.replace(step=state.step + 1), values

    def run(steps: int) -> None:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        runner = lm.Runner(step, sinks=[lm.sinks.JSONL(folder / "metrics.jsonl")], log_every=50, progress=False)
        runner.fit(_small_state(), [torch.ones(8)] * 50, until=lm.Steps(steps))

    return run


def run_steps(count: int, folder: Path) -> Work:
    """Runs of so many steps, with metrics, JSONL, validations and epochs of 500 steps."""
    batches = [torch.ones(8)] * 500

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        return state.replace(step=state.step + 1), {"loss": lm.Mean.of(batch), "epoch": lm.PerEpoch(lm.Mean.of(batch))}

    def evaluate(state: Any, batch: Any) -> Any:
        return {"loss": lm.Mean.of(batch)}

    def run(times: int) -> None:
        for _ in range(times):
            (folder / "run.jsonl").unlink(missing_ok=True)
            runner = lm.Runner(step, sinks=[lm.sinks.JSONL(folder / "run.jsonl")], log_every=50, progress=False)
            validate = lm.Validate(evaluate, batches[:1], every=lm.Every(steps=100))
            runner.fit(_small_state(), batches, until=lm.Steps(count), validate=validate)

    return run


_ROWS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(10**power for power in range(first, last + 1))


AXES = {
    "params": Axis("params", "step", _powers(4, 8), params),
    "leaves": Axis("leaves (param tensors)", "step", (1, 10, 100, 1_000, 10_000), leaf_count),
    "microbatches": Axis("microbatches of 16 rows", "step", (1, 2, 4, 8, 16, 32, 64), microbatches),
    "lanes": Axis("lanes of an ensemble", "step", (1, 4, 16, 64, 256), lanes),
    "rows": Axis("rows of the data set", "batch", _ROWS, rows, time=0.0, memory=0.0),
    "first_batch": Axis("rows of the data set", "first batch", _ROWS, first_batch, time=0.0, memory=0.0),
    "metrics": Axis("logged metrics", "step", (1, 5, 20, 100, 500), metrics, least=100),
    "steps": Axis("steps of a run", "run", (100, 1_000, 10_000, 200_000), run_steps, memory=0.0, least=1, is_long=True),
    "ranks": Axis("ranks, ddp", "step", (1, 2, 4), None, time=0.0, memory=0.0),
}
