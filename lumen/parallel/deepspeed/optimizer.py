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
    """A torch optimizer whose step is P2 of the state's own optimizer, on this process's spans of params.

    The engine calls it once for each of its groups of params. Between `begin` and `end` these calls make up one update;
    outside of it, as when the engine allocates, nothing is updated.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})
        self._update: Update | None = None

    def begin(self, update: Update) -> None:
        """From now on the engine's calls make this update."""
        self._update = update

    def end(self) -> Any:
        """The optimizer state after the update: what it was where the engine left it out."""
        assert self._update is not None
        update, self._update = self._update, None
        return update.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what is in the groups now."""
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
        """Update what lies in these flat tensors of the engine's."""
        given = [flat for flat in flats if flat.grad is not None]
        grads = {}
        for name, span in self._spans.items():
            found = _within(given, span.master)
            if found is not None:
                flat, at = found
                assert flat.grad is not None
                grad = flat.grad.reshape(-1)[at : at + span.master.numel()]
                grads[name] = span.shaped(grad.to(span.master.dtype))
        if self._scale is not None:
            for grad in grads.values():
                grad.mul_(self._scale.to(grad.device, grad.dtype))
        self._apply(grads)

    def _apply(self, grads: Mapping[str, Tensor]) -> None:
        """Update the spans that have grads; the others, whose turn is another, go along without entries."""
        spans = {name: span for name, span in self._spans.items() if span.master.numel()}
        partly = grads.keys() != spans.keys()
        params = {name: span.shaped(span.master) for name, span in self._spans.items()}
        given = list(self._before)
        if partly:
            params = {name: p if name in grads else p[:0] for name, p in params.items()}
            for place, name in self._param_slots:
                given[place] = given[place] if name in grads else given[place][:0]
        full = {name: grads.get(name, p[:0]) for name, p in params.items()}
        with sharding.bound(_Shards(partly)):
            new, state = self._tx.apply(full, self._spec.unflatten(given), params, donate=True)
        for name, p in params.items():
            if new[name] is not p:
                p.copy_(new[name])
        leaves, owner = tree.leaves(state), dict(self._param_slots)
        held = tree.leaves(self.state)
        kept = [
            old if partly and place in owner and owner[place] not in grads else leaf
            for place, (old, leaf) in enumerate(zip(held, leaves, strict=True))
        ]
        self.state = self._spec.unflatten(kept)


def _within(flats: Sequence[Tensor], part: Tensor) -> tuple[Tensor, int] | None:
    """Which of `flats` the entries of `part` lie in, and from where."""
    for flat in flats if part.numel() else ():
        if flat.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
            at = int(part.storage_offset() - flat.storage_offset())
            if 0 <= at < flat.numel():
                return flat, at
    return None


class _Shards:
    """What a rule is told that looks at all params at once: `lumen.core.sharding.Shards`."""

    def __init__(self, partly: bool) -> None:
        self._partly = partly

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Each entry is on one process."""
        return True

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """`x` of all processes."""
        if self._partly:
            raise HyperparameterError(
                "this optimizer looks at all gradients at once (lm.optim.clip_by_global_norm, say), and the engine"
                ' updates group by group. Write lm.clip(1.0), or a larger "sub_group_size".'
            )
        assert dist.group.WORLD is not None
        return collectives.all_reduce(x.clone(), op, dist.group.WORLD)() if dist.get_world_size() > 1 else x
