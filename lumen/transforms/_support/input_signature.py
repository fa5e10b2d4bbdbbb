"""Signatures of a step's inputs: a compiled graph is reused for inputs that have the same one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core.pytree_dataclass import SIGNATURE

# The signature of a state, that of a batch, and the Python values that the step reads.
GraphKey = tuple["StateSignature", Any, tuple[Any, ...]]


class StateSignature:
    """The structure, shapes and dtypes of a state, hashed once.

    `size` is the number of tensors, or -1 if the state has leaves of other types. A state that a compiled step returns
    carries its signature, so the next call does not compute it again.
    """

    __slots__ = ("_hash", "_value", "size")

    def __init__(self, leaves: list[Any], spec: tree.Spec) -> None:
        self._value = (spec, _leaf_kinds(leaves))
        self._hash = hash(self._value)
        self.size = len(leaves) if all(isinstance(leaf, Tensor) for leaf in leaves) else -1

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, StateSignature) and self._value == other._value)

    def same_structure(self, other: StateSignature) -> bool:
        """Whether both states have the same structure and the same static fields."""
        return bool(self._value[0] == other._value[0])


def sign_state(state: Any) -> tuple[list[Any], StateSignature]:
    """The leaves of a state and its signature."""
    if hasattr(type(state), "_fields_"):
        signature: StateSignature | None = state.__dict__.get(SIGNATURE)
        if signature is not None:
            leaves = tree.tensors(state)
            if len(leaves) == signature.size:
                return leaves, signature
    leaves, spec = tree.flatten(state)
    return leaves, StateSignature(leaves, spec)


def sign_batch(batch: Any) -> tuple[list[Any], Any]:
    """The leaves of a batch and its signature, a hashable value."""
    if type(batch) is dict and all(type(leaf) is Tensor for leaf in batch.values()):
        leaves: list[Any] = [*batch.values()]
        structure: Any = tuple(batch)
    else:
        leaves, structure = tree.flatten(batch)
    return leaves, (structure, _leaf_kinds(leaves))


def describe_changes(before: GraphKey, now: GraphKey) -> str:
    """What differs from the key of the previous compilation, and how to avoid that."""
    (state, batch, reads), (new_state, new_batch, new_reads) = before, now
    differences = []
    if not state.same_structure(new_state):
        differences.append("a state with a different structure, optimizer or model (create those once)")
    elif state != new_state:
        differences.append("different shapes or dtypes in the state")
    if batch != new_batch:
        differences.append(
            "a batch with a different structure, shape or dtype (use few: lm.Loader pads the last batch with pad=True)"
        )
    if reads != new_reads:
        differences.append("a different Python value that the step reads (make values that change tensors)")
    return " and ".join(differences)


def _leaf_kinds(leaves: list[Any]) -> tuple[Any, ...]:
    try:
        return tuple([(t.shape, t.dtype, t.stride(), t.device) if isinstance(t, Tensor) else t for t in leaves])
    except RuntimeError:  # compressed sparse tensors have no strides
        return tuple([(t.shape, t.dtype, t.layout, t.device) if isinstance(t, Tensor) else t for t in leaves])
