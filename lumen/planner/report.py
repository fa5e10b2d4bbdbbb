"""`Plan`: what was seen of a run, what it will take on a device, and how that reads."""

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
from lumen.planner.comm_trace import Sent, axes_of
from lumen.planner.dry_run import Seen
from lumen.planner.memory import Peak
from lumen.planner.roofline import Device, compute_seconds, ring_bytes, ring_seconds
from lumen.planner.suggestions import suggestions

_SHOWN = 6  # of the largest tensors
_CELLS = 60  # of a line over a step


class Traffic(NamedTuple):
    """The collectives of one kind over the same axes in one step: how many, what they carry, what a process sends."""

    kind: str
    axes: str
    times: int
    carried: int
    sent: int
    seconds: float


class Plan:
    """What one process of a run holds, sends and computes: `str(plan)` is a table, a notebook shows a picture as well.

    `peak` is the fullest moment of two steps, `start` that of everything before them, and `host` that of the host's
    memory where `lm.fsdp(offload=True)` keeps something there; each has `nbytes`, its
    `parts` by category, its `moment`, and the `blocks` held, the largest first. `traffic` lists the collectives of a
    step, `flops` are its floating point operations, `seconds` its shortest and longest time, and `suggestions` say what
    to change where it does not fit.
    """

    def __init__(self, seen: Seen, device: Device) -> None:
        self.seen = seen
        self.device = device
        memory = seen.watch.memory
        self.peak: Peak = memory.peak("first step", "step")
        self.host: Peak = memory.peak(host=True)
        self.start: Peak = memory.peak("make", "init")
        work = [each for each in seen.watch.work if each.stage == "step"]
        self.flops = sum(each.flops for each in work)
        self.compute = compute_seconds(work, device)
        self._ideal = sum(each.flops / device.peak(each.dtype) for each in work if each.flops)
        self.traffic = self._traffic()

    # ---------------------------------------------------------------------------------------- numbers

    @property
    def fits(self) -> bool:
        """Whether the device holds all of it."""
        return max(self.peak.nbytes, self.start.nbytes) <= self.device.memory

    @property
    def communication(self) -> float:
        """Seconds that the collectives of a step take, one after the other."""
        return sum(each.seconds for each in self.traffic)

    @property
    def seconds(self) -> tuple[float, float]:
        """A step's time where communication hides behind computation as far as it can, and where none of it does."""
        return max(self.compute, self.communication), self.compute + self.communication

    @property
    def mfu(self) -> tuple[float, float]:
        """The share of the device's peak that the longest and the shortest step reach; recomputation counts."""
        best, worst = self.seconds
        return (self._ideal / worst, self._ideal / best) if best else (0.0, 0.0)

    @functools.cached_property
    def suggestions(self) -> list[str]:
        """What to change where it does not fit."""
        seen = self.seen
        return suggestions(seen.step, seen.sizes, seen.world_size, self.peak, self.start, self.device.memory)

    def _traffic(self) -> list[Traffic]:
        found: dict[tuple[str, tuple[int, ...]], list[Sent]] = {}
        for each in self.seen.watch.sent:
            if each.stage == "step":
                found.setdefault((each.kind, each.ranks), []).append(each)
        listed = [
            Traffic(
                kind,
                axes_of(ranks, self.seen.sizes) if self.seen.sizes else f"{len(ranks)} processes",
                len(sent),
                sum(each.nbytes for each in sent),
                round(sum(map(ring_bytes, sent))),
                sum(ring_seconds(each, self.device) for each in sent),
            )
            for (kind, ranks), sent in found.items()
        ]
        return sorted(listed, key=lambda each: -each.seconds)

    @property
    def assumptions(self) -> list[str]:
        """What these numbers rest on."""
        device, seen = self.device, self.seen
        found = [
            "memory is that of tensors: not a kernel's own, nor what an allocator keeps, nor the CUDA context",
            f"compute is a roofline at {device.efficiency:.0%} of {device.name}'s peak and bandwidth, eager, without"
            " the time to launch kernels",
            f"collectives are rings, all-reduces trees where that is faster; {device.per_node} devices to a node,"
            f" {_rate(device.inside)} inside it and {_rate(device.between)} for each device between nodes",
            "the shorter time hides communication behind computation wholly, the longer not at all",
            "every process has as many rows as this one, and the data is there when it is needed",
        ]
        if seen.compiled:
            found.append("lm.compile was left out: compiled steps hold less and run faster")
        if seen.watch.reads:
            found.append(
                f"the run reads {len(seen.watch.reads)} numbers from tensors (first at {_short(seen.watch.reads[0])});"
                " here they are zero"
            )
        return found

    # ---------------------------------------------------------------------------------------- words

    def __str__(self) -> str:
        return "\n".join(line.rstrip() for line in self._lines())

    __repr__ = __str__

    def _lines(self) -> Iterator[str]:
        seen = self.seen
        axes = ", ".join(f"{name}={size}" for name, size in seen.sizes.items() if size > 1)
        yield f"{seen.step!r}"
        yield f"rank {seen.rank} of {seen.world_size}{f' ({axes})' if axes else ''} on {self.device.name}"
        yield ""
        yield from self._memory_lines()
        yield ""
        yield from self._traffic_lines()
        yield ""
        yield from self._time_lines()
        for each in self.suggestions:
            yield f"  try: {each}"
        yield ""
        yield "assumed"
        for each in self.assumptions:
            yield f"  - {each}"

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
        totals = [sum(point[1].values()) for point in picture.sampled(self._timeline, _CELLS)]
        if self.host.nbytes:
            held = ", ".join(f"{name} {human_bytes(n)}" for name, n in self.host.parts.items() if n)
            yield f"  {'on the host':16} {human_bytes(self.host.nbytes):>10}  ({held})"
        yield f"  over a step      {picture.sparkline(totals)}"
        yield "  largest at the peak"
        for block in peak.blocks[:_SHOWN]:
            shape = f"{str(block.dtype).removeprefix('torch.')} {list(block.shape)}"
            made = block.name or f"{block.operation.partition('::')[2]} in {block.made.module or block.made.phase}"
            yield f"    {human_bytes(block.nbytes):>10}  {block.purpose():16} {shape}  {printable(made)}"

    def _traffic_lines(self) -> Iterator[str]:
        if not self.traffic:
            yield "communication of a step: none"
            return
        yield "communication of a step"
        yield f"  {'':14} {'over':12} {'times':>5} {'carries':>10} {'sends':>10} {'takes':>9}"
        for each in self.traffic:
            yield (
                f"  {each.kind:14} {each.axes:12} {each.times:>5} {human_bytes(each.carried):>10}"
                f" {human_bytes(each.sent):>10} {_time(each.seconds):>9}"
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
        return self.seen.watch.memory.timeline("step")

    @property
    def _title(self) -> str:
        return f"{self.seen.step!r}, rank {self.seen.rank} of {self.seen.world_size}"

    def svg(self) -> str:
        """Memory over a step, stacked by category, as an SVG element."""
        return picture.svg(self._timeline, self.device.memory, self._title)

    def figure(self) -> Any:
        """The same as a `matplotlib.figure.Figure`; matplotlib must be installed."""
        return picture.figure(self._timeline, self.device.memory, self._title)

    def _repr_html_(self) -> str:
        return f'<div>{self.svg()}<pre style="line-height:1.2">{html.escape(str(self))}</pre></div>'

    def to_html(self) -> str:
        """A page with the picture and the table."""
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self._title)}</title>'
            f'<body style="max-width:60rem;margin:2rem auto">{self._repr_html_()}</body></html>\n'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page (`.html`) or the picture (`.svg`, `.png`), by the name of `path`."""
        target = Path(path)
        if target.suffix == ".png":
            self.figure().savefig(target, dpi=150)
        elif target.suffix in (".html", ".svg"):
            target.write_text(self.to_html() if target.suffix == ".html" else self.svg(), encoding="utf-8")
        else:
            raise HyperparameterError(f"a plan is written as .html, .svg or .png, not as {target.name!r}.")

    @property
    def numbers(self) -> Mapping[str, Any]:
        """Everything in the table, for a program."""
        return {
            "world": self.seen.world_size,
            "rank": self.seen.rank,
            "mesh": dict(self.seen.sizes),
            "device": self.device.name,
            "peak": self.peak.nbytes,
            "parts": dict(self.peak.parts),
            "start": self.start.nbytes,
            "host": self.host.nbytes,
            "fits": self.fits,
            "traffic": [each._asdict() for each in self.traffic],
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
    step = "in the first one, " if moment.stage == "first step" else ""
    return f"{step}{moment.phase or 'around it'}{f' at {printable(moment.module)}' if moment.module else ''}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _rate(rate: float) -> str:
    return f"{rate / 1e9:g} GB/s"


def _short(place: str) -> str:
    return "/".join(Path(place).parts[-2:])
