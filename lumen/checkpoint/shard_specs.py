"""States that a step's transforms shard over processes: the `ShardSpec` of each leaf, and states without sharding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lumen.core import rules
from lumen.core.nested_states import all_slots, map_train_states
from lumen.core.sharding import ShardingSlot, ShardSpec
from lumen.core.step import StepFn, Transform, as_step, without_slot
from lumen.errors import CheckpointError


def leaf_specs(step: StepFn | None, state: Any) -> Mapping[int, ShardSpec]:
    """The specs of the sharded leaves of `state`, by index among `lumen.tree.leaves`."""
    return {} if step is None else as_step(step).shard_specs(state)


def by_leaf_index(specs: Mapping[int, ShardSpec], kinds: Sequence[str]) -> dict[int, ShardSpec]:
    """The specs by index among leaves of these `kinds`, which include None and empty containers."""
    indices = [index for index, kind in enumerate(kinds) if kind not in ("none", "empty")] if specs else []
    return {indices[leaf]: spec for leaf, spec in specs.items()}


def strip_sharding(step: StepFn | None, state: Any) -> Any:
    """`state` without the slots that describe its sharding, so that a checkpoint does not depend on it."""
    if step is None:
        return state
    for transform in as_step(step).transforms:
        if transform.shards and transform.name in getattr(state, "slots", ()):
            state = _export(step, transform, state) if transform.opaque_state else without_slot(state, transform.name)
    return without_sharding_slots(state)


def without_sharding_slots(state: Any) -> Any:
    """`state` without the slots that say how it is sharded: the rank's own shards, as they are."""
    return map_train_states(_without_sharding, _without_sharding((), state))


def _without_sharding(_path: Any, state: Any) -> Any:
    for name, slot in (getattr(state, "slots", None) or {}).items():
        if isinstance(slot, ShardingSlot):
            state = without_slot(state, name)
    return state


def is_sharded(state: Any) -> bool:
    """Whether this process holds only a shard of the state."""
    return bool(_sharding_slots(state))


def _sharding_slots(state: Any) -> list[str]:
    return [name for name, slot in all_slots(state) if isinstance(slot, ShardingSlot)]


def export_opaque(step: StepFn | None, state: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A state to restore into if another library holds it, and the function that hands the result to that library."""
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
    """Raise `CheckpointError` if `state` is sharded and there is no step that describes how; `write` is the advice."""
    sharding_slots = _sharding_slots(state)
    if sharding_slots and step is None:
        raise CheckpointError(
            f"this process has only a shard of the state under lm.{sharding_slots[0]}. Write {write} on every process,"
            " or pass step.export(state), the full state."
        )
