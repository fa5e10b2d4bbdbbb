"""The stacks of real jobs: what clipping, skipping, accumulation, an average and bf16 add, beside the same by hand.

Each case has a reference of its own: a raw loop with fused AdamW that does by hand what the transforms do. It
accumulates in `.grad`, skips an update whose gradient norm is not finite, and averages with one `_foreach_lerp_`. The
pairs are timed as in `overhead`. Microbatches have 4 to 16 rows of the MLP, and 2 of the GPT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lumen as lm
from benchmarks import ours, tasks, timing
from benchmarks.options import Options
from benchmarks.peers import adamw
from benchmarks.rows import Row
from benchmarks.tasks import DISTINCT, NO_BOUND, Batch, Task, loss_of
from benchmarks.timing import Measure, Run, Variant, looped

DECAY = 0.999
MICROBATCHES = {"mlp": ((4, 16), (8, 8), (16, 4)), "gpt": ((4, 2),), "gpt-small": ((4, 2),)}  # number, rows of each


@dataclass(frozen=True)
class ByHand:
    """A raw loop with the features of a job; `looped` of it is a `Measure`."""

    microbatches: int = 1
    clip: bool = False
    skip: bool = False
    ema: bool = False
    bf16: bool = False

    def __call__(self, task: Task) -> Measure:
        """The loop over `task`."""
        net = task.fresh()
        start = {name: value.clone() for name, value in net.state_dict().items()}
        params = [*net.parameters()]

        def fresh() -> Run:
            net.load_state_dict(start)
            optimizer = adamw(net, fused=True)
            average = [p.detach().clone() for p in params]

            def run(batches: list[Batch]) -> Tensor:
                for batch in batches:
                    optimizer.zero_grad()
                    loss = self._backward(net, batch)
                    if self._is_fine(params):
                        optimizer.step()
                    if self.ema:
                        with torch.no_grad():
                            torch._foreach_lerp_(average, params, 1 - DECAY)
                return loss

            return run

        return looped(task, fresh)

    def _backward(self, net: nn.Module, batch: Batch) -> Tensor:
        """Add the gradient to `.grad`, and return the loss of the batch."""
        if self.microbatches == 1:
            loss = self._loss(net, *batch)
            loss.backward()
            return loss
        total = torch.zeros(())
        for x, y in zip(*(column.chunk(self.microbatches) for column in batch), strict=True):
            loss = self._loss(net, x, y) / self.microbatches
            loss.backward()
            total += loss.detach()
        return total

    def _loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not self.bf16:
            return loss_of(net(x), y)
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(net(x), y)

    def _is_fine(self, params: list[nn.Parameter]) -> bool:
        if not self.clip:
            return True
        norm = torch.nn.utils.clip_grad_norm_(params, NO_BOUND)
        return not self.skip or bool(norm.isfinite())


@dataclass(frozen=True)
class Case:
    """A job by hand, and by transforms."""

    name: str
    label: str
    by_hand: ByHand
    transforms: tuple[Callable[[], Any], ...]
    rows: int | None = None  # of a batch

    def variants(self) -> list[Variant]:
        """The reference first."""
        return [
            Variant(f"{self.name}-by-hand", f"by hand: {self.label}", self.by_hand),
            Variant(self.name, f"Lumen: {self.label}", ours.called(*self.transforms)),
        ]


def cases(model: str) -> Iterator[Case]:
    """Those of one model."""
    clip = partial(lm.clip, NO_BOUND)
    yield Case("plain", "the plain step", ByHand(), ())
    yield Case("clip", "clip, donate", ByHand(clip=True), (clip, lm.donate))
    yield Case("guard", "guard, clip, donate", ByHand(clip=True, skip=True), (lm.guard, clip, lm.donate))
    for count, rows in MICROBATCHES[model]:
        yield Case(
            f"accumulate-{count}",
            f"donate, accumulate({count}), {rows} rows each",
            ByHand(count),
            (lm.donate, partial(lm.accumulate, count)),
            count * rows,
        )
    for count, rows in MICROBATCHES[model]:
        for precision in (False, True):
            yield _job(count, rows, precision)


def _job(count: int, rows: int, bf16: bool) -> Case:
    transforms: list[Callable[[], Any]] = [lm.guard, partial(lm.clip, NO_BOUND), partial(lm.ema, DECAY), lm.donate]
    transforms.append(partial(lm.accumulate, count))
    if bf16:
        transforms.append(partial(lm.precision, "bf16"))
    name, more = (f"job-{count}-bf16", ', precision("bf16")') if bf16 else (f"job-{count}", "")
    hand = ByHand(count, clip=True, skip=True, ema=True, bf16=bf16)
    label = f"guard, clip, ema, donate, accumulate({count}){more}, {rows} rows each"
    return Case(name, label, hand, tuple(transforms), count * rows)


def with_rows(task: Task, rows: int | None) -> Task:
    """The task in batches of `rows` rows."""
    if rows is None:
        return task
    columns = [torch.cat(column) for column in zip(*task.batches, strict=True)]
    size = len(columns[0])
    places = [torch.arange(i * rows, (i + 1) * rows) % size for i in range(DISTINCT)]
    return replace(task, batches=[(columns[0][at], columns[1][at]) for at in places])


def measure(options: Options) -> list[Row]:
    """Both models, each case beside its own loop."""
    found = []
    for model in ("mlp", "gpt"):
        if not options.wants(model):
            continue
        task = tasks.make(model)
        for case in cases(model):
            pair = case.variants()
            if len(options.chosen({each.label: each for each in pair}, pair[0].label)) < len(pair):
                continue
            chosen = with_rows(task, case.rows)
            steps = options.pick(task.steps // 4, task.steps // 8)  # 20 pairs in 10 minutes
            found += [
                each.row("stacks", model) for each in timing.compare(chosen, pair, rounds=options.times(9), steps=steps)
            ]
    return found
