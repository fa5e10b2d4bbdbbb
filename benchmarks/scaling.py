"""Strong and weak scaling of ddp and fsdp, torch's and Lumen's, on this machine and on an emulated wire.

    python benchmarks/scaling.py                        # 1, 2 and 4 processes
    python benchmarks/scaling.py --wire 50 --worlds 1 2

Weak: each process has the same batch, whatever the number of processes; efficiency is the time of one process over that
of n. Strong: they share one batch of 8 rows; efficiency is the speed-up over n. More processes than cores share these:
the figure to look at is then Lumen's beside torch's, which the variants' taking turns makes comparable. On an emulated
wire (see collectives.py) bytes cost time as on a network. Bytes are those that a process sends for a step, in a ring.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import spread
import tasks
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

VARIANTS = {
    "torch DDP": spread.STRATEGIES["ddp"]["torch DDP"],
    "lumen ddp": spread.STRATEGIES["ddp"]["lumen ddp"],
    "torch fully_shard": spread.STRATEGIES["fsdp"]["torch fully_shard"],
    "lumen fsdp": spread.STRATEGIES["fsdp"]["lumen fsdp"],
}
ROWS = 8  # of the batch that is shared in strong scaling


def measured(rounds: int, steps: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By kind and variant: seconds of a step, and bytes."""
    task = tasks.make("gpt")
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for kind, rows in (("weak", None), ("strong", ROWS)):
        data = spread.batches_of(task, steps, rows)
        built = {label: build(task) for label, build in VARIANTS.items()}
        times: dict[str, list[float]] = {label: [] for label in built}
        sent: dict[str, float] = {}
        for index in range(rounds + 1):
            for label, loop in built.items():
                dist.barrier()
                if not index:  # the first round warms up, and counts
                    _, sent[label] = spread.counted(label, task, loop, data)
                    continue
                began = time.perf_counter()
                loop(data)
                dist.barrier()
                times[label].append((time.perf_counter() - began) / steps)
        found[kind] = {label: (statistics.median(times[label]), sent[label]) for label in built}
    return found


def table(kind: str, found: dict[int, Any]) -> Table:
    """The figures of one kind of scaling."""
    smallest = min(found)
    out = Table(title=f"{kind} scaling, GPT of 4 layers and width 128")
    out.add_column("")
    for size in found:
        out.add_column(f"{size}: ms", justify="right")
        out.add_column("efficiency", justify="right")
        out.add_column("KiB", justify="right")
    for label in VARIANTS:
        cells = [label]
        for size, by_kind in found.items():
            seconds, size_sent = by_kind[kind][label]
            gain = found[smallest][kind][label][0] / seconds
            efficiency = gain if kind == "weak" else gain * smallest / size
            cells += [f"{1e3 * seconds:.1f}", f"{efficiency:.2f}", f"{size_sent / 1024:.0f}"]
        out.add_row(*cells)
    return out


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--wire", type=float, metavar="MB/s", help="emulate a wire of this bandwidth")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bandwidth = None if options.wire is None else options.wire * 1e6
    found = {
        size: spread.world_of(size, measured, options.rounds, options.steps, bandwidth=bandwidth)
        for size in options.worlds
    }
    console = Console(width=120)
    for kind in ("weak", "strong"):
        console.print(table(kind, found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
