"""The cost of a step on several processes: Lumen's ddp and fsdp beside torch's DistributedDataParallel and fully_shard.

    python benchmarks/parallel.py                                # worlds of 2 and 4 processes, both models
    python benchmarks/parallel.py --worlds 2 --model gpt --strategy fsdp --rounds 9
    python benchmarks/parallel.py --wire 50                      # on an emulated wire of 50 MB/s

Every process has one thread, and all share this machine's cores, over Gloo. The variants take turns, round by round, so
that what slows the machine slows all; a ratio is the median over rounds of the time beside that of torch's in the same
round, with the quartiles. Its own second row compares two such loops of torch's, and shows the noise. The bytes are
those that a process sends in a ring of collectives for a step, counted where torch is called. All train the same: the
losses after the last step must agree.

On an emulated wire (see collectives.py) collectives last as long as a network of that bandwidth makes them, without
taking the processor: there overlap shows. The machine must be quiet: two processes leave two cores no time for others.
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

Row = dict[str, Any]


def measured(name: str, strategy: str, rounds: int, steps: int) -> list[Row]:
    """One row for each variant, by this process's clock."""
    task, variants = tasks.make(name), spread.STRATEGIES[strategy]
    base = next(iter(variants))
    data = spread.batches_of(task, steps)
    built = {label: build(task) for label, build in variants.items()}
    times: dict[str, list[float]] = {label: [] for label in built}
    losses: dict[str, float] = {}
    sent: dict[str, float] = {}
    for index in range(rounds + 1):
        order = list(built)
        for at in range(len(order)):
            label = order[(at + index) % len(order)]  # no variant always follows the same one
            dist.barrier()
            if not index:  # the first round warms up, and counts
                losses[label], sent[label] = spread.counted(label, task, built[label], data)
                continue
            began = time.perf_counter()
            losses[label] = built[label](data)
            dist.barrier()
            times[label].append((time.perf_counter() - began) / steps)
    wanted = losses[base]
    far = {label: loss for label, loss in losses.items() if abs(loss - wanted) > 1e-2 * abs(wanted) + 1e-4}
    if far:
        raise AssertionError(f"the last loss of {base} is {wanted}, but that of {far}")
    rows = []
    for label in built:
        ratios = [mine / other for mine, other in zip(times[label], times[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({
            "variant": label, "ms": 1e3 * statistics.median(times[label]), "ratio": middle, "low": low, "high": high,
            "best": min(times[label]) / min(times[base]), "bytes": sent[label], "loss": losses[label],
        })  # fmt: skip
    return rows


def table(size: int, name: str, steps: int, rows: list[Row]) -> Table:
    """The rows of one model in one world."""
    out = Table(title=f"{tasks.make(name).title}, {size} processes, sections of {steps} steps")
    for column in ("", "ms/step", "to torch", "quartiles", "shortest", "KiB/step", "last loss"):
        out.add_column(column, justify="right" if column else "left")
    for row in rows:
        out.add_row(
            row["variant"], f"{row['ms']:.2f}", f"{row['ratio']:.2f}", f"{row['low']:.2f} – {row['high']:.2f}",
            f"{row['best']:.2f}", f"{row['bytes'] / 1024:.0f}", f"{row['loss']:.4f}",
        )  # fmt: skip
    return out


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--model", choices=("mlp", "gpt", "both"), default="both")
    parser.add_argument("--strategy", choices=(*spread.STRATEGIES, "all"), default="all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, help="of each timed section; by default what the model is timed with")
    parser.add_argument("--wire", type=float, metavar="MB/s", help="emulate a wire of this bandwidth")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, report = Console(width=120), []
    bandwidth = None if options.wire is None else options.wire * 1e6
    for size in options.worlds:
        for name in ("mlp", "gpt") if options.model == "both" else (options.model,):
            steps = options.steps or tasks.make(name).steps // (2 if name == "mlp" else 4)
            for strategy in spread.STRATEGIES if options.strategy == "all" else (options.strategy,):
                args = (name, strategy, options.rounds, steps)
                rows = spread.world_of(size, measured, *args, bandwidth=bandwidth)
                console.print(table(size, name, steps, rows))
                report.append({"world": size, "model": name, "strategy": strategy, "steps": steps, "rows": rows})
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
