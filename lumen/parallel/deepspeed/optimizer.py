"""`lumen.optim` as the optimizer that a DeepSpeed engine calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import sharding
from lumen.errors import HyperparameterError
from lumen.parallel.comm import collectives
from lumen.parallel.deepspeed.partitions import Span


class Adapter(torch.optim.Optimizer):
    """A torch optimizer whose step is UPDATE of the state's own optimizer, on this rank's spans of params.

    The engine calls it once for each of its groups of params. Between `begin` and `end` these calls are one update.
    Outside, as when the engine allocates memory, nothing is updated.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})
        self._update: Update | None = None

    def begin(self, update: Update) -> None:
        """Use the engine's calls for this update."""
        self._update = update

    def end(self) -> Any:
        """The optimizer state after the update; unchanged where the engine skipped it."""
        assert self._update is not None
        update, self._update = self._update, None
        return update.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the current groups of params."""
        if self._update is not None:
            self._update([p for group in self.param_groups for p in group["params"]])


class Update:
    """One update, group by group.

    Gradients are first multiplied by `scale`, unless it is None. `param_slots` has the indices of the leaves of the
    optimizer state that are laid out like params, with the names of these.
    """

    def __init__(
        self,
        tx: Any,
        state: Any,
        param_slots: Sequence[tuple[int, str]],
        spans: Mapping[str, Span],
        scale: Tensor | None,
    ) -> None:
        self.state = state
        self._tx, self._param_slots, self._spans, self._scale = tx, param_slots, spans, scale
        self._before, self._spec = tree.flatten(state)

    def __call__(self, flats: Sequence[Tensor]) -> None:
        """Update the spans in these flat tensors of the engine's."""
        with_grads = [flat for flat in flats if flat.grad is not None]
        grads = {}
        for name, span in self._spans.items():
            position = _locate(with_grads, span.master)
            if position is not None:
                flat, start = position
                assert flat.grad is not None
                grad = flat.grad.reshape(-1)[start : start + span.master.numel()]
                grads[name] = span.shaped(grad.to(span.master.dtype))
        if self._scale is not None:
            for grad in grads.values():
                grad.mul_(self._scale.to(grad.device, grad.dtype))
        self._apply(grads)

    def _apply(self, grads: Mapping[str, Tensor]) -> None:
        """Update the spans that have grads; others, which another call updates, are passed with no entries."""
        spans = {name: span for name, span in self._spans.items() if span.master.numel()}
        is_partial = grads.keys() != spans.keys()
        params = {name: span.shaped(span.master) for name, span in self._spans.items()}
        leaves = list(self._before)
        if is_partial:
            params = {name: p if name in grads else p[:0] for name, p in params.items()}
            for index, name in self._param_slots:
                leaves[index] = leaves[index] if name in grads else leaves[index][:0]
        all_grads = {name: grads.get(name, p[:0]) for name, p in params.items()}
        with sharding.bound(_Shards(is_partial)):
            new, state = self._tx.apply(all_grads, self._spec.unflatten(leaves), params, donate=True)
        for name, p in params.items():
            if new[name] is not p:
                p.copy_(new[name])
        param_of = dict(self._param_slots)
        old_and_new = zip(tree.leaves(self.state), tree.leaves(state), strict=True)
        self.state = self._spec.unflatten(
            [
                old if is_partial and index in param_of and param_of[index] not in grads else leaf
                for index, (old, leaf) in enumerate(old_and_new)
            ]
        )


def _locate(flats: Sequence[Tensor], span: Tensor) -> tuple[Tensor, int] | None:
    """The one of `flats` that has the entries of `span`, and the position of the first."""
    for flat in flats if span.numel() else ():
        if flat.untyped_storage().data_ptr() == span.untyped_storage().data_ptr():
            start = int(span.storage_offset() - flat.storage_offset())
            if 0 <= start < flat.numel():
                return flat, start
    return None


class _Shards:
    """The `lumen.core.sharding.Shards` for rules that look at all params at once."""

    def __init__(self, is_partial: bool) -> None:
        self._is_partial = is_partial

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Always: each entry is on one rank."""
        return True

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """`x` reduced over all ranks."""
        if self._is_partial:
            raise HyperparameterError(
                "this optimizer looks at all gradients at once (lm.optim.clip_by_global_norm, say), and the engine"
                ' updates group by group. Write lm.clip(1.0), or a larger "sub_group_size".'
            )
        assert dist.group.WORLD is not None
        return collectives.all_reduce(x.clone(), op, dist.group.WORLD)() if dist.get_world_size() > 1 else x
