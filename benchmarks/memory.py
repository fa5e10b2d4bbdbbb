"""Peak memory of one optimizer step, as a ratio to a raw PyTorch loop with fused AdamW.

    python benchmarks/memory.py                    # about two minutes
    python benchmarks/memory.py --json PATH

The model is an MLP whose params and two moments hold 110 MB; its batch of 512 makes activations of several MB for each
layer. Every variant runs in fresh processes, and is measured in two ways:

- resident: the peak of the process's resident memory over five steps (Linux's VmHWM, reset just before), less what was
  resident before the state was made. The allocator gives freed blocks back at once (MALLOC_MMAP_THRESHOLD_), so this
  is memory in use. What compiling leaves behind is in the baseline, since the step has run once before.
- allocated: the peak of what torch's own allocator had handed out in those steps, from the profiler's memory events.

Both include params, moments, gradients and activations; but the grads that a donated warm-up step leaves behind are
in the baseline of the resident figure, which is low by their size. To be expected: donate at most 1.05 of the raw
loop, the plain step and compile alone about 1.6 (they hold the old state and the new one), compile with donate 1.03.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from rich.console import Console
from rich.table import Table
from tasks import loss_of, mlp

WIDTHS = (1024, 2560, 2560, 10)
ROWS = 512
STEPS = 5
VARIANTS = {
    "raw": "raw loop, AdamW(fused)",
    "lumen": "Lumen: the plain step",
    "lumen-donate": "Lumen: donate",
    "lumen-compile": "Lumen: compile",
    "lumen-compile-donate": "Lumen: compile, donate",
}
MARK = "measured steps"
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    """Measure each variant in processes of its own; print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    timing.hold_threads(options.threads)
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    parameters = sum((a + 1) * b for a, b in itertools.pairwise(WIDTHS))
    report: dict[str, Any] = {
        "machine": timing.machine(),
        "state_bytes": 3 * 4 * parameters,
        "widths": WIDTHS,
        "batch": ROWS,
        "rows": [],
    }
    console = Console()
    with console.status("measuring") as status:
        for name, label in VARIANTS.items():
            row: dict[str, Any] = {"name": name, "label": label}
            for method in ("resident", "allocated"):
                status.update(f"{name}: {method}")
                row[method] = measured(name, method, options.threads)
            report["rows"].append(row)
    for method in ("resident", "allocated"):
        base = report["rows"][0][method].get("bytes")
        for row in report["rows"]:
            if base and "bytes" in row[method]:
                row[method]["ratio"] = row[method]["bytes"] / base
    console.print(table(report))
    if options.json:
        timing.write_json(options.json, report)
        console.print(f"written to {options.json}")


def measured(name: str, method: str, threads: int) -> dict[str, Any]:
    """`child` in a fresh process: `{"bytes": …}`, or `{"missing": why}`."""
    command = [sys.executable, __file__, "--threads", str(threads), "--child", name, method]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, check=False)
    if done.returncode:
        return {"missing": (done.stderr.strip().splitlines() or ["it died"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(name: str, method: str) -> dict[str, Any]:
    """The peak of one variant, in this process."""
    start = trainer(name)
    batch = (torch.randn(ROWS, WIDTHS[0]), torch.randint(0, WIDTHS[-1], (ROWS,)))
    if method == "allocated":
        return {"bytes": allocated(start, batch)}
    first = start()
    for _ in range(2):
        first(batch)
    del first
    settle()
    before = resident("VmRSS")
    step = start()
    step(batch)
    settle()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        return {"missing": f"the peak of resident memory cannot be reset here: {error}"}
    for _ in range(STEPS):
        step(batch)
    return {"bytes": resident("VmHWM") - before}


def trainer(name: str) -> Callable[[], Callable[[Any], None]]:
    """`start()` makes a state and gives the function that moves it by one step."""
    if name == "raw":
        return raw
    import ours

    import lumen as lm

    transforms = [getattr(lm, each)() for each in name.split("-")[1:]]
    fast = lm.compose(*transforms)(ours.step)
    apply, tx = lm.pure(mlp(*WIDTHS).to("meta")).apply, lm.optim.adamw(1e-3)  # one function: compiled once

    def start() -> Callable[[Any], None]:
        params = {name: p.detach() for name, p in mlp(*WIDTHS).named_parameters()}
        state = fast.init(lm.TrainState.create(lm.Pure(apply, params, {}), tx))
        del params

        def step(batch: Any) -> None:
            nonlocal state
            state, _ = fast(state, batch)

        return step

    return start


def raw() -> Callable[[Any], None]:
    """The loop to compare with."""
    net = mlp(*WIDTHS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def step(batch: Any) -> None:
        x, y = batch
        optimizer.zero_grad()
        loss_of(net(x), y).backward()
        optimizer.step()

    return step


def allocated(start: Callable[[], Callable[[Any], None]], batch: Any) -> int:
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
            for _ in range(STEPS):
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


def settle() -> None:
    """Give back what is free."""
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


def table(report: dict[str, Any]) -> Table:
    """The figures, beside the raw loop's."""
    size = report["state_bytes"] / 1e6
    found = Table(title=f"Peak memory of a step, state of {size:.0f} MB, batch {ROWS}", title_justify="left")
    for name in ("variant", "resident MB", "ratio", "allocated MB", "ratio"):
        found.add_column(name, justify="left" if name == "variant" else "right")
    for row in report["rows"]:
        cells = [row["label"]]
        for method in ("resident", "allocated"):
            got = row[method]
            cells += (
                [f"{got['bytes'] / 1e6:.0f}", f"{got.get('ratio', float('nan')):.3f}"]
                if "bytes" in got
                else [
                    "–",
                    got["missing"],
                ]
            )
        found.add_row(*cells)
    return found


if __name__ == "__main__":
    main()
