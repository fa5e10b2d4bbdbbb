"""The peak of a process's memory over some steps, measured in two ways.

- allocated: the maximum that torch's own allocator had handed out, from the profiler's memory events.
- resident: the peak of the process's resident memory (Linux's VmHWM, reset just before), less what was resident before
  the state was made. The allocator returns freed blocks at once (`ENVIRONMENT`), so this is memory in use. The step has
  run once before, so the baseline includes memory that compiling has allocated. It also includes the grads that a
  donated warm-up step keeps; the figure is too low by their size.

Both include params, moments, gradients and activations.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARK = "measured steps"
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def allocated(start: Callable[[], Callable[[Any], None]], batch: Any, steps: int = 3) -> int:
    """The peak of bytes allocated since before the state was made, over the measured steps."""
    first = start()
    first(batch)
    del first
    settle()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        step = start()
        step(batch)
        gc.collect()
        with torch.profiler.record_function(MARK):
            for _ in range(steps):
                step(batch)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    begin = next(event["ts"] for event in events if event.get("name") == MARK)
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for when, change in sorted(changes, key=lambda each: each[0]):
        held += change
        if when >= begin:
            peak = max(peak, held)
    return peak


def grown(start: Callable[[], Callable[[Any], None]], batch: Any, steps: int = 3) -> int:
    """The peak of resident memory above what was resident before the state was made."""
    first = start()
    for _ in range(2):
        first(batch)
    del first
    settle()
    before = resident("VmRSS")
    step = start()
    step(batch)
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(steps):
        step(batch)
    return resident("VmHWM") - before


def settle() -> None:
    """Return free memory to the system."""
    import ctypes

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return  # not glibc


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
