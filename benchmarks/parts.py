"""The benchmarks: one module each, with `measure(options)`, whose docstring says what it measures and how."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.options import Options
from benchmarks.rows import Row

PARTS = (
    "overhead",
    "leaves",
    "scaling",
    "runner",
    "sweep",
    "loading",
    "checkpoint",
    "memory",
    "parallel",
    "parallel_memory",
    "ranks",
    "start",
)


def measured(part: str, options: Options) -> tuple[dict[str, Any], list[Row]]:
    """The machine as it was before, and the rows of one part, in the process that this is called in."""
    from benchmarks import timing  # with torch, which the process that starts the parts has no need of

    timing.prepare(options.threads)
    machine = timing.machine()
    return machine, importlib.import_module(f"benchmarks.{part}").measure(options)


def about(part: str) -> str:
    """What a part measures."""
    return (importlib.import_module(f"benchmarks.{part}").__doc__ or "").partition("\n")[0]
