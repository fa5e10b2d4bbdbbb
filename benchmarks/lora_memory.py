"""Peak memory of LoRA on several processes: a frozen base of 500 MB in shards, as it is and in NF4.

The model is a stack of residual blocks in float32, each a unit, with adapters of rank 8 in every layer. The figure is
the peak of a process's resident memory over three steps, less what was resident before the state was made, and the
maximum over the processes. `bound` is the shards of the unquantized base, one full unit and the saved activations;
the target is at most 1.15 of it, and 0.35 for NF4. `--quick` takes a base of 50 MB.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peak, spread
from benchmarks.options import Options
from benchmarks.rows import Row

WIDTH, BLOCKS, QUICK_BLOCKS, ROWS, STEPS = 512, 60, 6, 8, 3
SMALLEST = "16384"  # bytes of a block's activations and of a shard, which would lie between freed ones in the heap
VARIANTS = ("Lumen: fsdp", "Lumen: fsdp, whole base (stage 2)", "Lumen: fsdp, NF4")


class Block(nn.Module):
    """A residual perceptron: 8.4 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, width]."""
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    """All blocks."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        """[rows, width]."""
        for block in self.blocks:
            x = block(x)
        return x


def step(state: Any, x: Tensor) -> Any:
    """One update of the adapters."""
    import lumen as lm

    loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].square().mean())(state.params, x)
    return state.apply_gradients(grads), {"loss": loss}


def prepared(label: str, count: int) -> Any:
    """The step, and the state that it takes."""
    import lumen as lm
    from lumen.bridges import lora

    torch.manual_seed(0)
    strategy = lm.fsdp(stage=2) if "whole" in label else lm.fsdp()
    fast = lm.compose(strategy, lm.donate())(step)
    adapted = lora.adapt(Stack(count), targets=["*up", "*down"], rank=8)
    state = lm.TrainState.create(adapted, lm.optim.adamw(1e-3))
    if "NF4" in label:
        state = lm.quantize(state, "nf4")
    return fast, fast.init(state)


def measured(label: str, count: int) -> int:
    """The peak of one variant, over the processes."""
    rows = torch.randn(ROWS, WIDTH)
    fast, state = prepared(label, 1)
    fast(state, rows)  # loads what persists
    del fast, state
    dist.barrier()
    peak.settle()
    before = peak.resident("VmRSS")
    fast, state = prepared(label, count)
    state, _ = fast(state, rows)
    peak.settle()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        state, _ = fast(state, rows)
    most = torch.tensor(peak.resident("VmHWM") - before)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def activations(count: int) -> int:
    """The bytes that the graph of one forward pass keeps, beside weights."""
    from lumen.bridges import lora

    block = lora.adapt(Block(), targets=["*up", "*down"], rank=8)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = block(torch.randn(ROWS, WIDTH, requires_grad=True))
    del kept
    return count * sum(saved.values())


def measure(options: Options) -> list[Row]:
    """Each number of processes and each variant."""
    os.environ.update(peak.ENVIRONMENT, MALLOC_MMAP_THRESHOLD_=SMALLEST, MALLOC_TRIM_THRESHOLD_=SMALLEST)
    count = options.pick(BLOCKS, QUICK_BLOCKS)
    unit = 8 * WIDTH * WIDTH * 4
    rows = []
    for size in options.sizes(2, 4):
        least = count * unit / size + unit + activations(count)
        for label in VARIANTS:
            if options.only and label not in options.chosen(dict.fromkeys(VARIANTS), ""):
                continue
            most = spread.world_of(size, measured, label, count)
            case = f"base of {count * unit / 1e6:.0f} MB, {size} processes"
            rows.append(Row("lora_memory", case, label, "peak", "MB", most / 1e6, most / least, bound=least / 1e6))
    return rows
