"""Strong and weak scaling of ddp and fsdp, torch's and Lumen's, on this machine and on an emulated network.

Weak: each process has the same batch size, whatever the number of processes; efficiency is the time of one process
over that of n. Strong: they share one batch of 8 rows; efficiency is the speed-up over n. If there are more processes
than cores, compare Lumen's figure with torch's: the variants are interleaved, so their ratio is meaningful. On an
emulated network (`--wire 50`, see collectives.py) bytes cost time as on a real one.
"""

from __future__ import annotations

import time

import torch.distributed as dist

from benchmarks import spread, tasks, timing
from benchmarks.options import Options
from benchmarks.rows import Row, quartiles, timed

PAIRS = {"ddp": ("torch DDP", "Lumen: ddp"), "fsdp": ("torch fully_shard", "Lumen: fsdp")}
ROWS = 8  # of the shared batch in strong scaling
Times = dict[str, dict[str, list[float]]]  # by kind and variant, seconds of a step in each round


def measure(options: Options) -> list[Row]:
    """Each number of processes; efficiency is relative to the first."""
    rows: list[Row] = []
    bandwidth = None if options.wire is None else options.wire * 1e6
    sizes = options.worlds or options.pick((1, 2, 4), (1, 2))
    args = (options.times(7, 2), options.pick(8, 2))
    found: dict[int, Times] = {size: spread.world_of(size, measured, *args, bandwidth=bandwidth) for size in sizes}
    for kind in ("weak", "strong"):
        for size, times in found.items():
            case = f"{kind}, {size} process{'es' if size > 1 else ''}"
            for pair in PAIRS.values():
                rows += timed("ranks", case, {label: times[kind][label] for label in pair}, pair[0], unit="ms")
    for kind in ("weak", "strong"):
        for size, times in found.items():
            case = f"{kind}, {size} process{'es' if size > 1 else ''}"
            rows += [_efficiency(case, label, kind, sizes[0], size, found) for label in times[kind]]
    return rows


def _efficiency(case: str, label: str, kind: str, first: int, size: int, found: dict[int, Times]) -> Row:
    gain = quartiles(found[first][kind][label])[1] / quartiles(found[size][kind][label])[1]
    value = gain if kind == "weak" else gain * first / size
    return Row("ranks", case, label, "efficiency", "", value, higher=True)


def measured(rounds: int, steps: int) -> Times:
    """The seconds of each variant in this world, for both kinds."""
    task = tasks.make("gpt")
    found: Times = {}
    for kind, rows in (("weak", None), ("strong", ROWS)):
        data = spread.batches_of(task, steps, rows)
        built = {label: spread.STRATEGIES[name][label](task) for name, pair in PAIRS.items() for label in pair}
        found[kind] = {label: [] for label in built}
        for index in range(rounds + 1):
            for label in timing.rotated(built, index):
                dist.barrier()
                began = time.perf_counter()
                built[label](data)
                dist.barrier()
                if index:
                    found[kind][label].append((time.perf_counter() - began) / steps)
    return found
