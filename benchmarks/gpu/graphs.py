"""Compiled steps: Inductor's kernels, CUDA graphs, static addresses of a donated state, blocks."""

from __future__ import annotations

from typing import Any

import torch

import lumen as lm
from benchmarks.gpu.check import Checks, Setting, agree
from benchmarks.gpu.jobs import compared, gpt, state_of, step, texts, trained

checks = Checks()
TOLERANCE = 1e-3


def same(setting: Setting, *transforms: lm.Transform) -> dict[str, Any]:
    """The losses and params are those of the plain step."""
    (state, losses), (expected_state, expected) = compared(setting, *transforms)
    worst = agree(losses, expected, 1e-4)
    agree(dict(state.params), dict(expected_state.params), TOLERANCE)
    return {"largest difference of a loss": worst, **skipped_graphs()}


def skipped_graphs() -> dict[str, Any]:
    """How many graphs Inductor has not recorded as CUDA graphs since the last call."""
    try:
        from torch._dynamo.utils import counters
    except ImportError:
        return {}
    count = counters["inductor"].pop("cudagraph_skips", 0)
    return {"CUDA graphs skipped": count}


def addresses(state: Any) -> list[int]:
    """Where the params and the optimizer's moments are in memory."""
    return [t.data_ptr() for t in lm.tree.tensors((state.params, state.opt_state)) if t.dim()]


@checks("compile", seconds=120)
def compiled(setting: Setting) -> dict[str, Any]:
    """The whole step in one graph."""
    return same(setting, setting.compile())


@checks("compile, donate: static addresses", seconds=120)
def donated(setting: Setting) -> dict[str, Any]:
    """A compiled, donated step writes into the memory of its state."""
    fast = lm.compose(setting.compile(), lm.donate())(step)
    state = fast.init(state_of(gpt(setting)))
    before = addresses(state)
    for batch in texts(setting, 3):
        state, _ = fast(state, batch)
    assert addresses(state) == before, "the state has moved"
    return same(setting, setting.compile(), lm.donate())


@checks("donate, eager: static addresses")
def donated_eager(setting: Setting) -> dict[str, Any]:
    """The fused kernels update the state in place."""
    fast = lm.donate()(step)
    state = fast.init(state_of(gpt(setting)))
    before = addresses(state)
    for batch in texts(setting, 3):
        state, _ = fast(state, batch)
    assert addresses(state) == before, "the state has moved"
    return same(setting, lm.donate())


@checks("reduce-overhead", seconds=150)
def reduce_overhead(setting: Setting) -> dict[str, Any]:
    """CUDA graphs: each result outlives the next replay, and the numbers are those of the plain step."""
    fast = lm.compile(mode="reduce-overhead")(step) if setting.on_gpu else setting.compile()(step)
    batches = texts(setting, 6)
    state, expected = fast.init(state_of(gpt(setting))), state_of(gpt(setting))
    kept = []
    for batch in batches:
        state, metrics = fast(state, batch)
        expected, expected_metrics = step(expected, batch)
        kept.append((state, metrics, expected, expected_metrics))
    for found, numbers, wanted, wanted_numbers in kept:
        agree(numbers["loss"], wanted_numbers["loss"], 1e-3)
        agree(dict(found.params), dict(wanted.params), TOLERANCE)
    figures = skipped_graphs()
    if setting.on_gpu:
        assert not figures.get("CUDA graphs skipped"), f"Inductor recorded no CUDA graph: {figures}"
    return figures


@checks("reduce-overhead, donate", seconds=150)
def reduce_overhead_donate(setting: Setting) -> dict[str, Any]:
    """Inductor records no graph for a donated state, and the numbers are those of the plain step."""
    return same(setting, setting.compile(mode="reduce-overhead"), lm.donate())


@checks("compile(blocks=True)", seconds=150)
def blocks(setting: Setting) -> dict[str, Any]:
    """The blocks of the model, compiled by kind."""
    return same(setting, setting.compile(blocks=True))


@checks("compile(blocks=True), precision, accumulate, donate", seconds=150)
def blocks_in_a_stack(setting: Setting) -> dict[str, Any]:
    """Compiled blocks in bfloat16, over microbatches."""
    stack = [lm.accumulate(2), lm.precision("bf16"), lm.donate()]
    batches = texts(setting, 4)
    _, losses = trained(lm.compose(setting.compile(blocks=True), *stack)(step), state_of(gpt(setting)), batches)
    _, expected = trained(lm.compose(*stack)(step), state_of(gpt(setting)), batches)
    return {"largest difference of a loss": agree(losses, expected, 5e-2)}


@checks("compile, unroll(2), donate", seconds=150)
def unrolled(setting: Setting) -> dict[str, Any]:
    """Two steps in one call."""
    batches = texts(setting, 4)
    fast = lm.compose(setting.compile(), lm.unroll(2), lm.donate())(step)
    state = fast.init(state_of(gpt(setting)))
    for i in (0, 2):
        state, _ = fast(state, lm.stack(batches[i : i + 2]))
    expected, _ = trained(step, state_of(gpt(setting)), batches)
    return {"largest difference of a param": agree(dict(state.params), dict(expected.params), TOLERANCE)}


@checks("a donated step captured by torch.cuda.graph", needs_gpu=True)
def captured(setting: Setting) -> dict[str, Any]:
    """A graph that the user records: its replays train the state where it is."""
    batch = texts(setting, 1)[0]
    fast = lm.donate()(step)
    state = fast.init(state_of(gpt(setting)))
    side = torch.cuda.Stream(setting.device)
    side.wait_stream(torch.cuda.current_stream(setting.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            state, _ = fast(state, batch)
    torch.cuda.current_stream(setting.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state, metrics = fast(state, batch)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize(setting.device)
    expected, losses = trained(step, state_of(gpt(setting)), [batch] * 6)  # capturing computes nothing
    agree(metrics["loss"], losses[-1], 1e-3)
    return {"largest difference of a param": agree(dict(state.params), dict(expected.params), TOLERANCE)}
