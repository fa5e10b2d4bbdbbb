"""The cost of a leaf: one step of a model of n small params, for n from 1 to 10,000.

Each param has 16 entries and the loss is the mean of their squares, so a step is all bookkeeping: flattening trees,
making leaves that require grad, collecting gradients, building the optimizer's lists. The reference is a raw loop with
torch's foreach AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import lumen as lm
from benchmarks import timing
from benchmarks.options import Options
from benchmarks.rows import Row, timed

WIDTH = 16
SECONDS = 0.5  # of a timed section
Loop = Callable[[int], float]  # trains for n steps; returns the last loss


class Leaves(torch.nn.Module):
    """n params, all of which the loss uses equally."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.leaves = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(WIDTH)) for _ in range(count))

    def forward(self, target: torch.Tensor) -> torch.Tensor:
        return (torch.stack(list(self.leaves)) - target).square().mean()


def raw(count: int, **kind: bool) -> Loop:
    """A handwritten loop without any library."""
    net, target = Leaves(count), torch.ones(1, WIDTH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, **kind)

    def run(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            loss = net(target)
            loss.backward()
            optimizer.step()
        return float(loss)

    return run


def lumen(count: int) -> Loop:
    """The same as a donated step."""

    def step(state: Any, batch: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
        loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0])(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    donated = lm.donate()(step)
    state = donated.init(lm.TrainState.create(Leaves(count), lm.optim.adamw(1e-3, weight_decay=1e-2)))
    target = torch.ones(1, WIDTH)

    def run(steps: int) -> float:
        nonlocal state
        loss = torch.zeros(())
        for _ in range(steps):
            state, metrics = donated(state, target)
            loss = metrics["loss"]
        return float(loss)

    return run


BASE = "raw loop, AdamW(foreach)"
VARIANTS: dict[str, Callable[[int], Loop]] = {
    BASE: lambda count: raw(count, foreach=True),
    "raw loop, AdamW(fused)": lambda count: raw(count, fused=True),
    "Lumen: donate": lumen,
}


def measure(options: Options) -> list[Row]:
    """Each number of params."""
    rows: list[Row] = []
    for count in options.pick((1, 100, 1_000, 10_000), (1, 100, 1_000)):
        case = f"{count:,} params"
        if options.wants(case):
            rows += _compared(case, count, options)
    return rows


def _compared(case: str, count: int, options: Options) -> list[Row]:
    loops = {label: build(count) for label, build in options.chosen(VARIANTS, BASE).items()}
    last = {label: loop(3) for label, loop in loops.items()}
    wanted = last[BASE]
    far = {label: loss for label, loss in last.items() if abs(loss - wanted) > 1e-2 * abs(wanted)}
    if far:
        raise AssertionError(f"the loss of the raw loop is {wanted}, but that of {far}")
    steps = max(2, int(2 * options.pick(SECONDS, SECONDS / 10) / timing.seconds(lambda: loops[BASE](2))))

    def section(loop: Loop) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            loop(steps)
            return (time.perf_counter() - began) / steps

        return run

    times = timing.take_turns({label: section(loop) for label, loop in loops.items()}, options.times(9))
    return timed("leaves", case, times, BASE)
