"""How the cost of a step grows: with params, layers, the batch, and microbatches; beside a raw loop that grows as much.

MLPs of linear layers with ReLU, batch 32 where nothing else is said. "Params" widens two hidden layers, "layers" stacks
layers of width 64, "batch" gives more rows to width 128, and "microbatches" cuts a batch of 64 rows in k parts, whose
gradients the raw loop adds by k backward passes. Ratios that stay level say that Lumen's own cost is a fixed part of
the step; ratios that fall, that it is a fixed time. Ranks and leaves are parts of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import lumen as lm
from benchmarks import tasks, timing
from benchmarks.options import Options
from benchmarks.ours import state_of, step
from benchmarks.rows import Row, timed

SECONDS = 0.2  # of a timed section
BASE = "raw loop, AdamW(fused)"
CLASSES = 10


class Point(NamedTuple):
    """One size of one kind of growth."""

    widths: tuple[int, ...]
    rows: int = 32
    parts: int = 1


def points(quick: bool) -> dict[str, Point]:
    """By the name of the case; a quick look takes the first and the last of each."""
    kinds = [
        {f"params: width {width}": Point((64, width, width, CLASSES)) for width in (16, 64, 256, 1024)},
        {f"layers: {depth}": Point((64,) * depth + (CLASSES,)) for depth in (2, 8, 32)},
        {f"batch: {rows} rows": Point((64, 128, 128, CLASSES), rows) for rows in (4, 32, 256, 2048)},
        {f"microbatches: {parts}": Point((64, 128, 128, CLASSES), 64, parts) for parts in (1, 2, 4, 8)},
    ]
    return {
        name: point
        for kind in kinds
        for at, (name, point) in enumerate(kind.items())
        if not quick or at in (0, len(kind) - 1)
    }


def measure(options: Options) -> list[Row]:
    """Every point; a quick look compiles nothing."""
    rows: list[Row] = []
    for case, point in points(options.quick).items():
        if options.wants(case):
            rows += _compared(case, point, options)
    return rows


Loop = Callable[[int], float]  # trains for so many steps: the last loss
VARIANTS: dict[str, Callable[[Point], Loop]] = {
    BASE: lambda point: raw(point),
    "Lumen: donate": lambda point: lumen(point),
    "Lumen: compile, donate": lambda point: lumen(point, lm.compile()),
}


def _compared(case: str, point: Point, options: Options) -> list[Row]:
    chosen = options.chosen(VARIANTS, BASE)
    loops = {label: build(point) for label, build in chosen.items() if not (options.quick and "compile" in label)}
    losses = {label: loop(3) for label, loop in loops.items()}
    far = {label: loss for label, loss in losses.items() if abs(loss - losses[BASE]) > 1e-3}
    if far:
        raise timing.NotTheSameError(f"{case}: the loss of the raw loop is {losses[BASE]}, but that of {far}")
    steps = max(2, int(3 * options.pick(SECONDS, SECONDS / 5) / timing.seconds(lambda: loops[BASE](3))))

    def section(loop: Loop) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            loop(steps)
            return (time.perf_counter() - began) / steps

        return run

    times = timing.take_turns({label: section(loop) for label, loop in loops.items()}, options.times(9))
    return timed("scaling", case, times, BASE)


def _data(point: Point) -> list[tasks.Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(point.rows, point.widths[0], generator=generator),
            torch.randint(0, CLASSES, (point.rows,), generator=generator),
        )
        for _ in range(16)
    ]


def _net(point: Point) -> torch.nn.Module:
    torch.manual_seed(0)
    return tasks.mlp(*point.widths)


def raw(point: Point) -> Loop:
    """The loop that one writes without any library."""
    net, data = _net(point), _data(point)
    optimizer = torch.optim.AdamW(net.parameters(), lr=tasks.LEARNING_RATE, weight_decay=tasks.WEIGHT_DECAY, fused=True)

    def run(steps: int) -> float:
        for at in range(steps):
            optimizer.zero_grad()
            x, y = data[at % len(data)]
            losses = []
            for each_x, each_y in zip(x.chunk(point.parts), y.chunk(point.parts), strict=True):
                loss = tasks.loss_of(net(each_x), each_y) / point.parts
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
        return float(sum(losses))

    return run


def lumen(point: Point, *outer: lm.Transform) -> Loop:
    """The same in place, under `outer`."""
    inner = [lm.accumulate(point.parts)] if point.parts > 1 else []
    fast: Any = lm.compose(*outer, *inner, lm.donate())(step)
    state, data = fast.init(state_of(_net(point))), _data(point)

    def run(steps: int) -> float:
        nonlocal state
        for at in range(steps):
            state, metrics = fast(state, data[at % len(data)])
        return float(metrics["loss"])

    return run
