"""Units of a compiled step: the same chain of all-gathers as in `unshard`, as nodes of one graph.

A graph has no memory to resize. There a unit's full params live from their all-gather to their last use, and uses in
the backward pass would keep them alive from the forward pass on. So saved tensors record which all-gathered param they
came from, and are rebuilt after the backward all-gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.parallel.fsdp.shard import AllGatherHandle, reduce_scatter
from lumen.parallel.fsdp.unshard import UnshardContext, UnshardedUnit


class TracedUnshardContext(UnshardContext):
    """The all-gathers of one gradient in a graph."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.saves_references = True
        self.reached: list[Tensor] = []  # the activations or gradients that the pass computed last
        self._owners: dict[int, tuple[TracedUnit, int, Tensor]] = {}  # of each full param, by its memory

    def launch(self, names: tuple[str, ...], shards: Sequence[Tensor]) -> UnshardedUnit:
        """Start the all-gather of the params `names`, of which this rank has `shards`."""
        return TracedUnit(self, names, shards)

    def tie(self, output: Any, unit: UnshardedUnit) -> Any:
        """The output of a unit, at which the pass has arrived."""
        leaves = _torch_compat.torch_pytree.tree_leaves(output)
        self.reached = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        return super().tie(output, unit)

    def record(self, unit: TracedUnit, params: Sequence[Tensor]) -> None:
        """Remember which unit these full params belong to."""
        for index, param in enumerate(params):
            self._owners[_memory(param)] = unit, index, param  # a reference, so that its memory is not used again

    def saving(self) -> AbstractContextManager[Any]:
        """Save references to full params in place of these."""
        if not self.saves_references:
            return super().saving()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _SavedView:
        owner = self._owners.get(_memory(tensor))
        if owner is None:
            return tensor
        return _SavedView(*owner[:2], tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def close(self) -> None:
        """Drop the graph."""
        super().close()
        self._owners.clear()
        self.reached = []


class TracedUnit(UnshardedUnit):
    """A unit whose params are new nodes after each all-gather."""

    context: TracedUnshardContext

    def __init__(self, context: TracedUnshardContext, names: tuple[str, ...], shards: Sequence[Tensor]) -> None:
        super().__init__(context, names, shards)
        self.params: list[Tensor] = []
        self._in_flight: AllGatherHandle | None = None
        self.launch()

    def launch(self) -> None:
        """Start the all-gather, not before the pass has come as far as it has now."""
        if self._in_flight is None:
            plans = self.context.plans
            shapes = [plans.full_shapes[name] for name in self.names]
            self._in_flight = AllGatherHandle(
                plans.layout, self.shards, shapes, plans.param_dtype, self.context.reached, self.trained
            )

    def fetch(self) -> list[Tensor]:
        """The full params, as new nodes."""
        self.launch()
        assert self._in_flight is not None
        self.params = self._in_flight.new_tensors()
        self._in_flight = None
        self.context.record(self, self.params)
        return list(self.params)

    def refetch(self, reached: Sequence[Tensor]) -> None:
        """Gather the params again, once the graph has `reached` these gradients."""
        self.context.reached = [grad.detach() for grad in reached]
        self.fetch()

    def recall(self) -> list[Tensor]:
        """The full params for a recomputation."""
        params = [param.detach() for param in self.params or self.fetch()]
        return [*map(Tensor.requires_grad_, params[: self.trained]), *params[self.trained :]]

    def free(self) -> None:
        """Use them no more: the graph frees them after their last use."""
        self.params = []

    def reduce_scatter(self, grads: Sequence[Tensor], after: Sequence[Tensor] = ()) -> list[Tensor]:
        """This rank's shards of the sums of the unit's gradients, sent once the tensors `after` have been computed."""
        return reduce_scatter(self.context.plans.layout, grads, after)


class _SavedView(NamedTuple):
    """A view of a full param, rebuilt from whichever all-gather is the last when the backward pass needs it."""

    unit: TracedUnit
    position: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: Tensor | _SavedView) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    unit = saved.unit
    param = (unit.params or unit.fetch())[saved.position]
    for view in (param, param.mT if param.dim() > 1 else param):
        if (view.shape, view.stride(), view.storage_offset()) == saved[2:]:
            return view.detach()
    return param.detach().as_strided(saved.shape, saved.stride, saved.offset)


def _memory(tensor: Tensor) -> int:
    address: int = _torch_compat.storage_id(tensor.untyped_storage())
    return address
