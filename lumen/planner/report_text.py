"""The text of a plan: the table, and the assumptions behind its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumen.core.inspect import human_bytes
from lumen.errors import printable
from lumen.planner import render as picture
from lumen.planner.dry_run import RunTrace
from lumen.planner.memory import Peak
from lumen.planner.roofline import Device

if TYPE_CHECKING:
    from lumen.planner.report import Plan

_LARGEST_TENSORS = 6  # in the report
_SPARKLINE_WIDTH = 60


def assumptions(trace: RunTrace, device: Device) -> list[str]:
    """The assumptions behind the numbers."""
    lines = [
        "memory is that of tensors: without kernel workspaces, the allocator's cache and the CUDA context",
        f"compute is a roofline at {device.efficiency:.0%} of {device.name}'s peak and bandwidth, eager, without"
        " kernel launch time",
        f"collectives are rings, and all-reduces trees if faster; {device.per_node} devices per node,"
        f" {_rate(device.inside)} within it and {_rate(device.between)} per device between nodes",
        "the shorter time overlaps all communication with computation, the longer none",
        "every process has as many rows as this one, and never waits for data",
    ]
    size = trace.sizes.get("pipeline", 1)
    lines += [_idle(t, size) for t in trace.step.transforms if t.level == "pipeline" and size > 1]
    if trace.compiled:
        lines.append("lm.compile was left out: compiled steps use less memory and run faster")
    reads = trace.tracker.reads
    if reads:
        first = _short(reads[0])
        lines.append(f"the run reads {len(reads)} numbers from tensors (first at {first}), which are zero in a plan")
    return lines


def _idle(pipeline: Any, size: int) -> str:
    """How long a process of a pipeline waits for others, which a plan of one process does not see."""
    stages = pipeline.stages
    count = size if stages is None else stages if isinstance(stages, int) else len(stages) + 1
    share = (size - 1) / pipeline.microbatches * size / count
    return (
        f"under lm.pipeline this process also waits for other stages, at least {share:.0%} of its compute, which is not"
        " counted; other ranks have other stages: plan each with rank="
    )


def report_lines(plan: Plan) -> Iterator[str]:
    """The lines of the table."""
    trace = plan.trace
    axes = ", ".join(f"{name}={size}" for name, size in trace.sizes.items() if size > 1)
    yield f"{trace.step!r}"
    yield f"rank {trace.rank} of {trace.world_size}{f' ({axes})' if axes else ''} on {plan.device.name}"
    yield ""
    yield from _memory_lines(plan)
    yield ""
    yield from _traffic_lines(plan)
    yield ""
    yield from _time_lines(plan)
    for suggestion in plan.suggestions:
        yield f"  try: {suggestion}"
    yield ""
    yield "assumptions"
    for assumption in plan.assumptions:
        yield f"  - {assumption}"


def _memory_lines(plan: Plan) -> Iterator[str]:
    peak = plan.peak
    yield f"memory at the peak of a step ({_where(peak)})"
    for name, nbytes in peak.by_category.items():
        if nbytes:
            share = nbytes / peak.nbytes
            yield f"  {name:16} {human_bytes(nbytes):>10}  {share:>4.0%}  {picture.bar(share)}"
    verdict = "fits" if peak.nbytes <= plan.device.memory else "does NOT fit"
    limit = f"{human_bytes(plan.device.memory)} ({peak.nbytes / plan.device.memory:.0%})"
    yield f"  {'peak':16} {human_bytes(peak.nbytes):>10}  of {limit}: {verdict}"
    verdict = "" if plan.start.nbytes <= plan.device.memory else ": does NOT fit"
    yield f"  {'before step 1':16} {human_bytes(plan.start.nbytes):>10}  ({plan.start.moment.stage}){verdict}"
    totals = [sum(point[1].values()) for point in picture.sampled(plan.timeline, _SPARKLINE_WIDTH)]
    if plan.host.nbytes:
        categories = ", ".join(f"{name} {human_bytes(n)}" for name, n in plan.host.by_category.items() if n)
        yield f"  {'on the host':16} {human_bytes(plan.host.nbytes):>10}  ({categories})"
    yield f"  over a step      {picture.sparkline(totals)}"
    yield "  largest at the peak"
    for block in peak.blocks[:_LARGEST_TENSORS]:
        shape = f"{str(block.dtype).removeprefix('torch.')} {list(block.shape)}"
        created = block.created.module or block.created.phase
        origin = block.name or f"{block.operation.partition('::')[2]} in {created}"
        yield f"    {human_bytes(block.nbytes):>10}  {block.purpose():16} {shape}  {printable(origin)}"


def _traffic_lines(plan: Plan) -> Iterator[str]:
    if not plan.traffic:
        yield "communication of a step: none"
        return
    yield "communication of a step"
    yield f"  {'':14} {'over':12} {'times':>5} {'carries':>10} {'sends':>10} {'takes':>9}"
    for traffic in plan.traffic:
        yield (
            f"  {traffic.kind:14} {traffic.axes:12} {traffic.times:>5} {human_bytes(traffic.carried):>10}"
            f" {human_bytes(traffic.sent):>10} {_time(traffic.seconds):>9}"
        )


def _time_lines(plan: Plan) -> Iterator[str]:
    best, worst = plan.seconds
    low, high = plan.mfu
    yield "time of a step"
    yield f"  compute        {_time(plan.compute):>9}  ({plan.flops / 1e12:.3g} TFLOP)"
    yield f"  communication  {_time(plan.communication):>9}"
    yield f"  together       {_time(best)} – {_time(worst)}, MFU {high:.0%} – {low:.0%}"


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
