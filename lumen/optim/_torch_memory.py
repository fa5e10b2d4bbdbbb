"""What optimizers of other libraries keep beside their params: in their state, in param groups and in attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.optim._stored_values import can_store, is_number, is_value, layout

Memory = dict[str, Any]

TRIALS = 3  # steps of an optimizer that are watched for what it counts in its param groups


def changes(before: Memory, after: Memory, known: Memory) -> Memory:
    """The options of a param group that a step has added or changed, and those that are `known` to, as they are now.

    A number that was once a float stays one.
    """
    changed = {
        key: value for key, value in after.items() if key in known or key not in before or not _same(before[key], value)
    }
    return {key: float(value) if isinstance(known.get(key), float) else value for key, value in changed.items()}


def not_carried(
    optimizer: torch.optim.Optimizer,
    numbers: Memory,
    count: int,
    changed: Sequence[Memory],
    layouts: Sequence[Memory],
) -> str:
    """What an optimizer keeps that a state cannot carry; empty if there is nothing.

    It has `count` params and had these `numbers` as attributes before the steps that were watched. `layouts` has the
    layout of each entry of its state after each of them, by name.
    """
    others = [name for name, value in attributes(optimizer).items() if name not in numbers or numbers[name] != value]
    if others:
        return f"counts in its attribute {others[0]!r}"
    if len(optimizer.state) > count:
        return "keeps state that belongs to no param"
    first, last = layouts[0], layouts[-1]
    if first.keys() != last.keys():
        return f"has no {min(last.keys() ^ first.keys())!r} in its state after its first step"
    unlike = [key for key in first if first[key] != last[key]]
    if unlike:
        return f"keeps {unlike[0]!r} in its state with another structure at each step"
    if any("lr" in group for group in changed):
        return "changes its learning rate by itself"
    unknown = {key: value for group in changed for key, value in group.items() if not is_value(value)}
    if unknown:
        return f"keeps in its param_groups what is neither a tensor nor a number: {_kinds(unknown)}"
    unknown = {k: v for memory in optimizer.state.values() for k, v in memory.items() if not can_store(v)}
    return f"keeps in its state what is not made of tensors and numbers: {_kinds(unknown)}" if unknown else ""


def _kinds(values: Memory) -> str:
    return ", ".join(f"{key!r} of type {type(value).__name__}" for key, value in values.items())


def layouts_of(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Memory:
    """The layout of each entry of the state, by name, for all params that have one."""
    memories = [optimizer.state[param] for param in params]
    keys = dict.fromkeys(key for memory in memories for key in memory)
    return {key: [layout(memory[key]) for memory in memories if key in memory] for key in keys}


def attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The numbers among the attributes of an optimizer, besides those of torch, which are its flags."""
    return {name: value for name, value in vars(optimizer).items() if is_number(value) and type(value) is not bool}


def own_rule(name: str) -> str:
    """The rule of `lm.optim` that is most like the optimizer of this name."""
    plain = name.lower().replace("_", "")
    known = ("adafactor", "adagrad", "schedulefree", "radam", "nadam", "rmsprop", "lion", "lamb", "muon", "sgd")
    rule = next((rule for rule in known if rule in plain), "adamw")
    return "schedule_free" if rule == "schedulefree" else rule


def unshared(memories: list[Memory]) -> list[Memory]:
    """The same with a copy of each tensor that another leaf has too, so that no two leaves of a state share memory."""
    known: set[int] = set()

    def unshare(leaf: Tensor) -> Tensor:
        leaf = leaf.clone() if id(leaf) in known else leaf
        known.add(id(leaf))
        return leaf

    return [tree.map(unshare, memory) for memory in memories]


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a param group; of tensors copies, as they may change in place."""
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
