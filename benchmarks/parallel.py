"""The cost of a step on several processes: Lumen's ddp and fsdp beside torch's DistributedDataParallel and fully_shard.

Every process has one thread, and all share this machine's cores, over Gloo. The variants are interleaved round by
round, so that a slow machine slows all of them. A ratio is the median over rounds of the time relative to torch's in
the same round, with the quartiles. A second row of torch compares two identical loops, and shows the noise. The bytes
are those that a process sends in a ring of collectives for a step, counted where torch is called. All variants train
the same model: their losses after the last step must agree.

On an emulated network (`--wire 50` for 50 MB/s, see collectives.py) collectives last as long as on a network of that
bandwidth, without taking processor time, so overlap shows. The machine must be quiet: two processes occupy both cores.
"""

from __future__ import annotations

import time

import torch.distributed as dist

from benchmarks import spread, tasks, timing
from benchmarks.options import Options
from benchmarks.rows import Row, timed


def measure(options: Options) -> list[Row]:
    """Each world, model and strategy."""
    rows: list[Row] = []
    bandwidth = None if options.wire is None else options.wire * 1e6
    wire = "" if options.wire is None else f", {options.wire:g} MB/s"
    for size in options.sizes(2, 4):
        for model in ("mlp", "gpt"):
            steps = tasks.make(model).steps // (2 if model == "mlp" else 4) // options.pick(1, 4)
            for strategy in spread.STRATEGIES:
                case = f"{model}, {strategy}, {size} processes{wire}"
                if options.wants(case) and not (options.quick and ("compiled" in strategy or model == "gpt")):
                    args = (case, model, strategy, options.times(11), steps)
                    rows += spread.world_of(size, measured, *args, bandwidth=bandwidth)
    return rows


def measured(case: str, model: str, strategy: str, rounds: int, steps: int) -> list[Row]:
    """Three rows for each variant: the time by this process's clock, its processor time, and the bytes."""
    task, variants = tasks.make(model), spread.STRATEGIES[strategy]
    base = next(iter(variants))
    data = spread.batches_of(task, steps)
    built = {label: build(task) for label, build in variants.items()}
    times: dict[str, list[float]] = {label: [] for label in built}
    processor: dict[str, list[float]] = {label: [] for label in built}
    losses: dict[str, float] = {}
    sent: dict[str, float] = {}
    for index in range(rounds + 1):
        for label in timing.rotated(built, index):
            dist.barrier()
            if not index:  # the first round warms up, and counts
                losses[label], sent[label] = spread.counted(label, task, built[label], data)
                continue
            began, busy = time.perf_counter(), time.process_time()
            losses[label] = built[label](data)
            dist.barrier()
            times[label].append((time.perf_counter() - began) / steps)
            processor[label].append((time.process_time() - busy) / steps)
    wanted = losses[base]
    far = {label: loss for label, loss in losses.items() if abs(loss - wanted) > 1e-2 * abs(wanted) + 1e-4}
    if far:
        raise AssertionError(f"the last loss of {base} is {wanted}, but that of {far}")
    rows = timed("parallel", case, times, base, unit="ms")
    rows += timed("parallel", case, processor, base, unit="ms", metric="processor")
    for label, count in sent.items():
        if count:  # collectives of a compiled graph are not called from Python
            rows.append(Row("parallel", case, label, "sent", "KiB", count / 1024, count / sent[base]))
    return rows
