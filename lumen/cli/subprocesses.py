"""Python programs run beside this process, so that what crashes or hangs is found out, and takes nothing with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

# What a launcher tells the process that it starts: a child of that one is none of them.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PAUSE = 0.02
_ERROR = re.compile(r"[\w.]*(Error|Exception|Exit|Failure)\b.*: ")


def together(program: str, environments: Sequence[Mapping[str, str]], timeout: float) -> str | None:
    """Run the program once in each environment, all at once; None where all succeeded, else what went wrong first.

    When one has failed, or the time (in seconds) is over, the others are ended.
    """
    until = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as directory:
        outputs = [os.path.join(directory, str(number)) for number in range(len(environments))]
        jobs = [_started(program, each, output) for each, output in zip(environments, outputs, strict=True)]
        try:
            while time.monotonic() < until:
                codes = [job.poll() for job in jobs]
                if any(codes) or None not in codes:
                    break
                time.sleep(_PAUSE)
            codes = [job.poll() for job in jobs]
        finally:
            for job in jobs:
                job.kill()
                job.wait()
        failed = [_said(output, code) for output, code in zip(outputs, codes, strict=True) if code]
    if failed:
        return failed[0]
    return f"did not come to an end in {timeout:.0f} s" if None in codes else None


def alone(program: str, timeout: float, **environment: str) -> str | None:
    """Run one program; None where it succeeded, else what went wrong.

    >>> alone("print(1)", 60.0) is None
    True
    >>> alone("raise OSError('no such luck')", 60.0)
    'OSError: no such luck'
    """
    return together(program, [environment], timeout)


def _started(program: str, extra: Mapping[str, str], output: str) -> subprocess.Popen[bytes]:
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith("TORCHELASTIC_")}
    path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
    with open(output, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", program], env={**kept, "PYTHONPATH": path, **extra}, stdout=file, stderr=file
        )


def _said(output: str, code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    with open(output, errors="replace") as file:
        lines = [line.rstrip() for line in file if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or [f"ended with exit code {code}"])[-1]
