"""Training loops on several processes, torch's and Lumen's, and the worlds that they run in."""

from __future__ import annotations

import functools
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import collectives  # isort: skip (before modules that import functions of torch.distributed)
import lumen as lm
from benchmarks import tasks
from benchmarks.ours import state_of, step

Loop = Callable[[list[Any]], float]  # trains on these batches; returns the last loss of all processes


def torch_ddp(task: tasks.Task) -> Loop:
    """A handwritten loop with torch's DDP."""
    net = DistributedDataParallel(task.fresh(), gradient_as_bucket_view=True)
    if collectives.WIRE.bandwidth is not None:
        net.register_comm_hook(dist.get_world_size(), collectives.hook)
    return _loop(net, torch.optim.AdamW(net.parameters(), **_ADAMW, fused=True))


def torch_compiled(task: tasks.Task) -> Loop:
    """The same, compiled."""
    net = torch.compile(DistributedDataParallel(task.fresh(), gradient_as_bucket_view=True))
    return _loop(net, torch.optim.AdamW(net.parameters(), **_ADAMW, fused=True))


def torch_fsdp(task: tasks.Task) -> Loop:
    """The same with `fully_shard` on each block and on the model."""
    net = task.fresh()
    for block in blocks(net):
        fully_shard(block)
    fully_shard(net)
    return _loop(net, torch.optim.AdamW(net.parameters(), **_ADAMW, fused=True))


def torch_compiled_fsdp(task: tasks.Task) -> Loop:
    """The same, compiled: torch breaks the graph at the hooks of each block."""
    net = task.fresh()
    for block in blocks(net):
        fully_shard(block)
    compiled = torch.compile(fully_shard(net))
    return _loop(compiled, torch.optim.AdamW(net.parameters(), **_ADAMW, fused=True))


_ADAMW = {"lr": tasks.LEARNING_RATE, "weight_decay": tasks.WEIGHT_DECAY}


def blocks(net: nn.Module) -> list[nn.Module]:
    """The modules that Lumen selects as units by default."""
    if isinstance(net, nn.Sequential):
        return [each for each in net if isinstance(each, nn.Linear)]
    return [*net.blocks]


def _loop(net: Any, optimizer: torch.optim.Optimizer) -> Loop:
    def run(batches: list[Any]) -> float:
        for x, y in batches:
            optimizer.zero_grad()
            loss = tasks.loss_of(net(x), y)
            loss.backward()
            optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)  # Lumen's loss is already that of all processes
        return float(total) / dist.get_world_size()

    return run


def lumen(*make: Callable[[], lm.Transform]) -> Callable[[tasks.Task], Loop]:
    """The same step under Lumen's transforms, updated in place."""

    def build(task: tasks.Task) -> Loop:
        fast = lm.compose(*(each() for each in make), lm.donate())(step)
        state = fast.init(state_of(task.fresh()))

        def run(batches: list[Any]) -> float:
            nonlocal state
            for batch in batches:
                state, metrics = fast(state, batch)
            return float(metrics["loss"])

        return run

    return build


STRATEGIES: dict[str, dict[str, Callable[[tasks.Task], Loop]]] = {
    "ddp": {
        "torch DDP": torch_ddp,
        "torch DDP again": torch_ddp,
        "Lumen: ddp": lumen(lm.ddp),
        "Lumen: ddp, bf16 on the wire": lumen(functools.partial(lm.ddp, reduce_dtype="bf16")),
    },
    "compiled": {
        "torch.compile(DDP)": torch_compiled,
        "torch.compile(DDP) again": torch_compiled,
        "Lumen: compile, ddp": lumen(lm.compile, lm.ddp),
        "Lumen: compile, fsdp": lumen(lm.compile, lm.fsdp),
    },
    "compiled fsdp": {
        "torch.compile(fully_shard)": torch_compiled_fsdp,
        "torch.compile(fully_shard) again": torch_compiled_fsdp,
        "Lumen: compile, fsdp": lumen(lm.compile, lm.fsdp),
    },
    "fsdp": {
        "torch fully_shard": torch_fsdp,
        "torch fully_shard again": torch_fsdp,
        "Lumen: fsdp": lumen(lm.fsdp),
        "Lumen: fsdp, stage 2": lumen(functools.partial(lm.fsdp, stage=2)),
    },
}


def counted(label: str, task: tasks.Task, loop: Loop, data: list[Any]) -> tuple[float, float]:
    """The last loss, and the bytes of a step after the first.

    Those of torch's DDP are not seen from Python, but known: each gradient once, in a ring.
    """
    loop(data[:1])  # processes exchange their layouts once
    with collectives.WIRE.counted() as sent:
        loss = loop(data[1:])
    if not label.startswith(("torch DDP", "torch.compile(DDP)")) or collectives.WIRE.bandwidth is not None:
        return loss, sent() / len(data[1:])
    size = dist.get_world_size()
    return loss, 2 * (size - 1) / size * 4 * sum(p.numel() for p in task.fresh().parameters())


def world_of(size: int, serve: Callable[..., Any], *args: Any, bandwidth: float | None = None) -> Any:
    """The result of `serve(*args)` on rank 0 of a world of `size` processes with one thread each, over Gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_served, (size, port, bandwidth, serve, args, answers), nprocs=size)  # type: ignore[no-untyped-call]
    return answers.get()


def _served(
    rank: int, size: int, port: int, bandwidth: float | None, serve: Callable[..., Any], args: Any, answers: Any
) -> None:
    warnings.filterwarnings("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    collectives.WIRE.bandwidth = bandwidth
    lm.mesh(device="cpu")
    found = serve(*args)
    if rank == 0:
        answers.put(found)
    dist.destroy_process_group()


def batches_of(task: tasks.Task, count: int, rows: int | None = None) -> list[Any]:
    """This process's next `count` batches, or its shard of `rows` rows of each common batch."""
    size, rank = dist.get_world_size(), dist.get_rank()
    if rows is None:
        return [task.batches[(i * size + rank) % tasks.DISTINCT] for i in range(count)]
    each = rows // size
    return [tuple(t[rank * each : (rank + 1) * each] for t in batch) for batch in task.data(count)]
