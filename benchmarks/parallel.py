"""The cost of a step on several processes: Lumen's ddp beside torch's DistributedDataParallel.

    python benchmarks/parallel.py                                # worlds of 2 and 4 processes, both models
    python benchmarks/parallel.py --worlds 2 --model gpt --rounds 9

Every process has one thread, and all share this machine's cores, over Gloo. The variants take turns, round by round, so
that what slows the machine slows all; a ratio is the median over rounds of the time beside that of torch's DDP in the
same round, with the quartiles. Its own row compares two such loops of torch's, and shows the noise. The bytes are those
of the tensors that a step hands to collectives. Both train the same: the losses after the last step must agree.

The machine must be quiet: with two cores, two processes leave none for anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tasks
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ours import state_of, step
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

import lumen as lm
from lumen.parallel.ddp import ddp

Loop = Callable[[list[Any]], float]  # trains on these batches, and gives the last loss
Row = dict[str, Any]


def torch_ddp(task: tasks.Task) -> tuple[Loop, Callable[[], int]]:
    """The loop that a user of torch writes."""
    net = DistributedDataParallel(task.fresh(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=tasks.LEARNING_RATE, weight_decay=tasks.WEIGHT_DECAY, fused=True)
    size = 4 * sum(p.numel() for p in net.parameters())

    def run(batches: list[Any]) -> float:
        for x, y in batches:
            optimizer.zero_grad()
            loss = tasks.loss_of(net(x), y)
            loss.backward()
            optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)  # Lumen's is the loss of all processes already
        return float(total) / dist.get_world_size()

    return run, lambda: size


def lumen_ddp(task: tasks.Task, **options: Any) -> tuple[Loop, Callable[[], int]]:
    """The same step under Lumen's ddp, in place."""
    spread = ddp(**options)
    fast = lm.compose(spread, lm.donate())(step)
    state = fast.init(state_of(task.fresh()))
    done = 0

    def run(batches: list[Any]) -> float:
        nonlocal state, done
        for batch in batches:
            state, metrics = fast(state, batch)
        done += len(batches)
        return float(metrics["loss"])

    return run, lambda: spread.wire.sent // done if spread.wire else 0


VARIANTS: dict[str, Callable[[tasks.Task], tuple[Loop, Callable[[], int]]]] = {
    "torch DDP": torch_ddp,
    "torch DDP again": torch_ddp,
    "lumen ddp": lumen_ddp,
    "lumen ddp, bf16 on the wire": lambda task: lumen_ddp(task, compress="bf16"),
}


def measured(name: str, rounds: int, steps: int) -> list[Row]:
    """One row for each variant, by this process's clock."""
    task = tasks.make(name)
    data = [task.batches[(i * dist.get_world_size() + dist.get_rank()) % tasks.DISTINCT] for i in range(steps)]
    built = {label: build(task) for label, build in VARIANTS.items()}
    times: dict[str, list[float]] = {label: [] for label in built}
    losses: dict[str, float] = {}
    for index in range(rounds + 1):
        order = list(built)
        for at in range(len(order)):
            label = order[(at + index) % len(order)]  # no variant always follows the same one
            dist.barrier()
            began = time.perf_counter()
            losses[label] = built[label][0](data)
            dist.barrier()
            if index:  # the first round warms up
                times[label].append((time.perf_counter() - began) / steps)
    wanted = losses["torch DDP"]
    far = {label: loss for label, loss in losses.items() if abs(loss - wanted) > 1e-2 * abs(wanted)}
    if far:
        raise AssertionError(f"the last loss of torch's DDP is {wanted}, but that of {far}")
    rows = []
    for label, (_, sent) in built.items():
        ratios = [mine / base for mine, base in zip(times[label], times["torch DDP"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({
            "variant": label, "ms": 1e3 * statistics.median(times[label]), "ratio": middle, "low": low, "high": high,
            "best": min(times[label]) / min(times["torch DDP"]), "bytes": sent(), "loss": losses[label],
        })  # fmt: skip
    return rows


def serve(rank: int, size: int, port: int, options: argparse.Namespace, answers: Any) -> None:
    """What each process does."""
    warnings.filterwarnings("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    lm.mesh(device="cpu")
    for name in ("mlp", "gpt") if options.model == "both" else (options.model,):
        steps = options.steps or tasks.make(name).steps // (2 if name == "mlp" else 4)
        rows = measured(name, options.rounds, steps)
        if rank == 0:
            answers.put((name, steps, rows))
    dist.destroy_process_group()


def world_of(size: int, options: argparse.Namespace) -> list[tuple[str, int, list[Row]]]:
    """What rank 0 of a world of `size` processes measured, model by model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(serve, (size, port, options, answers), nprocs=size)  # type: ignore[no-untyped-call]
    found = []
    while not answers.empty():
        found.append(answers.get())
    return found


def table(size: int, name: str, steps: int, rows: list[Row]) -> Table:
    """The rows of one model in one world."""
    out = Table(title=f"{tasks.make(name).title}, {size} processes, sections of {steps} steps")
    for column in ("", "ms/step", "to torch DDP", "quartiles", "shortest", "KiB/step", "last loss"):
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
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, help="of each timed section; by default what the model is timed with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, report = Console(width=120), []
    for size in options.worlds:
        for name, steps, rows in world_of(size, options):
            console.print(table(size, name, steps, rows))
            report.append({"world": size, "model": name, "steps": steps, "rows": rows})
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
