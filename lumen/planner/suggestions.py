"""What to change if a run does not fit on its devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lumen.core.inspect import human_bytes
from lumen.core.step import Step
from lumen.planner.memory import Peak

_STATE = ("params", "optimizer", "gradients")


def suggestions(
    step: Step, sizes: Mapping[str, int], world_size: int, peak: Peak, start: Peak, limit: float
) -> list[str]:
    """What to change, the most likely first; empty if the run fits."""
    if max(peak.nbytes, start.nbytes) <= limit:
        return []
    if peak.nbytes <= limit:
        return [
            f"creating and sharding the state needs {human_bytes(start.nbytes)} before the first step, because every"
            " process creates the full state. Create the module on the meta device, or start from a checkpoint."
        ]
    lines = [
        *_shard_more(step, sizes, world_size, peak, limit),
        *_donate(step, peak),
        *_reduce_activations(step, peak, limit),
    ]
    return lines or ["No transform helps much here: use a smaller model or batch, or devices with more memory."]


def _shard_more(step: Step, sizes: Mapping[str, int], world_size: int, peak: Peak, limit: float) -> Iterator[str]:
    """Shard the state more."""
    over = peak.nbytes - limit
    level = next((getattr(t, "stage", 0) for t in step.transforms if t.level == "parallel"), None)
    if world_size < 2 or level == 3:
        shards = sizes.get("shard", 1)
        nbytes = sum(peak.by_category[name] for name in _STATE)
        if nbytes > limit / 2:
            yield (
                f"params, optimizer state and gradients take {human_bytes(nbytes)}: shard them over more processes,"
                f" shard={2 * max(shards, 1)} or more."
            )
        return
    saved, level = 0.0, level or 0
    shares = {1: "optimizer", 2: "gradients", 3: "params"}
    for higher in range(level + 1, 4):
        saved += peak.by_category[shares[higher]] * (1 - 1 / world_size)
        if saved > over or higher == 3:
            yield f"lm.fsdp(stage={higher}) would save about {human_bytes(saved)} on each process."
            return


def _donate(step: Step, peak: Peak) -> Iterator[str]:
    """Update the state in place."""
    if peak.moment.phase == "update" and not any(t.donates for t in step.transforms):
        nbytes = (peak.by_category["params"] + peak.by_category["optimizer"]) / 2
        yield f"lm.donate() updates in place, which saves about {human_bytes(nbytes)} for the copy of the state."


def _reduce_activations(step: Step, peak: Peak, limit: float) -> Iterator[str]:
    """Store fewer activations."""
    nbytes = peak.by_category["activations"] + peak.by_category["temporary"]
    if nbytes < peak.nbytes / 3:
        return
    if not any(t.level == "remat" for t in step.transforms):
        yield (
            f"activations take {human_bytes(nbytes)}: lm.remat() recomputes them in the backward pass, and"
            ' lm.remat(save="matmuls") all but products.'
        )
    fixed = peak.nbytes - nbytes
    if fixed < limit:
        factor = math.ceil(nbytes / (limit - fixed))
        yield f"lm.accumulate({factor}), or {factor} times the present number of microbatches, makes them smaller."
