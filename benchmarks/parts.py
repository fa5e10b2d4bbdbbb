"""The benchmarks: one module each, with `measure(options)`, whose docstring says what it measures and how."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.options import Options
from benchmarks.rows import Row

PARTS = (
    "overhead",
    "stacks",
    "leaves",
    "low_bit",
    "scaling",
    "runner",
    "fit",
    "sweep",
    "sweep_cnn",
    "loading",
    "sampling",
    "packing",
    "checkpoint",
    "memory",
    "vocabulary",
    "parallel",
    "parallel_memory",
    "context_memory",
    "lora_memory",
    "pretrained_memory",
    "ranks",
    "start",
)


def measured(part: str, options: Options) -> tuple[dict[str, Any], list[Row]]:
    """The machine before the benchmark, and the rows of one benchmark, measured in this process."""
    from benchmarks import timing  # imports torch, which the parent process does not need

    timing.prepare(options.threads)
    machine = timing.machine()
    return machine, importlib.import_module(f"benchmarks.{part}").measure(options)


def about(part: str) -> str:
    """The first line of a benchmark's docstring."""
    return (importlib.import_module(f"benchmarks.{part}").__doc__ or "").partition("\n")[0]
