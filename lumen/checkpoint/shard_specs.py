"""States that a step's transforms spread over processes: which leaf of this process is which part of what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lumen.core import rules
from lumen.core.sharding import ShardSpec, Spread
from lumen.core.step import StepFn, Transform, as_step, without_slot
from lumen.errors import CheckpointError


def shard_specs(step: StepFn | None, state: Any) -> Mapping[int, ShardSpec]:
    """Of the leaves of `state`, by place, those that are parts."""
    return {} if step is None else as_step(step).shard_specs(state)


def by_place(cut: Mapping[int, ShardSpec], kinds: Sequence[str]) -> dict[int, ShardSpec]:
    """The same, by place among leaves of these `kinds`: in a checkpoint, None and empty containers are leaves too."""
    places = [place for place, kind in enumerate(kinds) if kind not in ("none", "empty")] if cut else []
    return {places[leaf]: piece for leaf, piece in cut.items()}


def strip_sharding(step: StepFn | None, state: Any) -> Any:
    """`state` as it would be without what says how it is spread: a checkpoint does not depend on it."""
    if step is None:
        return state
    for transform in as_step(step).transforms:
        if transform.shards and transform.name in getattr(state, "slots", ()):
            state = _export(step, transform, state) if transform.opaque_state else without_slot(state, transform.name)
    for name in _spread_slots(state):
        state = without_slot(state, name)
    return state


def is_spread(state: Any) -> bool:
    """Whether this process holds a part of the state only."""
    return bool(_spread_slots(state))


def _spread_slots(state: Any) -> list[str]:
    slots = getattr(state, "slots", None) or {}
    return [name for name, slot in slots.items() if isinstance(slot, Spread)]


def export_opaque(step: StepFn | None, state: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The state to read into where another library holds it, and what gives it back to that library."""
    opaque = [] if step is None else [t for t in as_step(step).transforms if t.opaque_state]
    if step is None or not opaque or opaque[0].name not in getattr(state, "slots", ()):
        return state, lambda values: values
    transform = opaque[0]

    def hand_back(values: Any) -> Any:
        with rules.running(as_step(step)):
            return transform.init(values)

    return _export(step, transform, state), hand_back


def _export(step: StepFn, transform: Transform, state: Any) -> Any:
    with rules.running(as_step(step)):
        return transform.export(state)


def check(step: StepFn | None, state: Any, write: str) -> None:
    """Raise `CheckpointError` where `state` is this process's part of one, and there is no step to say of which."""
    found = _spread_slots(state)
    if found and step is None:
        raise CheckpointError(
            f"this process has a part of the state under lm.{found[0]}. Write {write} on every process, or give"
            " step.export(state), the whole state."
        )
