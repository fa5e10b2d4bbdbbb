"""`lumen doctor`: check the launcher's environment, the backends, and communication between processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from lumen.cli.doctor.report import Finding
from lumen.cli.subprocesses import run_all
from lumen.core.versions import version_of
from lumen.parallel.comm.launchers import LaunchError, read_launch
from lumen.parallel.deepspeed.engine import missing

_SECTION = "processes"
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
    """Check that the launcher's variables say where this process belongs, or that there is no launcher.

    >>> check_environment({}).detail
    'no launcher started this process: a script runs as a single process'
    >>> check_environment({"RANK": "0", "WORLD_SIZE": "2"}).detail
    'this process is one of WORLD_SIZE=2, but MASTER_ADDR, MASTER_PORT is not set'
    """
    name = "environment"
    try:
        launch = read_launch(variables)
    except LaunchError as error:
        return Finding(_SECTION, name, "broken", error.problem, error.fix)
    if launch is None:
        return Finding(_SECTION, name, "ok", "no launcher started this process: a script runs as a single process")
    detail = f"{launch.launcher}: " + ", ".join(f"{key}={value}" for key, value in launch.variables().items())
    gpus = torch.cuda.device_count()
    if gpus and launch.gpu(gpus) >= gpus:
        problem = f"{detail}: there are {gpus} GPUs, one for each process of this machine"
        return Finding(_SECTION, name, "broken", problem, f"start {gpus} processes on each machine")
    return Finding(_SECTION, name, "ok", detail)


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
