"""Donation: the memory of a state handed over to its successor, and the old state made unusable."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, distributed
from lumen.core.primitives import UpdateCall
from lumen.core.rules import Next, Rule
from lumen.errors import DonatedError, printable

Addresses = list[set[int]]
_CACHE = "_addresses"


_OVERWRITTEN = ("params", "opt_state")  # by an update in place
_CHANGING = ("replace", "apply_gradients")  # methods whose result would have what was overwritten
_ORIGIN = "_origin"


class Retired:
    """What becomes of a state object whose memory was handed over: every use of it raises `DonatedError`.

    Until its step has returned it still has the fields that were not overwritten, and the methods that read them.
    """

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            return object.__getattribute__(self, name)
        kept = object.__getattribute__(self, "__dict__")
        if name in kept:
            return kept[name]
        origin = kept.get(_ORIGIN)
        if origin is None or name in origin._fields_ or name in _CHANGING or not hasattr(origin, name):
            raise _refusal(name)
        attribute = inspect.getattr_static(origin, name)
        return attribute.__get__(self, origin) if hasattr(attribute, "__get__") else attribute

    def __repr__(self) -> str:
        return "<a donated state: its memory belongs to its successor>"


def _refusal(name: str) -> DonatedError:
    return DonatedError(
        f"state.{name} was read after the state had been donated: its tensors now hold its successor's values."
        " Use the returned state, state, metrics = step(state, batch), and inside a step read what you need before"
        " state.apply_gradients. To keep an old state, copy it first: kept = lm.tree.map(torch.clone, state)."
    )


def retire(state: Any) -> None:
    """Make every further use of this state object raise `DonatedError`, and let go of its tensors."""
    if is_retired(state):
        object.__getattribute__(state, "__dict__").clear()
    elif hasattr(type(state), "_fields_"):
        state.__dict__.clear()
        object.__setattr__(state, "__class__", Retired)


def retire_updated(state: Any) -> None:
    """Make every further use of what an update in place has overwritten raise `DonatedError`, and let go of it."""
    fields, origin = state.__dict__, type(state)
    for name in (*_OVERWRITTEN, _CACHE):
        fields.pop(name, None)
    fields[_ORIGIN] = origin
    object.__setattr__(state, "__class__", Retired)


def is_retired(state: Any) -> bool:
    """Whether this state object was handed over."""
    return type(state) is Retired


def storage_of(tensor: Tensor) -> int:
    """Identifies the memory that a tensor is in, or a part of."""
    address: int = _torch_compat.storage_id(tensor.untyped_storage())
    return address


def copy_into(old: list[Tensor], new: list[Tensor]) -> None:
    """Copy new leaves into the memory of the old; for transforms that compute out of place."""
    for target, source in zip(old, new, strict=True):
        if target is not source:
            target.copy_(source)


def check_successor(state: Any) -> Addresses:
    """Like `check_unaliased`, looking only at those fields that have changed since the state was last checked.

    The addresses are cached on the state object; an entry is valid for one value of its field.
    """
    fields = state.__dict__
    cache: dict[str, tuple[Any, set[int]]] | None = fields.get(_CACHE)
    if cache is None:
        check_unaliased(state)
        cache = fields[_CACHE] = {name: (fields[name], set(_pointers(fields[name]))) for name in _tree_fields(state)}
    for name, (value, _) in cache.items():
        if value is not fields[name]:
            pointers = _pointers(fields[name])
            changed = set(pointers)
            shared = [
                other for other, (_, addresses) in cache.items() if other != name and not changed.isdisjoint(addresses)
            ]
            if shared or len(changed) != len(pointers):
                check_unaliased(state)
            # The predecessor, which had this table too, is retired: it can be changed in place.
            cache[name] = (fields[name], changed)
    return [addresses for _, addresses in cache.values()]


def _tree_fields(state: Any) -> list[str]:
    return [name for name in type(state)._fields_ if tree.tensors(state.__dict__[name])]


def _pointers(values: Any) -> list[int]:
    tensors = [values] if isinstance(values, Tensor) else tree.tensors(values)
    if distributed.is_dry_run():  # tensors that lie nowhere, but are views of each other as real ones are
        return [hash((_torch_compat.storage_id(t.untyped_storage()), t.storage_offset())) for t in tensors if t.numel()]
    return [t.data_ptr() for t in tensors if t.numel()]


def check_unaliased(state: Any) -> Addresses:
    """Raise `DonatedError`, naming both, where two leaves of `state` share memory; return all their addresses."""
    pointers = _pointers(state)
    distinct = set(pointers)
    if len(distinct) == len(pointers):
        return [distinct]
    owner: dict[int, str] = {}
    for path, tensor in tree.named_tensors(state):
        if tensor.numel() == 0:
            continue
        (pointer,) = _pointers(tensor)
        first = owner.setdefault(pointer, path)
        if first != path:
            both = f"state.{printable(path)} and state.{printable(first)}"
            raise DonatedError(
                f"{both} are the same memory, so an update in place of one would change the"
                f" other. Copy it where the step sets it: {{name: p.clone() for name, p in params.items()}}"
            )
    return [distinct]


def release(metrics: Any, addresses: Addresses) -> Any:
    """`metrics` with a copy of each tensor in the state's own memory, which the next step overwrites."""
    pointers = set(_pointers(metrics))
    if True not in [not pointers.isdisjoint(field) for field in addresses]:
        return metrics
    shared = pointers & set().union(*addresses)
    return tree.map(
        lambda x: x.clone() if isinstance(x, Tensor) and not shared.isdisjoint(_pointers(x)) else x, metrics
    )


def check_unmoved(old: list[Tensor], new: list[Tensor], paths: list[str]) -> None:
    """Raise `DonatedError` where an old leaf turns up in another place of the new state.

    Copying back in place would then overwrite a value that is still to be read.
    """
    positions = {id(t): i for i, t in enumerate(old)}
    for i, tensor in enumerate(new):
        j = positions.get(id(tensor), i)
        if j != i:
            raise DonatedError(
                f"the step returned the old state.{paths[j]} as the new state.{paths[i]}; with a donated state that"
                f" memory is about to be overwritten. Copy it in the step: x.clone()"
            )


def noting_donated(donated: set[int]) -> Rule:
    """A rule that notes the memory of donated updates; a state with several optimizers has several."""

    def rule(next: Next, call: UpdateCall) -> Any:
        if call.donate:
            donated.update(map(storage_of, tree.tensors((call.params, call.opt_state))))
        return next(call)

    return rule
