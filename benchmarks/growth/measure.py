"""One axis: processor time in interleaved rounds, or the growth of resident memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import peak, timing
from benchmarks.apart import apart
from benchmarks.growth import ranks
from benchmarks.growth.axes import AXES, Axis, Work
from benchmarks.growth.slopes import Curve

SECONDS = 0.1  # of processor time in a section, if a unit takes less
MOST = 5_000  # repeats of a section
FLOOR = 2**20  # bytes: below, growth of resident memory is noise


def measured(name: str, sizes: Sequence[int], rounds: int) -> tuple[Curve, Curve]:
    """Time and memory of one axis, each in a fresh process; those of ranks in fresh worlds."""
    if AXES[name].build is None:
        return apart(rank_costs, sizes, rounds)
    return (
        apart(times, name, sizes, rounds),
        apart(memory, name, sizes, environment=peak.ENVIRONMENT),
    )


def times(name: str, sizes: Sequence[int], rounds: int) -> Curve:
    """Seconds of processor time for each unit."""
    torch.set_num_threads(1)
    axis = AXES[name]
    with tempfile.TemporaryDirectory() as folder:
        sections = [_section(axis, size, Path(folder)) for size in sizes]
        return _curve(sizes, sections, rounds)


def memory(name: str, sizes: Sequence[int]) -> Curve:
    """Bytes of resident memory at the peak, above what was resident before the work was built.

    Work of the smallest size has run before. Less than `FLOOR` counts as `FLOOR`. Once, since it repeats within 2%.
    """
    torch.set_num_threads(1)
    axis = AXES[name]
    with tempfile.TemporaryDirectory() as folder:
        _built(axis, sizes[0], Path(folder))(axis.least)
        return _curve(sizes, [_grown(axis, size, Path(folder)) for size in sizes], rounds=1)


def rank_costs(sizes: Sequence[int], rounds: int) -> tuple[Curve, Curve]:
    """Seconds of processor time, and bytes of resident memory, of rank 0."""
    costs: list[list[ranks.Cost]] = [[] for _ in sizes]
    for index in range(rounds):
        for at in timing.rotated(range(len(sizes)), index):
            costs[at].append(ranks.cost(sizes[at]))
    seconds = [[each.seconds for each in of_size] for of_size in costs]
    grown = [[max(FLOOR, each.bytes) for each in of_size] for of_size in costs]
    return Curve(sizes, seconds), Curve(sizes, grown)


def _curve(sizes: Sequence[int], measures: Sequence[Callable[[], float]], rounds: int) -> Curve:
    figures: list[list[float]] = [[] for _ in sizes]
    with timing.collected():
        for index in range(rounds):
            for at in timing.rotated(range(len(sizes)), index):
                figures[at].append(measures[at]())
    return Curve(sizes, figures)


def _built(axis: Axis, size: int, folder: Path) -> Work:
    assert axis.build is not None
    return axis.build(size, folder)


def _section(axis: Axis, size: int, folder: Path) -> Callable[[], float]:
    work = _built(axis, size, folder)

    def seconds(repeats: int) -> float:
        began = time.process_time()
        work(repeats)
        return (time.process_time() - began) / repeats

    if axis.is_long:
        return lambda: seconds(axis.least)
    seconds(axis.least)
    repeats = min(MOST, max(axis.least, int(SECONDS / max(seconds(axis.least), 1e-7))))
    seconds(repeats)
    return lambda: seconds(repeats)


def _grown(axis: Axis, size: int, folder: Path) -> Callable[[], float]:
    def grown() -> float:
        peak.settle()
        before = peak.resident("VmRSS")
        work = _built(axis, size, folder)
        peak.settle()
        Path("/proc/self/clear_refs").write_text("5")
        work(axis.least)
        return float(max(FLOOR, peak.resident("VmHWM") - before))

    return grown
