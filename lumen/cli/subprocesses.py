"""Run Python programs in subprocesses, so that a crash or a hang is reported and leaves this process unharmed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from lumen.parallel.comm.launchers import TORCH_NAMES, VARIABLES

# Variables that a launcher sets for its processes; their subprocesses must not inherit them.
LAUNCHER = (*TORCH_NAMES, "LOCAL_RANK", "LOCAL_WORLD_SIZE", *VARIABLES)
_POLL_SECONDS = 0.02
_ERROR = re.compile(r"[\w.]*(Error|Exception|Exit|Failure)\b.*: ")


def run_all(program: str, environments: Sequence[Mapping[str, str]], timeout: float) -> str | None:
    """Run the program once per environment, concurrently; returns None on success, otherwise the first failure.

    When one fails, or after `timeout` seconds, the others are killed.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as directory:
        outputs = [os.path.join(directory, str(i)) for i in range(len(environments))]
        processes = [
            _start(program, environment, output) for environment, output in zip(environments, outputs, strict=True)
        ]
        try:
            while time.monotonic() < deadline:
                codes = [process.poll() for process in processes]
                if any(codes) or None not in codes:
                    break
                time.sleep(_POLL_SECONDS)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failures = [_describe_failure(output, code) for output, code in zip(outputs, codes, strict=True) if code]
    if failures:
        return failures[0]
    return f"did not finish within {timeout:.0f} s" if None in codes else None


def run_program(program: str, timeout: float, **environment: str) -> str | None:
    """Run one program; returns None on success, otherwise the failure.

    >>> run_program("print(1)", 60.0) is None
    True
    >>> run_program("raise OSError('no such luck')", 60.0)
    'OSError: no such luck'
    """
    return run_all(program, [environment], timeout)


def _start(program: str, extra: Mapping[str, str], output: str) -> subprocess.Popen[bytes]:
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith("TORCHELASTIC_")}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    with open(output, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", program], env={**inherited, "PYTHONPATH": path, **extra}, stdout=file, stderr=file
        )


def _describe_failure(output: str, code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    with open(output, errors="replace") as file:
        lines = [line.rstrip() for line in file if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [f"failed with exit code {code}"])[-1]
