"""Learning rates of a small CNN: 32 lanes of a compiled lm.sweep, beside the compiled step, one after the other.

Convolutions of 3×3 with BatchNorm and ReLU, dropout before the head, on the 8×8 images and 28×28 images of digits that
such models are tried on; 32 images in a batch. The throughput is that of processor time, in interleaved rounds. The
masks of dropout differ between lanes and single runs, so the losses are not compared here; the laws of lm.sweep are in
tests/laws/test_ensemble.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from benchmarks import timing
from benchmarks.options import Options
from benchmarks.rows import Row, throughput
from benchmarks.tasks import WEIGHT_DECAY

RUNS, ROWS, CLASSES, POOLED = 32, 32, 10, 2
BASE = "Lumen: compile, donate, one after the other"
WIDTHS = {"100k params": (32, 64, 128), "1M params": (64, 128, 256, 256)}
SIDES = (8, 28)
LRS = torch.logspace(-4, -2, RUNS).tolist()


def measure(options: Options) -> list[Row]:
    """Each size; `--quick` measures the smallest one, uncompiled."""
    rows: list[Row] = []
    for (name, widths), side in options.pick(list(itertools.product(WIDTHS.items(), SIDES)), [_SMALL]):
        case = f"CNN of {name}, {side}×{side} images"
        if options.wants(case):
            steps = {label: build(widths, side, not options.quick) for label, build in _VARIANTS.items()}
            measures = {label: _section(step) for label, step in steps.items()}
            times = timing.take_turns(measures, options.times(7))
            rows += throughput("sweep_cnn", case, times, BASE, unit="steps/s", amount=RUNS)
    return rows


def _section(step: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        began = time.process_time()
        step()
        return time.process_time() - began

    return run


def cnn(widths: tuple[int, ...]) -> nn.Sequential:
    """Blocks of a convolution, BatchNorm and ReLU, of which the first two are pooled, and a head after dropout."""
    layers: list[nn.Module] = []
    for at, (before, after) in enumerate(itertools.pairwise((1, *widths))):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (at < POOLED)
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(widths[-1], CLASSES)
    )


def train_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """The step of every variant."""

    def loss_fn(params: Any, batch: Any) -> Any:
        x, y = batch
        logits, buffers = state.apply(params, x)
        return F.cross_entropy(logits, y), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def _start(widths: tuple[int, ...], lr: float) -> lm.TrainState:
    torch.manual_seed(0)
    return lm.TrainState.create(cnn(widths), lm.optim.adamw(torch.tensor(lr), weight_decay=WEIGHT_DECAY))


def _batch(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 1, side, side, generator=generator)
    return x, torch.randint(0, CLASSES, (ROWS,), generator=generator)


def single(widths: tuple[int, ...], side: int, compiled: bool) -> Callable[[], None]:
    """A step of each run."""
    fast = lm.compose(*[lm.compile()] * compiled, lm.donate())(train_step)
    first, batch = _start(widths, LRS[0]), _batch(side)  # all share one model and optimizer
    states = [fast.init(first) for _ in LRS]

    def step() -> None:
        for at, state in enumerate(states):
            states[at], _ = fast(state, batch)

    return step


def together(widths: tuple[int, ...], side: int, compiled: bool) -> Callable[[], None]:
    """A step of all lanes."""
    fast = lm.compose(*[lm.compile()] * compiled, lm.sweep(lr=LRS), lm.donate())(train_step)
    state, batch = fast.init(_start(widths, LRS[0])), _batch(side)

    def step() -> None:
        nonlocal state
        state, _ = fast(state, batch)

    return step


_SMALL = (("100k params", WIDTHS["100k params"]), SIDES[0])
_VARIANTS: dict[str, Callable[[tuple[int, ...], int, bool], Callable[[], None]]] = {
    BASE: single,
    "Lumen: compile, sweep of 32, donate": together,
}
