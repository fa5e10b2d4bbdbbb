"""What the process of a group does: run its checks one by one, and append a line to a file as each begins and ends."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import Check, Group, Setting, missing

POISONED = 75  # the exit code after an error that the GPU does not recover from, such as a failed assertion


def work(group: Group, names: Sequence[str], device: str, lines: Path, log: Path) -> None:
    """Run the checks `names` of a group on `device`; results go to `lines`, and what is printed to `log`."""
    os.setsid()  # so that all it has started can be killed with it
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        checks = group.checks()
        gc.freeze()  # what has been imported need not be looked at after each check
        for check in checks:
            if check.name in names:
                _append(lines, {"name": check.name, "status": "started", "time": time.time()})
                result = run(check, device)
                sys.stdout.flush()
                _append(lines, {"name": check.name, **result})
                if result["status"] == "failed" and _is_poisoned(device):
                    os._exit(POISONED)
    os._exit(0)  # without waiting for threads that a check has left


def run(check: Check, device: str) -> dict[str, Any]:
    """The result of one check: its status, message, seconds and figures."""
    import torch

    import lumen as lm

    if check.needs_gpu and device == "cpu":
        return _result("needs a GPU")
    if absent := missing(check.packages):
        return _result("missing", f"needs the package {', '.join(absent)}")
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(), _settings_kept():
            warnings.simplefilter("default")
            torch.manual_seed(0)
            setting = Setting(torch.device(device), Path(directory))
            figures = check.run(setting)
            setting.synchronize()
        return _result("passed", "", began, figures)
    except lm.LumenError as error:
        return _result("refused" if check.may_refuse else "failed", _text(error), began, trace=traceback.format_exc())
    except BaseException as error:
        return _result("failed", _text(error), began, trace=traceback.format_exc())
    finally:
        _clean()


def _result(
    status: str, message: str = "", began: float | None = None, figures: Any = None, trace: str = ""
) -> dict[str, Any]:
    seconds = 0.0 if began is None else time.perf_counter() - began
    result = {"status": status, "message": message, "seconds": round(seconds, 2), "figures": figures or {}}
    return {**result, "traceback": trace[-6000:]} if trace else result


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


@contextlib.contextmanager
def _settings_kept() -> Any:
    """Put back what a check may leave changed when it fails."""
    import torch

    precision, environment = torch.get_float32_matmul_precision(), dict(os.environ)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if torch.are_deterministic_algorithms_enabled():  # the call imports the compiler
            torch.use_deterministic_algorithms(False)
        os.environ.clear()
        os.environ.update(environment)


def _clean() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.compiler.reset()
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _is_poisoned(device: str) -> bool:
    import torch

    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).sum().item()
    except Exception:
        return True
    return False


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")
