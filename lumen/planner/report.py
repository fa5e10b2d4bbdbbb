"""`Plan`: the trace of a run, its cost on a device, and the report."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from lumen.core.urls import local_path
from lumen.errors import HyperparameterError
from lumen.planner import render as picture
from lumen.planner.comm_trace import CollectiveCall, axes_of
from lumen.planner.dry_run import RunTrace
from lumen.planner.memory import Peak
from lumen.planner.report_text import assumptions, report_lines
from lumen.planner.roofline import Device, compute_seconds, ring_bytes, ring_seconds
from lumen.planner.suggestions import suggestions


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
    bytes `by_category`, its `moment`, and the live `blocks`, the largest first. `traffic` lists the collectives of a
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
        return assumptions(self.trace, self.device)

    # ---------------------------------------------------------------------------------------- text and pictures

    def __str__(self) -> str:
        return "\n".join(line.rstrip() for line in report_lines(self))

    __repr__ = __str__

    @functools.cached_property
    def timeline(self) -> picture.Timeline:
        """Memory by category over the operations of a step."""
        return self.trace.tracker.memory.timeline("step")

    @property
    def _title(self) -> str:
        return f"{self.trace.step!r}, rank {self.trace.rank} of {self.trace.world_size}"

    def svg(self) -> str:
        """Memory over a step, stacked by category, as an SVG element."""
        return picture.svg(self.timeline, self.device.memory, self._title)

    def figure(self) -> Any:
        """The same as a `matplotlib.figure.Figure`; matplotlib must be installed."""
        return picture.figure(self.timeline, self.device.memory, self._title)

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
        target = local_path(path, "the path of a plan")
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
            "by_category": dict(self.peak.by_category),
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
