"""Joins the world of processes that `torchrun` started, and leaves it again."""

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

import torch
import torch.distributed as dist

from lumen.core import distributed
from lumen.errors import WorldError
from lumen.parallel.comm import process_groups
from lumen.parallel.comm.rendezvous import rendezvous

TIMEOUT = 600.0  # seconds that a collective waits for the slowest process
# The variables in which launchers pass the number of processes and the rank. SLURM_NTASKS would not do: Slurm sets it
# in a batch script too, where one process runs. Only srun sets SLURM_STEP_NUM_TASKS.
_LAUNCHERS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    ("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
)
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether something like torchrun started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def check_launcher() -> None:
    """Raise `WorldError` where a launcher other than torchrun started this process as one of several.

    Such a launcher does not set the variables that torch.distributed reads, so each process would train alone.
    """
    if launched() or distributed.is_distributed():
        return
    for launcher, size_name, rank_name in _LAUNCHERS:
        size, rank = os.environ.get(size_name, ""), os.environ.get(rank_name, "")
        if size.isdecimal() and int(size) > 1 and rank:
            raise WorldError(
                f"this process is one of {size} that {launcher} started ({size_name}={size}, {rank_name}={rank}), and"
                f" nothing joins them: each would train alone, on all rows. {_instead(launcher)} One process that is to"
                f" train alone is started without that variable: env -u {size_name} python train.py"
            )


def _instead(launcher: str) -> str:
    nodes = "$SLURM_JOB_NUM_NODES" if launcher == "srun" else "NODES"
    one_node = "For one node write: torchrun --nproc-per-node=PROCESSES train.py."
    launch = "srun --ntasks-per-node=1" if launcher == "srun" else "mpirun --map-by ppr:1:node"
    rendezvous = "--rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
    return f"{one_node} For more: {launch} torchrun --nnodes={nodes} --nproc-per-node=PROCESSES {rendezvous} train.py."


def join(device: torch.device | str | None = None, timeout: float = TIMEOUT) -> torch.device:
    """Make this process a member of its world, once, and return its device.

    Processes that have a GPU each use NCCL (and Gloo for tensors on the host), others use Gloo. Without torchrun there
    is nothing to join.

    Raises `WorldError` where the environment is incomplete, or asks for GPUs that do not exist.
    """
    chosen = _device(device)
    check_launcher()
    if distributed.is_distributed() and not distributed.is_dry_run():
        _at_exit(own=False)
    if distributed.is_distributed() or not launched():
        return chosen
    missing = [name for name in _NAMES if name not in os.environ]
    if missing:
        raise WorldError(
            f"this process is one of WORLD_SIZE={os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set."
            " Start it as: torchrun --nproc-per-node=2 train.py"
        )
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    limit = dt.timedelta(seconds=timeout)
    store, rank, size = rendezvous(limit)
    dist.init_process_group(
        backend,
        timeout=limit,
        store=store,
        rank=rank,
        world_size=size,
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


def _device(device: torch.device | str | None) -> torch.device:
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
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise WorldError(
            f"this process has LOCAL_RANK={local}, and there are {count} GPUs here: start one process for each GPU,"
            f" torchrun --nproc-per-node={count}"
        )
    return torch.device("cuda", local)
