"""`lumen doctor`: the devices of this machine, what they compute in, and its compiler."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lumen.cli.doctor.report import Finding, Status
from lumen.cli.subprocesses import alone
from lumen.core.inspect import human_bytes

_SECTION = "devices"
_COMPILED = """
import torch
x = torch.linspace(0, 1, 64, device={device!r})
y = torch.compile(lambda x: x.sin() * 2 + 1, fullgraph=True)(x)
torch.testing.assert_close(y, x.sin() * 2 + 1)
"""
_COMPILE = 300.0  # seconds
_PRODUCT = 64


def devices() -> Iterator[Finding]:
    """The CPU, every GPU, and how float32 products are computed."""
    capability = torch.backends.cpu.get_cpu_capability()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(_SECTION, "CPU", *_tried("cpu", f"{cores} cores, {torch.get_num_threads()} threads, {capability}"))
    yield from _cuda()
    yield _mps()
    yield _products()


def compiler() -> Finding:
    """Whether `torch.compile` makes machine code here: it compiles a line."""
    section, name = "compiler", "torch.compile"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as cache:  # empty, or an earlier success would be found there
        wrong = alone(_COMPILED.format(device=device), _COMPILE, TORCHINDUCTOR_CACHE_DIR=cache)
    if wrong is None:
        return Finding(section, name, "ok", f"compiles for {device}")
    if device == "cuda":
        fix = "pip install triton, in the version that torch names: pip show torch. Without it leave out lm.compile()"
    else:
        fix = "apt-get install g++ (or set CXX to a C++ compiler). Without it leave out lm.compile()"
    return Finding(section, name, "broken", f"fails for {device}: {wrong}", fix)


def _cuda() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists()
        if driver and torch.version.cuda is None:
            fix = "install a build of torch for CUDA: https://pytorch.org/get-started/locally"
            yield Finding(_SECTION, "CUDA", "missing", "there is an NVIDIA driver, but torch was built for CPUs", fix)
        elif driver:
            fix = "see nvidia-smi, and whether CUDA_VISIBLE_DEVICES hides the GPUs"
            yield Finding(_SECTION, "CUDA", "broken", "there is an NVIDIA driver, but torch sees no GPU", fix)
        else:
            yield Finding(_SECTION, "CUDA", "missing", "no GPU that torch sees")
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        capability = (found.major, found.minor)
        said = [found.name, human_bytes(found.total_memory), "compute capability {}.{}".format(*capability)]
        said += [name for name, least in (("bf16", (8, 0)), ("tf32", (8, 0)), ("fp8", (8, 9))) if capability >= least]
        yield Finding(_SECTION, f"CUDA {number}", *_tried(f"cuda:{number}", ", ".join(said)))


def _mps() -> Finding:
    if torch.backends.mps.is_available():
        return Finding(_SECTION, "MPS", *_tried("mps", "Apple's GPU; it has no float64"))
    return Finding(_SECTION, "MPS", "missing", "no Apple GPU that torch sees")


def _tried(device: str, found: str) -> tuple[Status, str, str]:
    """Whether the device multiplies two matrices."""
    try:
        ones = torch.ones(_PRODUCT, _PRODUCT, device=device)
        right = bool((ones @ ones == _PRODUCT).all())
    except RuntimeError as error:
        fix = "install a build of torch for this device: https://pytorch.org/get-started/locally"
        return "broken", f"{found}: {str(error).splitlines()[0]}", fix
    return ("ok", found, "") if right else ("broken", f"{found}: it gives wrong products", "use another device")


def _products() -> Finding:
    said = {"highest": "float32", "high": "TF32 where there is any", "medium": "bfloat16 where there is any"}
    precision = torch.get_float32_matmul_precision()
    return Finding(_SECTION, "float32 products", "ok", f"computed in {said[precision]} ({precision!r})")
