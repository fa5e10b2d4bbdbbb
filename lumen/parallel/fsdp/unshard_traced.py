"""Units of a compiled step: the same chain of gathers as `fsdp_run`, as nodes of one graph.

A graph has no memory to resize. There a unit's whole params live from their gather to their last use, and backward uses
would keep them from the first pass on. So the backward pass is given others: what autograd saves of a whole param is a
note of where it lay, and is made from the second gather when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

from lumen.parallel.fsdp.shard import AllGatherHandle, reduce_scatter
from lumen.parallel.fsdp.unshard import UnshardContext, UnshardedUnit


class TracedUnshardContext(UnshardContext):
    """The gathers of one gradient in a graph."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._after: list[Tensor] = []  # the activations or gradients at which the pass has arrived
        self._sums: list[Tensor] = []  # of the unit that was reduced last
        self._owners: dict[int, tuple[TracedUnit, int, Tensor]] = {}  # of each whole param, by its memory

    def empty_meta(self, name: str, dtype: torch.dtype) -> Tensor:
        """The param `name` without memory, and no part of the graph."""
        from torch._subclasses.fake_tensor import unset_fake_temporarily
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        with disable_proxy_modes_tracing(), unset_fake_temporarily():
            return super().empty_meta(name, dtype)

    def held(self, names: Sequence[str]) -> UnshardedUnit:
        """The params `names`."""
        return TracedUnit(self, names)

    def gathering(self, held: UnshardedUnit) -> AllGatherHandle:
        """The params of `held` on their way, not before the pass has come as far as it has now."""
        return AllGatherHandle(self.cut, held.parts, held.shapes, self.wire, self._after)

    def tie(self, out: Any, held: UnshardedUnit) -> Any:
        """The output of a unit: the pass has come as far as that."""
        self._after = [leaf.detach() for leaf in torch_pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        return super().tie(out, held)

    def reached(self, grads: Sequence[Tensor]) -> None:
        """The backward pass has come to these gradients."""
        self._after = list(grads)

    def scattered(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Sums, sent after those of the unit before have arrived: two units' gradients are whole at once, not more."""
        self._sums = reduce_scatter(self.cut, grads, self._sums)
        return self._sums

    def note(self, held: TracedUnit, wholes: Sequence[Tensor]) -> None:
        """Remember whose memory these are."""
        for place, whole in enumerate(wholes):
            self._owners[_memory(whole)] = held, place, whole  # which is kept, so that nobody gets its memory

    def saving(self) -> AbstractContextManager[Any]:
        """Save notes in place of whole params."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Note:
        owner = self._owners.get(_memory(tensor))
        if owner is None:
            return tensor
        return _Note(*owner[:2], tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def close(self) -> None:
        """Let go of the graph."""
        super().close()
        self._owners.clear()
        self._after = []


class TracedUnit(UnshardedUnit):
    """Some params that are whole for now; each gather makes them anew."""

    session: TracedUnshardContext

    def fetch(self) -> list[Tensor]:
        """The whole params, as new nodes."""
        self.launch()
        assert self.going is not None
        self.room = self.going.made()
        self.going = None
        self.session.note(self, self.room)
        return list(self.room)

    def free(self) -> None:
        """Use them no more: the graph lets go of them after their last use."""
        self.room = []


class _Note(NamedTuple):
    """A view of a whole param, to be made of whichever gather is the last when the backward pass needs it."""

    held: TracedUnit
    place: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: Tensor | _Note) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    held = saved.held
    whole = (held.room or held.fetch())[saved.place]
    for view in (whole, whole.mT if whole.dim() > 1 else whole):
        if (view.shape, view.stride(), view.storage_offset()) == saved[2:]:
            return view.detach()
    return whole.detach().as_strided(saved.shape, saved.stride, saved.offset)


def _memory(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place
