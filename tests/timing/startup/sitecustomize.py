"""Imported by every Python process that starts while `make test-times` runs: writes down its start and its end."""

from __future__ import annotations

import atexit
import json
import os
import time


def _note(log: str, **what: object) -> None:
    with open(log, "a") as file:
        file.write(json.dumps(what) + "\n")


def _watch(log: str) -> None:
    process = os.getpid()

    def end() -> None:
        if os.getpid() == process:  # a fork runs the exit handlers of what it was forked from
            _note(log, kind="end", cpu=time.process_time())

    _note(log, kind="start")
    atexit.register(end)


if os.environ.get("LUMEN_TIMES"):
    _watch(os.environ["LUMEN_TIMES"])
if os.environ.get("COVERAGE_PROCESS_START"):
    import coverage

    coverage.process_startup()
