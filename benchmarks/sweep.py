"""Many runs of a small model: side by side in one process, by lm.ensemble, beside one after the other.

32 MLPs, each from its own seed, learn from the same batches. The reference is a raw loop that trains one model after
the other with fused AdamW. "2 processes" are two processes of one thread, started before the clock, which share the
models. The unit is an optimizer step of one run. The ratio is one of throughputs, so 5 means five times the runs in
the same time. After the same number of steps each lane must have the loss of its own raw loop.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import lumen as lm
from benchmarks import tasks, timing
from benchmarks.options import Options
from benchmarks.ours import state_of, step
from benchmarks.rows import Row, throughput

RUNS = 32
STEPS = 10
PROCESSES = 2
BASE = "raw loop, one after the other"
SIZES = {"MLP 16-32-32-4, batch 32": (16, 32, 32, 4), "MLP 784-128-128-10, batch 32": (784, 128, 128, 10)}
Train = Callable[[], list[float]]  # STEPS steps of each run: their last losses


def measure(options: Options) -> list[Row]:
    """Each size; `--quick` measures the small one, uncompiled."""
    rows: list[Row] = []
    for case, widths in options.pick(SIZES, dict(itertools.islice(SIZES.items(), 1))).items():
        if options.wants(case):
            rows += _compared(case, widths, options)
    return rows


def _compared(case: str, widths: tuple[int, ...], options: Options) -> list[Row]:
    with _processes(widths) as shared:
        every: dict[str, Callable[[], Train]] = {
            BASE: lambda: raw(widths, range(RUNS)),
            f"raw loop, {PROCESSES} processes": lambda: shared,
            "Lumen: donate, one after the other": lambda: single(widths),
            "Lumen: ensemble(32)": lambda: together(widths, lm.ensemble(RUNS)),
            "Lumen: ensemble(32), donate": lambda: together(widths, lm.ensemble(RUNS), lm.donate()),
        }
        if not options.quick:
            every["Lumen: compile, ensemble(32), donate"] = lambda: together(
                widths, lm.compile(), lm.ensemble(RUNS), lm.donate()
            )
        trains = {label: build() for label, build in options.chosen(every, BASE).items()}
        _checked({label: train() for label, train in trains.items()})
        measures = {label: lambda train=train: timing.seconds(train) for label, train in trains.items()}
        times = timing.take_turns(measures, options.times(9))
    return throughput("sweep", case, times, BASE, unit="steps/s", amount=RUNS * STEPS)


def _checked(losses: dict[str, list[float]]) -> None:
    wanted = torch.tensor(losses[BASE])
    for label, found in losses.items():
        if not torch.allclose(torch.tensor(found), wanted, rtol=1e-2, atol=1e-3):
            raise timing.NotTheSameError(f"the losses of {label} are {found}, those of the raw loop {losses[BASE]}")


def batches(widths: tuple[int, ...]) -> list[tasks.Batch]:
    """The batches of all runs."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, widths[0], generator=generator), torch.randint(0, widths[-1], (32,), generator=generator))
        for _ in range(STEPS)
    ]


def net_of(widths: tuple[int, ...], seed: int) -> torch.nn.Module:
    """The initial model of one run."""
    torch.manual_seed(seed)
    return tasks.mlp(*widths)


def raw(widths: tuple[int, ...], seeds: Any) -> Train:
    """Plain PyTorch."""
    data = batches(widths)
    nets = [net_of(widths, seed) for seed in seeds]
    optimizers = [
        torch.optim.AdamW(net.parameters(), lr=tasks.LEARNING_RATE, weight_decay=tasks.WEIGHT_DECAY, fused=True)
        for net in nets
    ]

    def train() -> list[float]:
        last = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            for x, y in data:
                optimizer.zero_grad()
                loss = tasks.loss_of(net(x), y)
                loss.backward()
                optimizer.step()
            last.append(loss.item())
        return last

    return train


def _states(widths: tuple[int, ...]) -> Callable[[int], Any]:
    first = state_of(net_of(widths, 0))  # all share one model and optimizer

    def start(seed: int) -> Any:
        return first.replace(params={n: p.detach().clone() for n, p in net_of(widths, seed).named_parameters()})

    return start


def single(widths: tuple[int, ...]) -> Train:
    """Lumen's donated step, one run after the other."""
    data, start, fast = batches(widths), _states(widths), lm.donate()(step)
    states = [fast.init(start(seed)) for seed in range(RUNS)]

    def train() -> list[float]:
        last = []
        for at, state in enumerate(states):
            for batch in data:
                state, metrics = fast(state, batch)
            states[at] = state
            last.append(float(metrics["loss"]))
        return last

    return train


def together(widths: tuple[int, ...], *transforms: lm.Transform) -> Train:
    """All runs as lanes of one."""
    data, fast = batches(widths), lm.compose(*transforms)(step)
    state = fast.init(_states(widths))

    def train() -> list[float]:
        nonlocal state
        for batch in data:
            state, metrics = fast(state, batch)
        return metrics["loss"].tolist()

    return train


@contextmanager
def _processes(widths: tuple[int, ...]) -> Iterator[Train]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(PROCESSES)]
    seeds = torch.arange(RUNS).tensor_split(PROCESSES)
    workers = [
        context.Process(target=_serve, args=(far, widths, part.tolist()), daemon=True)
        for (_, far), part in zip(pipes, seeds, strict=True)
    ]
    for worker in workers:
        worker.start()

    def train() -> list[float]:
        for near, _ in pipes:
            near.send(True)
        return [loss for near, _ in pipes for loss in near.recv()]

    try:
        yield train
    finally:
        for (near, _), worker in zip(pipes, workers, strict=True):
            near.send(False)
            worker.join(30)


def _serve(pipe: Any, widths: tuple[int, ...], seeds: list[int]) -> None:
    torch.set_num_threads(1)
    train = raw(widths, seeds)
    while pipe.recv():
        pipe.send(train())
