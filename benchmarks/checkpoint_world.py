"""The benchmark `checkpoint` on several processes, which save one state that is sharded over them.

Each process has its rows of every array, on the CPU. In each round every variant saves once and restores once, to and
from the same disk, and the order rotates. All processes begin together, and the slowest counts. DCP saves DTensors of
the same shards and restores into existing tensors. Lumen checksums and syncs every file; DCP syncs its files too.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard

import lumen as lm
from benchmarks import timing

Timed = tuple[float, float]  # blocked, total
Saved = tuple[Timed, Callable[[], object]]
Times = dict[str, list[tuple[float, float, float]]]  # blocked, total, restore


def measured(size: int, megabytes: int, arrays: int, rounds: int, root: Path) -> Times:
    """Seconds of each variant in a world of `size`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (size, port, megabytes, arrays, rounds, root, queue)
    processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    while queue.empty() and all(process.is_alive() for process in processes):
        time.sleep(0.1)
    found: Times = queue.get()
    for process in processes:
        process.join()
    return found


def run(rank: int, size: int, port: int, megabytes: int, arrays: int, rounds: int, root: Path, queue: Any) -> None:
    """One process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    mesh = lm.mesh(shard=-1, device="cpu")
    step = lm.fsdp(mesh)(lambda state, batch: (state, {}))
    rows = megabytes * 10**6 // 4 // arrays // 1024 // size * size  # DTensor.from_local assumes equal shards
    net = torch.nn.ModuleList([torch.nn.Linear(1024, rows, bias=False) for _ in range(arrays)])
    state = step.init(lm.TrainState.create(net, lm.optim.sgd(0.1)))
    times: Times = {name: [] for name in VARIANTS}
    with lm.checkpoint.Store(root / "store", keep=None).open(step) as store:
        store.save(0, state)  # allocates the host memory
        store.wait()
        for index in range(rounds + 1):
            for at, name in enumerate(timing.rotated(VARIANTS, index)):
                path = root / f"{at}-{index}"
                found = one(VARIANTS[name], state, step, path, store, index + 1)
                if index:
                    times[name].append(found)
                if rank == 0:
                    shutil.rmtree(path, ignore_errors=True)
                    shutil.rmtree(store.path(index + 1), ignore_errors=True)
    if rank == 0:
        queue.put(times)
    dist.barrier()


def one(variant: Callable[..., Saved], state: Any, step: Any, path: Path, store: Any, number: int) -> Any:
    """The seconds of the slowest process."""
    dist.barrier()
    (blocked, total), read = variant(state, step, path, store, number)
    dist.barrier()
    began = time.perf_counter()
    read()
    seconds = torch.tensor([blocked, total, time.perf_counter() - began])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return tuple(seconds.tolist())


def lumen_store(state: Any, step: Any, path: Path, store: Any, number: int) -> Saved:
    """In the background, as the Runner does it."""
    began = time.perf_counter()
    store.save(number, state)
    blocked = time.perf_counter() - began
    store.wait()
    return (blocked, time.perf_counter() - began), lambda: store.restore(number, state)


def lumen_save(state: Any, step: Any, path: Path, *_: object) -> Saved:
    """Synchronous, without a copy."""
    began = time.perf_counter()
    lm.checkpoint.save(path, state, step=step)
    took = time.perf_counter() - began
    return (took, took), lambda: lm.checkpoint.restore(path, state, step=step)


def dcp_save(state: Any, step: Any, path: Path, *_: object) -> Saved:
    """torch.distributed.checkpoint, synchronous."""
    tensors = distributed(state)
    began = time.perf_counter()
    dcp.save(tensors, checkpoint_id=path)
    took = time.perf_counter() - began
    return (took, took), lambda: dcp.load(tensors, checkpoint_id=path)


def dcp_async(state: Any, step: Any, path: Path, *_: object) -> Saved:
    """torch.distributed.checkpoint, in the background."""
    tensors = distributed(state)
    began = time.perf_counter()
    future: Any = dcp.async_save(tensors, checkpoint_id=path)
    blocked = time.perf_counter() - began
    future.result()
    return (blocked, time.perf_counter() - began), lambda: dcp.load(tensors, checkpoint_id=path)


def distributed(state: Any) -> dict[str, DTensor]:
    """The params as DTensors over the same memory."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: DTensor.from_local(part.detach(), mesh, [Shard(0)]) for name, part in state.params.items()}


DCP, DCP_ASYNC = "torch DCP", "torch DCP async_save"
VARIANTS: dict[str, Callable[..., Saved]] = {
    DCP: dcp_save,
    DCP_ASYNC: dcp_async,
    "Lumen: Store": lumen_store,
    "Lumen: save": lumen_save,
}
