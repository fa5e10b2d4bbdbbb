"""`Plan`: the trace of a run, its cost on a device, and the report."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lumen.core.inspect import human_bytes
from lumen.errors import HyperparameterError, printable
from lumen.planner import render as picture
from lumen.planner.comm_trace import CollectiveCall, axes_of
from lumen.planner.dry_run import RunTrace
from lumen.planner.memory import Peak
from lumen.planner.roofline import Device, compute_seconds, ring_bytes, ring_seconds
from lumen.planner.suggestions import suggestions

_LARGEST_TENSORS = 6  # in the report
_SPARKLINE_WIDTH = 60


class Traffic(NamedTuple):
    """The collectives of one kind over the same axes in one step: their count, payload, bytes sent and time."""

    kind: str
    axes: str
    times: int
    carried: int
    sent: int
    seconds: float


class Plan:
    """Memory, communication and compute of one process of a run: `str(plan)` is a table; notebooks also show a chart.

    `peak` is the peak memory of two steps, `start` that before the first step, and `host` that of the host's
    memory under `lm.fsdp(offload=True)`. Each has `nbytes`, its
    `parts` by category, its `moment`, and the live `blocks`, the largest first. `traffic` lists the collectives of a
    step, `flops` are its floating-point operations, `seconds` its shortest and longest time, and `suggestions` say what
    to change if it does not fit. `trace` is what was recorded.
    """

    def __init__(self, trace: RunTrace, device: Device) -> None:
        self.trace = trace
        self.device = device
        memory = trace.tracker.memory
        self.peak: Peak = memory.peak("first step", "step")
        self.host: Peak = memory.peak(host=True)
        self.start: Peak = memory.peak("make", "init")
        work = [operation for operation in trace.tracker.work if operation.stage == "step"]
        self.flops = sum(operation.flops for operation in work)
        self.compute = compute_seconds(work, device)
        self._ideal = sum(operation.flops / device.peak(operation.dtype) for operation in work if operation.flops)
        self.traffic = self._traffic()

    # ---------------------------------------------------------------------------------------- numbers

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return max(self.peak.nbytes, self.start.nbytes) <= self.device.memory

    @property
    def communication(self) -> float:
        """Seconds that the collectives of a step take, one after the other."""
        return sum(traffic.seconds for traffic in self.traffic)

    @property
    def seconds(self) -> tuple[float, float]:
        """A step's time with communication fully overlapped by computation, and without overlap."""
        return max(self.compute, self.communication), self.compute + self.communication

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilization at the longest and the shortest step time; recomputation counts."""
        best, worst = self.seconds
        return (self._ideal / worst, self._ideal / best) if best else (0.0, 0.0)

    @functools.cached_property
    def suggestions(self) -> list[str]:
        """What to change if the run does not fit."""
        trace = self.trace
        return suggestions(trace.step, trace.sizes, trace.world_size, self.peak, self.start, self.device.memory)

    def _traffic(self) -> list[Traffic]:
        groups: dict[tuple[str, tuple[int, ...]], list[CollectiveCall]] = {}
        for call in self.trace.tracker.collectives:
            if call.stage == "step":
                groups.setdefault((call.kind, call.ranks), []).append(call)
        traffic = [
            Traffic(
                kind,
                axes_of(ranks, self.trace.sizes) if self.trace.sizes else f"{len(ranks)} processes",
                len(calls),
                sum(call.nbytes for call in calls),
                round(sum(map(ring_bytes, calls))),
                sum(ring_seconds(call, self.device) for call in calls),
            )
            for (kind, ranks), calls in groups.items()
        ]
        return sorted(traffic, key=lambda entry: -entry.seconds)

    @property
    def assumptions(self) -> list[str]:
        """The assumptions behind the numbers."""
        device, trace = self.device, self.trace
        lines = [
            "memory is that of tensors: without kernel workspaces, the allocator's cache and the CUDA context",
            f"compute is a roofline at {device.efficiency:.0%} of {device.name}'s peak and bandwidth, eager, without"
            " kernel launch time",
            f"collectives are rings, and all-reduces trees if faster; {device.per_node} devices per node,"
            f" {_rate(device.inside)} within it and {_rate(device.between)} per device between nodes",
            "the shorter time overlaps all communication with computation, the longer none",
            "every process has as many rows as this one, and never waits for data",
        ]
        if trace.compiled:
            lines.append("lm.compile was left out: compiled steps use less memory and run faster")
        reads = trace.tracker.reads
        if reads:
            first = _short(reads[0])
            lines.append(
                f"the run reads {len(reads)} numbers from tensors (first at {first}), which are zero in a plan"
            )
        return lines

    # ---------------------------------------------------------------------------------------- words

    def __str__(self) -> str:
        return "\n".join(line.rstrip() for line in self._lines())

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        trace = self.trace
        axes = ", ".join(f"{name}={size}" for name, size in trace.sizes.items() if size > 1)
        yield f"{trace.step!r}"
        yield f"rank {trace.rank} of {trace.world_size}{f' ({axes})' if axes else ''} on {self.device.name}"
        yield ""
        yield from self._memory_lines()
        yield ""
        yield from self._traffic_lines()
        yield ""
        yield from self._time_lines()
        for suggestion in self.suggestions:
            yield f"  try: {suggestion}"
        yield ""
        yield "assumptions"
        for assumption in self.assumptions:
            yield f"  - {assumption}"

    def _memory_lines(self) -> Iterator[str]:
        peak = self.peak
        yield f"memory at the peak of a step ({_where(peak)})"
        for name, nbytes in peak.parts.items():
            if nbytes:
                share = nbytes / peak.nbytes
                yield f"  {name:16} {human_bytes(nbytes):>10}  {share:>4.0%}  {picture.bar(share)}"
        verdict = "fits" if peak.nbytes <= self.device.memory else "does NOT fit"
        limit = f"{human_bytes(self.device.memory)} ({peak.nbytes / self.device.memory:.0%})"
        yield f"  {'peak':16} {human_bytes(peak.nbytes):>10}  of {limit}: {verdict}"
        verdict = "" if self.start.nbytes <= self.device.memory else ": does NOT fit"
        yield f"  {'before step 1':16} {human_bytes(self.start.nbytes):>10}  ({self.start.moment.stage}){verdict}"
        totals = [sum(point[1].values()) for point in picture.sampled(self._timeline, _SPARKLINE_WIDTH)]
        if self.host.nbytes:
            categories = ", ".join(f"{name} {human_bytes(n)}" for name, n in self.host.parts.items() if n)
            yield f"  {'on the host':16} {human_bytes(self.host.nbytes):>10}  ({categories})"
        yield f"  over a step      {picture.sparkline(totals)}"
        yield "  largest at the peak"
        for block in peak.blocks[:_LARGEST_TENSORS]:
            shape = f"{str(block.dtype).removeprefix('torch.')} {list(block.shape)}"
            created = block.created.module or block.created.phase
            origin = block.name or f"{block.operation.partition('::')[2]} in {created}"
            yield f"    {human_bytes(block.nbytes):>10}  {block.purpose():16} {shape}  {printable(origin)}"

    def _traffic_lines(self) -> Iterator[str]:
        if not self.traffic:
            yield "communication of a step: none"
            return
        yield "communication of a step"
        yield f"  {'':14} {'over':12} {'times':>5} {'carries':>10} {'sends':>10} {'takes':>9}"
        for traffic in self.traffic:
            yield (
                f"  {traffic.kind:14} {traffic.axes:12} {traffic.times:>5} {human_bytes(traffic.carried):>10}"
                f" {human_bytes(traffic.sent):>10} {_time(traffic.seconds):>9}"
            )

    def _time_lines(self) -> Iterator[str]:
        best, worst = self.seconds
        low, high = self.mfu
        yield "time of a step"
        yield f"  compute        {_time(self.compute):>9}  ({self.flops / 1e12:.3g} TFLOP)"
        yield f"  communication  {_time(self.communication):>9}"
        yield f"  together       {_time(best)} – {_time(worst)}, MFU {high:.0%} – {low:.0%}"

    # ---------------------------------------------------------------------------------------- pictures

    @functools.cached_property
    def _timeline(self) -> picture.Timeline:
        return self.trace.tracker.memory.timeline("step")

    @property
    def _title(self) -> str:
        return f"{self.trace.step!r}, rank {self.trace.rank} of {self.trace.world_size}"

    def svg(self) -> str:
        """Memory over a step, stacked by category, as an SVG element."""
        return picture.svg(self._timeline, self.device.memory, self._title)

    def figure(self) -> Any:
        """The same as a `matplotlib.figure.Figure`; matplotlib must be installed."""
        return picture.figure(self._timeline, self.device.memory, self._title)

    def _repr_html_(self) -> str:
        return f'<div>{self.svg()}<pre style="line-height:1.2">{html.escape(str(self))}</pre></div>'

    def to_html(self) -> str:
        """A page with the chart and the table."""
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self._title)}</title>'
            f'<body style="max-width:60rem;margin:2rem auto">{self._repr_html_()}</body></html>\n'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page (`.html`) or the chart (`.svg`, `.png`), by the suffix of `path`."""
        target = Path(path)
        if target.suffix == ".png":
            self.figure().savefig(target, dpi=150)
        elif target.suffix in (".html", ".svg"):
            target.write_text(self.to_html() if target.suffix == ".html" else self.svg(), encoding="utf-8")
        else:
            raise HyperparameterError(f"a plan is written as .html, .svg or .png, not as {target.name!r}.")

    @property
    def numbers(self) -> Mapping[str, Any]:
        """Everything in the table, for programs."""
        return {
            "world": self.trace.world_size,
            "rank": self.trace.rank,
            "mesh": dict(self.trace.sizes),
            "device": self.device.name,
            "peak": self.peak.nbytes,
            "parts": dict(self.peak.parts),
            "start": self.start.nbytes,
            "host": self.host.nbytes,
            "fits": self.fits,
            "traffic": [traffic._asdict() for traffic in self.traffic],
            "flops": self.flops,
            "compute": self.compute,
            "communication": self.communication,
            "seconds": list(self.seconds),
            "mfu": list(self.mfu),
            "suggestions": self.suggestions,
            "assumptions": self.assumptions,
        }


def _where(peak: Peak) -> str:
    moment = peak.moment
    step = "in the first step, " if moment.stage == "first step" else ""
    return f"{step}{moment.phase or 'around it'}{f' at {printable(moment.module)}' if moment.module else ''}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:g} GB/s"


def _short(location: str) -> str:
    return "/".join(Path(location).parts[-2:])
