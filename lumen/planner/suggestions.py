"""What to change where a run does not fit on its devices."""

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
    """What would help, the most likely first; nothing where all fits."""
    if max(peak.nbytes, start.nbytes) <= limit:
        return []
    if peak.nbytes <= limit:
        return [
            f"{human_bytes(start.nbytes)} are held while the state is made and spread, before the first step: every"
            " process makes the whole state. Make the module on the meta device, or start from a checkpoint."
        ]
    found = [*_spread(step, sizes, world_size, peak, limit), *_once(step, peak), *_rows(step, peak, limit)]
    return found or ["No transform helps much here: take a smaller model or batch, or devices with more memory."]


def _spread(step: Step, sizes: Mapping[str, int], world_size: int, peak: Peak, limit: float) -> Iterator[str]:
    """Cut the state finer."""
    over = peak.nbytes - limit
    level = next((getattr(t, "stage", 0) for t in step.transforms if t.level == "parallel"), None)
    if world_size < 2 or level == 3:
        shards = sizes.get("shard", 1)
        held = sum(peak.parts[name] for name in _STATE)
        if held > limit / 2:
            yield (
                f"params, optimizer state and gradients take {human_bytes(held)}: cut them over more processes,"
                f" shard={2 * max(shards, 1)} or more."
            )
        return
    saved, level = 0.0, level or 0
    shares = {1: "optimizer", 2: "gradients", 3: "params"}
    for higher in range(level + 1, 4):
        saved += peak.parts[shares[higher]] * (1 - 1 / world_size)
        if saved > over or higher == 3:
            yield f"lm.fsdp(stage={higher}) would hold about {human_bytes(saved)} less on each process."
            return


def _once(step: Step, peak: Peak) -> Iterator[str]:
    """Hold the state once."""
    if peak.moment.phase == "update" and not any(t.donates for t in step.transforms):
        held = (peak.parts["params"] + peak.parts["optimizer"]) / 2
        yield f"lm.donate() updates in place: about {human_bytes(held)} less while the old state and the new are held."


def _rows(step: Step, peak: Peak, limit: float) -> Iterator[str]:
    """Hold less of the forward pass."""
    made = peak.parts["activations"] + peak.parts["temporary"]
    if made < peak.nbytes / 3:
        return
    if not any(t.level == "remat" for t in step.transforms):
        yield f"activations take {human_bytes(made)}: lm.remat() computes them again in the backward pass."
    rest = peak.nbytes - made
    if rest < limit:
        parts = math.ceil(made / (limit - rest))
        yield f"lm.accumulate({parts}), or {parts} times what it is, makes the batch in smaller parts."
