"""Peak memory of a step on several processes: Lumen's ddp and fsdp beside torch's, each in a separate world.

The model is a GPT with 100 MB of params and two moments. The figure is the peak of a process's resident memory over
five steps (Linux's VmHWM, reset just before), less what was resident before the model was made, and the maximum over
the processes. The allocator returns freed blocks at once, so this is memory in use.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import peak, spread, tasks
from benchmarks.options import Options
from benchmarks.rows import Row

STEPS = 5
VARIANTS = {  # none is compiled: compiling leaves hundreds of megabytes in a process
    label: build for name in ("ddp", "fsdp") for label, build in spread.STRATEGIES[name].items() if "again" not in label
}


def task() -> tasks.Task:
    """A GPT of 8 layers and width 288."""
    small = tasks.make("gpt")
    return tasks.Task("gpt", "", lambda: tasks.GPT(width=288, layers=8), small.batches, steps=STEPS)


def measured(label: str) -> int:
    """The peak of one variant, over the processes."""
    work = task()
    data = spread.batches_of(work, 1)
    dist.barrier()
    peak.settle()
    before = peak.resident("VmRSS")
    loop = VARIANTS[label](work)
    loop(data)  # allocates what persists
    peak.settle()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        loop(data)
    most = torch.tensor(peak.resident("VmHWM") - before)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def measure(options: Options) -> list[Row]:
    """Each world and strategy."""
    os.environ.update(peak.ENVIRONMENT)
    rows = []
    for size in options.sizes(2, 4):
        found = {label: spread.world_of(size, measured, label) for label in VARIANTS}
        for label, most in found.items():
            name = "ddp" if "ddp" in label.lower() else "fsdp"
            base = found["torch DDP" if name == "ddp" else "torch fully_shard"]
            case = f"{name}, {size} processes"
            rows.append(Row("parallel_memory", case, label, "peak", "MB", most / 1e6, most / base))
    return rows
