"""The training states inside a state: those of the two players of a GAN, say, each with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree

from lumen import tree
from lumen.core.param_leaves import Path

_NEEDED = frozenset({"params", "opt_state", "slots", "tx", "apply_fn"})
_OWN = frozenset({"step", "params", "buffers", "opt_state", "seed", "slots"})  # no other state is inside these fields


def is_train_state(node: Any) -> bool:
    """Whether `node` has params, an optimizer with its state, and slots, as `lm.TrainState` has."""
    fields: frozenset[str] = getattr(type(node), "_fields_", frozenset())
    return fields >= _NEEDED


def train_states(state: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Each training state in `state` with its path, the outermost first; often the state itself and no other.

    >>> import lumen as lm, torch
    >>> @lm.dataclass
    ... class Game:
    ...     players: dict[str, lm.TrainState]
    >>> player = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    >>> [path for path, _ in train_states(Game({"first": player, "second": player}))]
    [('players', 'first'), ('players', 'second')]
    """
    if is_train_state(state):
        added = [name for name in type(state)._dynamic_fields_ if name not in _OWN]
        inner = [entry for name in added for entry in train_states(getattr(state, name), (*path, name))]
        return [(path, state), *inner]
    if optree.tree_is_leaf(state, namespace=tree.NAMESPACE):
        return []
    children, _, entries, _ = optree.tree_flatten_one_level(state, namespace=tree.NAMESPACE)
    below = [train_states(child, (*path, entry)) for entry, child in zip(entries, children, strict=True)]
    return [pair for pairs in below for pair in pairs]


def all_slots(state: Any) -> list[tuple[str, Any]]:
    """The slots of a state and of the training states in it, with their names."""
    slots = [inner.slots for _, inner in train_states(state)]
    if not is_train_state(state):
        slots.append(getattr(state, "slots", None) or {})
    return [item for by_name in slots for item in by_name.items()]


def map_train_states(change: Callable[[Path, Any], Any], state: Any, path: Path = ()) -> Any:
    """`state` with `change(path, inner)` in place of each training state in it, those inside another one first."""
    if is_train_state(state):
        added = {name: getattr(state, name) for name in type(state)._dynamic_fields_ if name not in _OWN}
        changed = {name: map_train_states(change, value, (*path, name)) for name, value in added.items()}
        changed = {name: value for name, value in changed.items() if value is not added[name]}
        return change(path, state.replace(**changed) if changed else state)
    if optree.tree_is_leaf(state, namespace=tree.NAMESPACE):
        return state
    children, metadata, entries, unflatten = optree.tree_flatten_one_level(state, namespace=tree.NAMESPACE)
    new = [map_train_states(change, child, (*path, entry)) for entry, child in zip(entries, children, strict=True)]
    if all(after is before for after, before in zip(new, children, strict=True)):
        return state
    return unflatten(metadata, new)
