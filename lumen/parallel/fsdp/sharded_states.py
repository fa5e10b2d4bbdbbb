"""Which of a step's trees are sharded: the params and the optimizer state of each training state that it was given.

A step may train several models, each in a training state of its own, and may keep further params or optimizer states
that nobody declared, which are full on every rank. Trees are recognized by their first tensor, which only the state of
the step and its updates have, and others by their shapes, wherever these decide alike on every rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.module import Apply
from lumen.core.param_leaves import names_in_optimizer_state
from lumen.errors import ParamsError
from lumen.parallel.fsdp.frozen_params import FrozenParams
from lumen.parallel.fsdp.shard import Shapes, ShardedParamGatherer, ShardLayout
from lumen.parallel.fsdp.unit_plan import UnitPlans
from lumen.parallel.lazy_param import LazyParam


class _ByTensor:
    """Values for trees, by the tree's first tensor."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def add(self, values: Any, value: Any) -> None:
        first = tree.first_tensor(values)
        if first is not None:
            self._values[id(first)] = weakref.ref(first), value

    def get(self, values: Any) -> Any:
        first = tree.first_tensor(values)
        reference, value = self._values.get(id(first), (None, None))
        return value if reference is not None and reference() is first else None


class ShardedStates:
    """The training states of one call of a step, and how each one's params are sharded."""

    def __init__(
        self, layout: ShardLayout, states: Sequence[tuple[Any, UnitPlans]], frozen: FrozenParams | None = None
    ) -> None:
        self.layout, self.frozen = layout, frozen
        self._plans: list[UnitPlans] = []  # those that differ
        self._by_model: dict[Apply, UnitPlans] = {}
        self._params, self._opt_states = _ByTensor(), _ByTensor()
        for state, plans in states:
            if all((plans.shapes, plans.frozen) != (known.shapes, known.frozen) for known in self._plans):
                self._plans.append(plans)
            self._opt_states.add(state.opt_state, True)
            if len(states) > 1:
                self._by_model[state.apply_fn.origin] = plans
                self._params.add(state.params, plans)
        self.gatherer = ShardedParamGatherer(layout, self._plans[0].shapes)

    def of_model(self, apply: Apply, params: Mapping[str, Any]) -> UnitPlans | None:
        """The plans of the params that a model is applied to; None for a model that is not in the step's states."""
        plans = self._by_model.get(getattr(apply, "origin", apply))
        if plans is None or params.keys() != plans.shapes.keys():
            plans = self.of_params(params)
        return plans

    def of_params(self, params: Any) -> UnitPlans | None:
        """The plans of these params; None for a tree that is not sharded.

        Raises `ParamsError`, on every rank, for params that could be those of two models.
        """
        if not isinstance(params, Mapping):
            return None
        if len(self._plans) == 1:
            return self._plans[0] if self._plans[0].shapes.keys() == params.keys() else None
        candidates = [plans for plans in self._plans if plans.shapes.keys() == params.keys()]
        if not candidates:
            return None
        known = self._params.get(_shards_in(params))
        if known is not None and known.shapes.keys() == params.keys():
            return known  # type: ignore[no-any-return]
        fitting = [plans for plans in candidates if self._fits(params, plans.shapes)]
        if fitting and any(self._alike(fitting[0].shapes, other.shapes) for other in candidates if other != fitting[0]):
            raise ParamsError(
                "these params are neither those of the step's state nor of one of its updates, and two of its models"
                " have params of these names and shapes. Give lm.value_and_grad the params of a state, or write"
                " lm.fsdp(stage=2)."
            )
        return fitting[0] if fitting else None

    def updated(self, before: UnitPlans | None, params: Any, opt_state: Any, sharded: bool) -> None:
        """Note the trees that an update has returned."""
        if before is not None and len(self._plans) > 1:
            self._params.add(params, before)
        if sharded:
            self._opt_states.add(opt_state, True)

    def has_shards(self, opt_state: Any, shapes: Shapes) -> bool:
        """Whether an optimizer's state for params of these full shapes is sharded."""
        if self._opt_states.get(opt_state):
            return True
        leaves = tree.leaves(opt_state)
        for leaf, name in zip(leaves, names_in_optimizer_state(opt_state, shapes), strict=True):
            if name is not None and name in shapes and isinstance(leaf, Tensor) and shapes[name][:1] > (1,):
                # Of two rows and more no rank has all.
                if leaf.shape == shapes[name]:
                    return False
                if leaf.shape == self.layout.shape(shapes[name]):
                    return True
        return True

    def _fits(self, params: Mapping[str, Any], shapes: Shapes) -> bool:
        return all(p.shape in (shapes[name], self.layout.shape(shapes[name])) for name, p in params.items())

    def _alike(self, one: Shapes, other: Shapes) -> bool:
        """Whether params of these full shapes, or shards of them, look alike on some rank."""
        ranks = range(self.layout.size)
        return any(all(self._forms(one[name], rank) & self._forms(other[name], rank) for name in one) for rank in ranks)

    def _forms(self, full: torch.Size, rank: int) -> set[tuple[int, ...]]:
        if not full:
            return {()}
        start, stop = self.layout.rows(full, rank)
        return {(*full,), (stop - start, *full[1:])}


def _shards_in(params: Mapping[str, Any]) -> Any:
    first = next(iter(params.values()), None)
    return first.shard if isinstance(first, LazyParam) else first
