"""Joins the world of processes that `torchrun` or another launcher started, and leaves it again."""

from __future__ import annotations

import atexit
import datetime as dt
import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.distributed as dist

from lumen.core import distributed
from lumen.errors import WorldError
from lumen.parallel.comm import process_groups
from lumen.parallel.comm.launchers import Launch, read_launch
from lumen.parallel.comm.rendezvous import rendezvous

TIMEOUT = 600.0  # seconds that a collective waits for the slowest process


def launched_size() -> int:
    """How many processes the launcher has started, this one among them; 1 without a launcher."""
    launch = read_launch(os.environ)
    return 1 if launch is None else launch.size


def join(device: torch.device | str | None = None, timeout: float = TIMEOUT) -> torch.device:
    """Make this process a member of its world, once, and return its device.

    Processes that have a GPU each use NCCL (and Gloo for tensors on the host), others use Gloo. Without a launcher
    there is nothing to join. With another than torchrun the variables that torchrun sets are set here, for other
    libraries.

    Raises `WorldError` where the environment is incomplete or contradicts itself, asks for GPUs that do not exist, or
    where the other processes do not come in `timeout` seconds.
    """
    if distributed.is_distributed():
        if not distributed.is_dry_run():
            _at_exit(own=False)
        return _device(device, None)
    launch = read_launch(os.environ)
    chosen = _device(device, launch)
    if launch is None:
        return chosen
    if launch.launcher != "torchrun":
        local_rank = launch.local_rank if chosen.index is None else chosen.index
        os.environ.update(replace(launch, local_rank=local_rank).variables())
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    limit = dt.timedelta(seconds=timeout)
    dist.init_process_group(
        backend,
        timeout=limit,
        store=rendezvous(launch, limit),
        rank=launch.rank,
        world_size=launch.size,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    _at_exit(own=True)
    return chosen


def leave() -> None:
    """Leave the world and end its threads; a second call does nothing.

    Meshes of this world, and steps on them, may be kept. Using them raises `WorldError`.
    """
    _let_go(_destroy)


def _let_go(*callbacks: Callable[[], None]) -> None:
    with ExitStack() as stack:  # every callback runs, whatever fails
        stack.callback(gc.collect)  # frames of a step that failed refer to its groups, in cycles
        stack.callback(process_groups.release_all)
        for callback in (*callbacks, *(closable.close for closable in process_groups.closables())):
            stack.callback(callback)


_ends: set[int] = set()  # the worlds that are left when this process ends


def _at_exit(own: bool) -> None:
    """Leave this world when the process ends; where Lumen has not joined it (`own`), only drop its references."""
    if process_groups.world_number() not in _ends:
        _ends.add(process_groups.world_number())
        atexit.register(leave_at_exit, os.getpid(), own)


def leave_at_exit(process: int, own: bool = True) -> None:
    """Leave the world of `process` as it ends; a fork has the groups but not their threads, and does nothing."""
    if process != os.getpid():
        return
    _clear_frames(getattr(sys, "last_value", None))
    _let_go(*[_destroy] * own)
    if process_groups.survivors() and not distributed.is_distributed():
        warnings.warn(
            f"torch's process groups {', '.join(process_groups.survivors())} are still referenced. Their threads stay"
            " alive, and can abort this process as it ends. Keep the mesh, not the result of mesh.group(...).",
            RuntimeWarning,
            stacklevel=2,
        )


def _clear_frames(error: BaseException | None) -> None:
    """Clear the frames in the tracebacks of an error and of its causes: they may refer to process groups."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _destroy() -> None:
    if distributed.is_distributed():
        dist.destroy_process_group()


def _device(device: torch.device | str | None, launch: Launch | None) -> torch.device:
    if distributed.is_dry_run():
        return torch.device("cpu")
    if device is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise WorldError('device="cuda" was asked for, and torch finds no GPU here. Write lm.mesh(device="cpu").')
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_RANK", "0")) if launch is None else launch.gpu(count)
    if local >= count:
        raise WorldError(
            f"this process has LOCAL_RANK={local}, and there are {count} GPUs here: start one process for each GPU,"
            f" torchrun --nproc-per-node={count}"
        )
    return torch.device("cuda", local)
