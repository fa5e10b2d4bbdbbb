"""How the cost of a step grows with params, layers, batch and microbatches, beside a raw loop of the same size.

MLPs of linear layers with ReLU, batch 32 unless stated otherwise. "Params" widens two hidden layers, "layers" stacks
layers of width 64, "batch" gives more rows to width 128, and "microbatches" splits a batch of 64 rows into k, whose
gradients the raw loop adds by k backward passes. Level ratios mean that Lumen's own cost is a fixed fraction of the
step; decreasing ratios mean that it is a fixed time. Ranks and leaves are separate benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import lumen as lm
from benchmarks import ours, peers, tasks, timing
from benchmarks.options import Options
from benchmarks.rows import Row

SECONDS = 0.2  # of a timed section
MOST = 400  # steps at most, before the model memorizes the batches
CLASSES = 10


class Point(NamedTuple):
    """One size of one kind of growth."""

    widths: tuple[int, ...]
    rows: int = 32
    parts: int = 1


def points(quick: bool) -> dict[str, Point]:
    """Sizes by the name of the case; `--quick` measures the first and the last of each."""
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
    """Every size; `--quick` compiles nothing."""
    rows: list[Row] = []
    for case, point in points(options.quick).items():
        if options.wants(case):
            rows += _compared(case, point, options)
    return rows


def _compared(case: str, point: Point, options: Options) -> list[Row]:
    task, variants = _task(case, point), _variants(point)
    chosen = options.chosen({variant.label: variant for variant in variants}, variants[0].label).values()
    raw_loop = variants[0].build(task)
    per_step = min(raw_loop(4) for _ in range(3))
    steps = min(MOST, max(4, int(options.pick(SECONDS, SECONDS / 5) / per_step)))
    run = [variant for variant in chosen if not (options.quick and "compile" in variant.name)]
    return [each.row("scaling", case) for each in timing.compare(task, run, rounds=options.times(9), steps=steps)]


def _variants(point: Point) -> list[timing.Variant]:
    split: list[Callable[[], lm.Transform]] = [lambda: lm.accumulate(point.parts)] if point.parts > 1 else []
    return [
        timing.Variant("raw", "raw loop, AdamW(fused)", raw(point.parts)),
        timing.Variant("lumen-donate", "Lumen: donate", ours.called(*split, lm.donate)),
        timing.Variant("lumen-compile", "Lumen: compile, donate", ours.called(lm.compile, *split, lm.donate)),
    ]


def _task(case: str, point: Point) -> tasks.Task:
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(point.rows, point.widths[0], generator=generator),
            torch.randint(0, CLASSES, (point.rows,), generator=generator),
        )
        for _ in range(tasks.DISTINCT)
    ]
    return tasks.Task(case, case, lambda: tasks.mlp(*point.widths), batches, steps=MOST)


def raw(parts: int) -> Callable[[tasks.Task], timing.Measure]:
    """A handwritten loop in plain PyTorch; each update sums the gradients of `parts` backward passes."""
    if parts == 1:
        return peers.raw(fused=True)

    def build(task: tasks.Task) -> timing.Measure:
        net = task.fresh()
        start = {name: value.clone() for name, value in net.state_dict().items()}

        def fresh() -> timing.Run:
            net.load_state_dict(start)
            optimizer = peers.adamw(net, fused=True)

            def run(batches: list[tasks.Batch]) -> torch.Tensor:
                for batch in batches:
                    optimizer.zero_grad()
                    losses = []
                    for x, y in zip(*[each.chunk(parts) for each in batch], strict=True):
                        loss = tasks.loss_of(net(x), y) / parts
                        loss.backward()
                        losses.append(loss.detach())
                    optimizer.step()
                return torch.stack(losses).sum()

            return run

        return timing.looped(task, fresh)

    return build
