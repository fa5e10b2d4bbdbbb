"""How a variant is timed: fresh state, warm-up, a collected heap, and the raw loop right beside it."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import progress
from benchmarks.rows import Row, quartiles
from benchmarks.tasks import DISTINCT, Batch, Task

WARM_UP = 8
Run = Callable[[list[Any]], Any]
Measure = Callable[[int], float]


@dataclass(frozen=True)
class Variant:
    """One way to train: `build(task)` gives a function that trains for n steps from the start: seconds per step."""

    name: str
    label: str
    build: Callable[[Task], Measure]


@dataclass
class Found:
    """The figures of one variant; `missing` says why there are none."""

    label: str
    times: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    missing: str = ""

    def row(self, part: str, case: str) -> Row:
        """The same as a row of the report."""
        if not self.ratios:
            return Row(part, case, self.label, "step", "µs", note=self.missing)
        low, ratio, high = quartiles(self.ratios)
        return Row(part, case, self.label, "step", "µs", 1e6 * statistics.median(self.times), ratio, low, high)


class NotTheSameError(AssertionError):
    """A variant whose results differ from the raw loop's."""


def looped(task: Task, fresh: Callable[[], Run], pack: Callable[[list[Batch]], list[Any]] | None = None) -> Measure:
    """A measure for a loop that the caller writes: `fresh()` gives `run(batches)`, which returns the last loss.

    `pack` turns batches into what `run` takes, outside of the timed section.
    """
    packed = pack(task.batches) if pack else task.batches
    per_call = DISTINCT // len(packed)

    def measure(steps: int) -> float:
        run = fresh()
        data = [packed[i % len(packed)] for i in range(-(-steps // per_call))]
        run(data[: max(1, WARM_UP // per_call)])
        gc.collect()
        start = time.perf_counter()
        run(data)
        return (time.perf_counter() - start) / (len(data) * per_call)

    measure.loss = lambda: fresh()(packed[: 16 // per_call])  # type: ignore[attr-defined]
    return measure


class Marked:
    """Batches for a `fit` that loops by itself. Start-up is left out: the clock runs over the last `steps` steps.

    Those before are a multiple of `whole`: a fit that takes so many steps in a call, and has less than that left at its
    end, compiles a single step there, which is to come after the clock.
    """

    def __init__(self, task: Task, steps: int, whole: int = 1) -> None:
        self.lead = -(-max(WARM_UP, -(-steps // 4)) // whole) * whole
        if steps % whole:
            raise ValueError(f"{steps} steps cannot be taken {whole} at a time")
        self.steps = steps
        self.batches = task.data(self.lead + steps + 1)  # the last batch only marks the end
        self.marks: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(self.batches):
            if i == self.lead:
                gc.collect()
                self.marks.append(time.perf_counter())
            elif i == self.lead + self.steps:
                self.marks.append(time.perf_counter())
            yield batch

    def per_step(self) -> float:
        """Seconds per step."""
        start, end = self.marks
        return (end - start) / self.steps


def compare(task: Task, variants: list[Variant], *, rounds: int, steps: int) -> list[Found]:
    """Time every variant in `rounds` interleaved rounds, each next to the raw loop, which is `variants[0]`.

    The ratios are those of such neighbors, so what slows the machine for a while slows both.
    """
    found = [Found(variant.label) for variant in variants]
    measures: list[Measure | None] = []
    wanted = None
    for each, variant in zip(found, variants, strict=True):
        progress(f"{task.name}: building {variant.name}")
        measure = _built(task, each, variant, wanted)
        measures.append(measure)
        if wanted is None and measure is not None:
            wanted = float(measure.loss())  # type: ignore[attr-defined]
    raw = measures[0]
    if raw is None:
        raise RuntimeError(f"the raw loop failed: {found[0].missing}")
    with collected():
        for index in range(rounds):
            progress(f"{task.name}: round {index + 1} of {rounds}")
            for at in rotated(range(len(found)), index):
                each, measure = found[at], measures[at]
                if measure is None:
                    continue
                if index % 2:  # the second one may have warmer caches
                    taken, beside = measure(steps), raw(steps)
                else:
                    beside, taken = raw(steps), measure(steps)
                each.times.append(taken)
                each.ratios.append(taken / beside)
                if at:
                    found[0].times.append(beside)
    return found


def take_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each in interleaved rounds, after one that warms up."""
    times: dict[str, list[float]] = {label: [] for label in measures}
    for measure in measures.values():
        measure()
    with collected():
        for index in range(rounds):
            for label in rotated(list(measures), index):
                progress(f"round {index + 1} of {rounds}: {label}")
                times[label].append(measures[label]())
    return times


def rotated(items: Any, by: int) -> list[Any]:
    """Rotate the order each time, so that no variant always follows the same one."""
    each = list(items)
    by %= len(each)
    return each[by:] + each[:by]


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """Exclude existing objects from later garbage collections."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _built(task: Task, found: Found, variant: Variant, wanted: float | None) -> Measure | None:
    try:
        with quiet():
            measure = variant.build(task)
            measure(WARM_UP)
            loss = measure.loss() if hasattr(measure, "loss") else None
            if loss is not None and wanted is not None and abs(float(loss) - wanted) > 1e-3 * abs(wanted):
                raise NotTheSameError(
                    f"after 16 steps the loss is {float(loss):.5f}, that of the raw loop {wanted:.5f}"
                )
    except ImportError as error:
        found.missing = f"not installed: {error}"
    except Exception as error:
        if os.environ.get("BENCH_TRACEBACK"):
            traceback.print_exc()
        found.missing = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    else:
        return measure
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the peers' messages on standard output."""
    if os.environ.get("BENCH_TRACEBACK"):
        yield
        return
    with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def prepare(threads: int) -> None:
    """`threads` threads and cores for torch, XLA and everything else; call it before any of them computes."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")


def machine() -> dict[str, Any]:
    """A description of the machine and versions."""
    versions = {}
    for name in ("torch", "lumen-torch", "lightning", "accelerate", "jax", "optax", "torchopt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
