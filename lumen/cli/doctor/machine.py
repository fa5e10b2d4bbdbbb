"""`lumen doctor`: check the devices of this machine, their precision, and the compiler."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lumen.cli.doctor.report import Finding, Status
from lumen.cli.subprocesses import run_program
from lumen.core.inspect import human_bytes

_SECTION = "devices"
_COMPILE_PROGRAM = """
import torch
x = torch.linspace(0, 1, 64, device={device!r})
y = torch.compile(lambda x: x.sin() * 2 + 1, fullgraph=True)(x)
torch.testing.assert_close(y, x.sin() * 2 + 1)
"""
_COMPILE_TIMEOUT = 300.0  # seconds
_SIZE = 64


def check_devices() -> Iterator[Finding]:
    """Check the CPU, every GPU, and the precision of float32 matrix products."""
    capability = torch.backends.cpu.get_cpu_capability()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        _SECTION, "CPU", *_test_device("cpu", f"{cores} cores, {torch.get_num_threads()} threads, {capability}")
    )
    yield from _check_cuda()
    yield _check_mps()
    yield _check_matmul_precision()


def check_compiler() -> Finding:
    """Check that `torch.compile` compiles a line of code."""
    section, name = "compiler", "torch.compile"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as cache:  # empty: a cached result would hide a failure
        failure = run_program(_COMPILE_PROGRAM.format(device=device), _COMPILE_TIMEOUT, TORCHINDUCTOR_CACHE_DIR=cache)
    if failure is None:
        return Finding(section, name, "ok", f"compiles for {device}")
    if device == "cuda":
        fix = "pip install triton, in the version that torch requires: pip show torch. Or omit lm.compile()"
    else:
        fix = "apt-get install g++ (or set CXX to a C++ compiler). Or omit lm.compile()"
    return Finding(section, name, "broken", f"fails for {device}: {failure}", fix)


def _check_cuda() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists()
        if driver and torch.version.cuda is None:
            fix = "install a build of torch for CUDA: https://pytorch.org/get-started/locally"
            yield Finding(_SECTION, "CUDA", "missing", "there is an NVIDIA driver, but torch was built for CPUs", fix)
        elif driver:
            fix = "check nvidia-smi, and whether CUDA_VISIBLE_DEVICES hides the GPUs"
            yield Finding(_SECTION, "CUDA", "broken", "there is an NVIDIA driver, but torch sees no GPU", fix)
        else:
            yield Finding(_SECTION, "CUDA", "missing", "torch sees no GPU")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        capability = (properties.major, properties.minor)
        features = [
            properties.name,
            human_bytes(properties.total_memory),
            "compute capability {}.{}".format(*capability),
        ]
        features += [
            name for name, minimum in (("bf16", (8, 0)), ("tf32", (8, 0)), ("fp8", (8, 9))) if capability >= minimum
        ]
        yield Finding(_SECTION, f"CUDA {number}", *_test_device(f"cuda:{number}", ", ".join(features)))


def _check_mps() -> Finding:
    if torch.backends.mps.is_available():
        return Finding(_SECTION, "MPS", *_test_device("mps", "an Apple GPU, without float64"))
    return Finding(_SECTION, "MPS", "missing", "torch sees no Apple GPU")


def _test_device(device: str, description: str) -> tuple[Status, str, str]:
    """Multiply two matrices on the device."""
    try:
        matrix = torch.ones(_SIZE, _SIZE, device=device)
        is_correct = bool((matrix @ matrix == _SIZE).all())
    except RuntimeError as error:
        fix = "install a build of torch for this device: https://pytorch.org/get-started/locally"
        return "broken", f"{description}: {str(error).splitlines()[0]}", fix
    return (
        ("ok", description, "")
        if is_correct
        else ("broken", f"{description}: its matrix products are wrong", "use another device")
    )


def _check_matmul_precision() -> Finding:
    names = {"highest": "float32", "high": "TF32 where available", "medium": "bfloat16 where available"}
    precision = torch.get_float32_matmul_precision()
    return Finding(_SECTION, "float32 products", "ok", f"computed in {names[precision]} ({precision!r})")
