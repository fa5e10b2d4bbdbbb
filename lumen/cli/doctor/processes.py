"""`lumen doctor`: whether several processes find and understand each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from lumen.cli.doctor.report import Finding
from lumen.cli.subprocesses import LAUNCHER, together
from lumen.core.versions import version_of
from lumen.parallel.deepspeed.engine import missing

_SECTION = "processes"
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH = "torchrun --nproc-per-node=2 train.py"
_SUM = """
import torch
import torch.distributed as dist
from lumen.parallel.comm.init import join, leave

join("cpu", timeout=30.0)
total = torch.ones(4) * (dist.get_rank() + 1)
dist.all_reduce(total)
assert total.tolist() == [3.0] * 4, f"1 + 2 is {total.tolist()}"
leave()
"""
_MEETING = 90.0  # seconds


def several(quick: bool) -> Iterator[Finding]:
    """What a launcher has told this process, the backends, and (unless `quick`) two processes that meet."""
    yield environment(os.environ)
    yield from _backends()
    if not quick and dist.is_available() and dist.is_gloo_available():
        yield _meeting()
    yield from _deepspeed()


def environment(told: Mapping[str, str]) -> Finding:
    """Whether all that a launcher tells its processes is there, or nothing.

    >>> environment({}).found
    'no launcher started this process: a script runs alone'
    >>> environment({"RANK": "0", "WORLD_SIZE": "2"}).found
    'RANK=0, WORLD_SIZE=2, but MASTER_ADDR, MASTER_PORT not set'
    """
    name = "environment"
    given = ", ".join(f"{key}={told[key]}" for key in LAUNCHER if key in told)
    if not given:
        tasks = told.get("SLURM_NTASKS", "1")
        if tasks != "1" and "SLURM_PROCID" in told:
            fix = f"have each task of Slurm start torchrun: srun --ntasks-per-node=1 {_LAUNCH}"
            return Finding(_SECTION, name, "broken", f"Slurm runs {tasks} tasks, each of which would train alone", fix)
        return Finding(_SECTION, name, "ok", "no launcher started this process: a script runs alone")
    missing = [key for key in _NEEDED if key not in told]
    if missing:
        fix = f"start it as: {_LAUNCH}\nor alone: unset {' '.join(key for key in LAUNCHER if key in told)}"
        return Finding(_SECTION, name, "broken", f"{given}, but {', '.join(missing)} not set", fix)
    wrong = _wrong_numbers(told)
    if wrong:
        return Finding(_SECTION, name, "broken", f"{given}: {wrong}", f"start it as: {_LAUNCH}")
    return Finding(_SECTION, name, "ok", given)


def _wrong_numbers(told: Mapping[str, str]) -> str:
    numbers = [key for key in LAUNCHER if key in told and key != "MASTER_ADDR"]
    unlike = [key for key in numbers if not told[key].isdecimal()]
    if unlike:
        return f"{', '.join(unlike)} must be numbers"
    if int(told["RANK"]) >= int(told["WORLD_SIZE"]):
        return "RANK must be less than WORLD_SIZE"
    gpus = torch.cuda.device_count()
    if gpus and int(told.get("LOCAL_RANK", "0")) >= gpus:
        return f"there are {gpus} GPUs, one for each process of this machine"
    return ""


def _backends() -> Iterator[Finding]:
    if not dist.is_available():
        fix = "install a build of torch with torch.distributed: https://pytorch.org/get-started/locally"
        yield Finding(_SECTION, "torch.distributed", "missing", "torch was built without it", fix)
        return
    gpu = torch.cuda.is_available()
    for name, there, use in (
        ("gloo", dist.is_gloo_available(), "for processes on CPUs, and for what lies on the host"),
        ("nccl", dist.is_nccl_available(), "for processes on GPUs"),
    ):
        if there:
            yield Finding(_SECTION, name, "ok", use)
        else:
            fix = "install a build of torch that has it: https://pytorch.org/get-started/locally"
            needed = name == "gloo" or gpu
            said = f"torch was built without it; it is {use}"
            yield Finding(_SECTION, name, "broken" if needed else "missing", said, fix if needed else "")


def _meeting() -> Finding:
    """Two processes that meet as those of torchrun do, and add two numbers."""
    name = "two processes"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    wrong = together(_SUM, ranks, _MEETING)
    if wrong is not None:
        fix = (
            "Gloo takes the network interface that the host's name leads to: export GLOO_SOCKET_IFNAME=lo,"
            " or another one of: ls /sys/class/net"
        )
        return Finding(_SECTION, name, "broken", f"cannot add two numbers over Gloo: {wrong}", fix)
    return Finding(_SECTION, name, "ok", "meet, and add two numbers over Gloo")


def _deepspeed() -> Iterator[Finding]:
    """What DeepSpeed misses here, where it is installed."""
    if version_of("deepspeed") is None:
        return
    found = missing()
    for each in found:
        yield Finding(_SECTION, "DeepSpeed", "missing", each)
    if not found:
        yield Finding(_SECTION, "DeepSpeed", "ok", "finds all that it needs")
