"""Peak memory of a step on several processes: Lumen's ddp and fsdp beside torch's, each in a world of its own.

    python benchmarks/parallel_memory.py --worlds 2 4

The model is a GPT whose params and two moments hold 100 MB. Measured is the peak of a process's resident memory over
five steps (Linux's VmHWM, reset just before), less what was resident before the model was made; the largest of the
processes. The allocator gives freed blocks back at once, so this is memory in use.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import memory
import spread
import tasks
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

STEPS = 5
VARIANTS = {  # compiling leaves hundreds of megabytes in a process that are no part of a step
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
    memory.settle()
    before = memory.resident("VmRSS")
    loop = VARIANTS[label](work)
    loop(data)  # makes what stays
    memory.settle()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        loop(data)
    peak = torch.tensor(memory.resident("VmHWM") - before)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.update(memory.ENVIRONMENT)
    state = 3 * 4 * sum(p.numel() for p in task().fresh().parameters())
    report: dict[str, Any] = {"state_bytes": state}
    for size in options.worlds:
        found = {label: spread.world_of(size, measured, label) for label in VARIANTS}
        report[str(size)] = found
        out = Table(title=f"Peak memory of a step, {size} processes, state of {state / 1e6:.0f} MB")
        for column in ("", "MB", "to torch's"):
            out.add_column(column, justify="right" if column else "left")
        for label, peak in found.items():
            base = found["torch DDP" if "ddp" in label.lower() else "torch fully_shard"]
            out.add_row(label, f"{peak / 1e6:.1f}", f"{peak / base:.2f}")
        Console(width=100).print(out)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
