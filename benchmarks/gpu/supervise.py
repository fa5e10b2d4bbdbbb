"""The process that starts a group's process, watches its time, and starts it again after the check that ended it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import Check, Group, missing
from benchmarks.gpu.work import POISONED, work

START = 90.0  # seconds until the first check of a process begins: the imports, and CUDA's start
_POLL = 0.05


@dataclass(frozen=True)
class Supervisor:
    """Runs groups on `device` until `deadline`, on the clock of `time.monotonic`."""

    device: str
    deadline: float

    def results(self, group: Group) -> list[dict[str, Any]]:
        """The results of a group's checks, whatever happens to its processes."""
        if absent := missing(group.packages):
            message = f"needs the package {', '.join(absent)}"
            return [{"group": group.name, "name": "all", "status": "missing", "message": message}]
        try:
            checks = {check.name: check for check in group.checks()}
        except Exception as error:
            message = f"cannot be imported: {type(error).__name__}: {error}"
            return [{"group": group.name, "name": "all", "status": "failed", "message": message}]
        found: dict[str, dict[str, Any]] = {}
        while remaining := [name for name in checks if name not in found]:
            if time.monotonic() > self.deadline:
                late = {"status": "not run", "message": "the time for all checks was over"}
                found.update({name: {"name": name, **late} for name in remaining})
                break
            with tempfile.TemporaryDirectory() as directory:
                found.update(self._attempt(group, checks, remaining, Path(directory)))
        return [{"group": group.name, **found[name]} for name in checks]

    def _attempt(
        self, group: Group, checks: dict[str, Check], names: list[str], directory: Path
    ) -> dict[str, dict[str, Any]]:
        """The results that one process gives; at least one, so that the next one has less to do."""
        lines, log = directory / "lines.jsonl", directory / "log.txt"
        lines.touch()
        log.touch()
        # A fork has the parent's imports, which takes no time. A process that is to use CUDA begins anew.
        context = multiprocessing.get_context("fork" if self.device == "cpu" else "spawn")
        process = context.Process(target=work, args=(group, names, self.device, lines, log))
        process.start()
        why = self._watch(process, checks, lines)
        found, started = read(lines)
        if len(found) < len(names) and why is None and process.exitcode != POISONED:
            why = f"its process ended with {_exit_text(process.exitcode)}"
        if why is not None and started is None and not found:
            started = names[0]  # it could not even begin
        if started is not None:
            found[started] = {"name": started, "status": "failed", "message": why or "", "log": _tail(log)}
        return found

    def _watch(self, process: BaseProcess, checks: dict[str, Check], lines: Path) -> str | None:
        """Wait for a process; why it was killed, or None."""
        began, current = time.monotonic(), None
        try:
            while process.is_alive():
                process.join(_POLL)
                started = read(lines)[1]
                if started != current:
                    began, current = time.monotonic(), started
                limit = START if current is None else checks[current].seconds
                if time.monotonic() - began > limit:
                    return f"took longer than {limit:.0f} s"
                if time.monotonic() > self.deadline:
                    return "the time for all checks was over"
            return None
        finally:
            _end(process)


def read(lines: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The results in a file by name, and the check that has begun and not ended."""
    found, started = {}, None
    for text in lines.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # half a line
            line = json.loads(text)
            if line["status"] == "started":
                started = line["name"]
            else:
                found[line["name"]], started = line, None
    return found, started


def _end(process: BaseProcess) -> None:
    """End a process and all that it has started; one that hangs writes its stacks first."""
    if process.pid is None:
        return
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
            process.join(1.0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
    if process.is_alive():
        process.kill()
    process.join()


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"the signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:]
