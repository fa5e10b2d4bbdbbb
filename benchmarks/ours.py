"""Lumen's variants: the same step under transforms, called in a loop or driven by the Runner."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import lumen as lm
from benchmarks.tasks import LEARNING_RATE, NO_BOUND, WEIGHT_DECAY, Batch, Task, loss_of
from benchmarks.timing import Marked, Measure, Run, Variant, looped

UNROLLED = 8


def step(state: Any, batch: Any) -> tuple[Any, Any]:
    """The step of every variant."""

    def loss_fn(params: Any, batch: Any) -> Any:
        x, y = batch
        logits, _ = state.apply(params, x)
        return loss_of(logits, y)

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def state_of(net: nn.Module) -> Any:
    """A training state for `net`, under the optimizer of every variant."""
    return lm.TrainState.create(net, lm.optim.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))


def called(*transforms: Callable[[], Any]) -> Callable[[Task], Measure]:
    """The user's own loop over a transformed step."""

    def build(task: Task) -> Measure:
        fast = lm.compose(*[make() for make in transforms])(step)
        start = state_of(task.fresh())

        def fresh() -> Run:
            state = fast.init(start)

            def run(batches: list[Batch]) -> Any:
                nonlocal state
                for batch in batches:
                    state, metrics = fast(state, batch)
                return metrics["loss"]

            return run

        return looped(task, fresh)

    return build


def unrolled(stacked_before: bool) -> Callable[[Task], Measure]:
    """Eight steps in each call; the batches are stacked before the timed section, or in it."""

    def groups(batches: list[Batch]) -> list[Any]:
        return [batches[i : i + UNROLLED] for i in range(0, len(batches), UNROLLED)]

    def build(task: Task) -> Measure:
        fast = lm.compose(lm.compile(), lm.unroll(UNROLLED), lm.donate())(step)
        start = state_of(task.fresh())

        def fresh() -> Run:
            state = fast.init(start)

            def run(calls: list[Any]) -> None:
                nonlocal state
                for call in calls:
                    state, _ = fast(state, call if stacked_before else lm.stack(call))

            return run

        def pack(batches: list[Batch]) -> list[Any]:
            return [lm.stack(group) for group in groups(batches)] if stacked_before else groups(batches)

        return looped(task, fresh, pack)

    return build


def driven(*transforms: Callable[[], Any], whole: int = 1) -> Callable[[Task], Measure]:
    """`Runner.fit` with a JSONL row each 50 steps; of `whole` steps in a call."""

    def build(task: Task) -> Measure:
        net = task.fresh()

        def measure(steps: int) -> float:
            data = Marked(task, steps, whole)
            with tempfile.TemporaryDirectory() as folder:
                runner = lm.Runner(
                    step,
                    transforms=[make() for make in transforms],
                    sinks=[lm.sinks.JSONL(str(Path(folder) / "metrics.jsonl"))],
                    log_every=50,
                    progress=False,
                )
                runner.fit(state_of(net), data, until=lm.Steps(len(data)))
            return data.per_step()

        return measure

    return build


VARIANTS = [
    Variant("lumen", "Lumen: the plain step", called()),
    Variant("lumen-donate", "Lumen: donate", called(lm.donate)),
    Variant("lumen-clip", "Lumen: clip, donate", called(lambda: lm.clip(NO_BOUND), lm.donate)),
    Variant("lumen-guard", "Lumen: guard, clip, donate", called(lm.guard, lambda: lm.clip(NO_BOUND), lm.donate)),
    Variant("lumen-compile", "Lumen: compile", called(lm.compile)),
    Variant("lumen-compile-donate", "Lumen: compile, donate", called(lm.compile, lm.donate)),
    Variant("lumen-unroll", "Lumen: compile, unroll(8), donate", unrolled(stacked_before=True)),
    Variant(
        "lumen-unroll-stack", "Lumen: compile, unroll(8), donate, lm.stack timed too", unrolled(stacked_before=False)
    ),
    Variant("runner-donate", "Lumen: Runner.fit, donate, JSONL", driven(lm.donate)),
    Variant("runner-compile-donate", "Lumen: Runner.fit, compile, donate, JSONL", driven(lm.compile, lm.donate)),
    Variant(
        "runner-unroll",
        "Lumen: Runner.fit, compile, unroll(8), donate, JSONL",
        driven(lm.compile, lambda: lm.unroll(UNROLLED), lm.donate, whole=UNROLLED),
    ),
]
