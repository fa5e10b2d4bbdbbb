"""`lumen doctor`: check the launcher's environment, the backends, and communication between processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from lumen.cli.doctor.report import Finding
from lumen.cli.subprocesses import LAUNCHER, run_all
from lumen.core.versions import version_of
from lumen.parallel.deepspeed.engine import missing

_SECTION = "processes"
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH = "torchrun --nproc-per-node=2 train.py"
_ALL_REDUCE_PROGRAM = """
import torch
import torch.distributed as dist
from lumen.parallel.comm.init import join, leave

join("cpu", timeout=30.0)
total = torch.ones(4) * (dist.get_rank() + 1)
dist.all_reduce(total)
assert total.tolist() == [3.0] * 4, f"1 + 2 is {total.tolist()}"
leave()
"""
_RENDEZVOUS_TIMEOUT = 90.0  # seconds


def check_processes(quick: bool) -> Iterator[Finding]:
    """Check the launcher's environment, the backends, and (unless `quick`) an all-reduce of two processes."""
    yield check_environment(os.environ)
    yield from _check_backends()
    if not quick and dist.is_available() and dist.is_gloo_available():
        yield _check_rendezvous()
    yield from _check_deepspeed()


def check_environment(variables: Mapping[str, str]) -> Finding:
    """Check that the launcher's variables are all set, or none of them.

    >>> check_environment({}).detail
    'no launcher started this process: a script runs as a single process'
    >>> check_environment({"RANK": "0", "WORLD_SIZE": "2"}).detail
    'RANK=0, WORLD_SIZE=2, but MASTER_ADDR, MASTER_PORT not set'
    """
    name = "environment"
    settings = ", ".join(f"{key}={variables[key]}" for key in LAUNCHER if key in variables)
    if not settings:
        tasks = variables.get("SLURM_NTASKS", "1")
        if tasks != "1" and "SLURM_PROCID" in variables:
            fix = f"have each task of Slurm start torchrun: srun --ntasks-per-node=1 {_LAUNCH}"
            return Finding(
                _SECTION, name, "broken", f"Slurm runs {tasks} tasks, each of which would train independently", fix
            )
        return Finding(_SECTION, name, "ok", "no launcher started this process: a script runs as a single process")
    missing = [key for key in _REQUIRED if key not in variables]
    if missing:
        present = " ".join(key for key in LAUNCHER if key in variables)
        fix = f"start it as: {_LAUNCH}\nor as a single process: unset {present}"
        return Finding(_SECTION, name, "broken", f"{settings}, but {', '.join(missing)} not set", fix)
    problem = _find_invalid(variables)
    if problem:
        return Finding(_SECTION, name, "broken", f"{settings}: {problem}", f"start it as: {_LAUNCH}")
    return Finding(_SECTION, name, "ok", settings)


def _find_invalid(variables: Mapping[str, str]) -> str:
    numbers = [key for key in LAUNCHER if key in variables and key != "MASTER_ADDR"]
    invalid = [key for key in numbers if not variables[key].isdecimal()]
    if invalid:
        return f"{', '.join(invalid)} must be numbers"
    if int(variables["RANK"]) >= int(variables["WORLD_SIZE"]):
        return "RANK must be less than WORLD_SIZE"
    gpus = torch.cuda.device_count()
    if gpus and int(variables.get("LOCAL_RANK", "0")) >= gpus:
        return f"there are {gpus} GPUs, one for each process of this machine"
    return ""


def _check_backends() -> Iterator[Finding]:
    if not dist.is_available():
        fix = "install a build of torch with torch.distributed: https://pytorch.org/get-started/locally"
        yield Finding(_SECTION, "torch.distributed", "missing", "torch was built without it", fix)
        return
    gpu = torch.cuda.is_available()
    for name, available, use in (
        ("gloo", dist.is_gloo_available(), "for processes on CPUs, and for tensors in host memory"),
        ("nccl", dist.is_nccl_available(), "for processes on GPUs"),
    ):
        if available:
            yield Finding(_SECTION, name, "ok", use)
        else:
            fix = "install a build of torch that has it: https://pytorch.org/get-started/locally"
            required = name == "gloo" or gpu
            message = f"torch was built without it; it is {use}"
            yield Finding(_SECTION, name, "broken" if required else "missing", message, fix if required else "")


def _check_rendezvous() -> Finding:
    """Run an all-reduce of two processes, connected as by torchrun."""
    name = "two processes"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    failure = run_all(_ALL_REDUCE_PROGRAM, ranks, _RENDEZVOUS_TIMEOUT)
    if failure is not None:
        fix = (
            "Gloo uses the network interface of the host name's address: export GLOO_SOCKET_IFNAME=lo,"
            " or another interface listed by: ls /sys/class/net"
        )
        return Finding(_SECTION, name, "broken", f"an all-reduce over Gloo fails: {failure}", fix)
    return Finding(_SECTION, name, "ok", "an all-reduce over Gloo succeeds")


def _check_deepspeed() -> Iterator[Finding]:
    """List the missing dependencies of DeepSpeed, if it is installed."""
    if version_of("deepspeed") is None:
        return
    problems = missing()
    for problem in problems:
        yield Finding(_SECTION, "DeepSpeed", "missing", problem)
    if not problems:
        yield Finding(_SECTION, "DeepSpeed", "ok", "all its dependencies are available")
