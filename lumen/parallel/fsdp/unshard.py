"""Params that come when a unit runs and go when it has run, forward and backward.

All communication hangs on one chain of tokens: each gather takes the token of the one before it and gives its own, so
that autograd meets the gathers in exactly the reverse order on every process, also those whose params a process did
not use. That is what keeps the processes' collectives in step.

    forward    gather root -> gather 1, run 1, let go 1 -> gather 2, run 2, let go 2 -> …
    backward   … gather 2 again, back through 2, reduce 2 -> gather 1 again, back through 1, reduce 1 -> reduce root
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as torch_pytree

from lumen.core.module import param_slots
from lumen.parallel.fsdp import cpu_offload
from lumen.parallel.fsdp.shard import AllGatherHandle, ShardLayout, alias, reduce_scatter
from lumen.parallel.fsdp.wrap import FSDPUnits
from lumen.parallel.lazy_param import LazyParam, empty_meta

Places = list[tuple[dict[str, Any], str, str]]


class UnshardContext:
    """The gathers of one gradient, or of one application of a model outside of any."""

    def __init__(
        self, cut: ShardLayout, shapes: Mapping[str, torch.Size], wire: torch.dtype | None, prefetch: int
    ) -> None:
        self.cut, self.shapes, self.wire, self.prefetch = cut, shapes, wire, prefetch
        self.idle = False  # whether what is computed weighs nothing, whatever its gradients
        self.token = torch.zeros(())
        self._direct: dict[str, tuple[Tensor, Tensor]] = {}
        self._gathered: set[str] = set()
        self._repeated = False  # whether a param was gathered more than once

    def empty_meta(self, name: str, dtype: torch.dtype) -> Tensor:
        """The param `name` without memory."""
        return empty_meta(self.shapes[name], dtype)

    def held(self, names: Sequence[str]) -> UnshardedUnit:
        """The memory of the params `names`."""
        return UnshardedUnit(self, names)

    def saving(self) -> AbstractContextManager[Any]:
        """What is entered while the loss is computed, for what its graph saves."""
        return nullcontext()

    def gathering(self, held: UnshardedUnit) -> AllGatherHandle:
        """The params of `held` on their way."""
        return AllGatherHandle(self.cut, held.parts, held.shapes, self.wire)

    def reached(self, grads: Sequence[Tensor]) -> None:
        """The backward pass has come to a unit whose output has these gradients."""

    def scattered(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of the sums of a unit's gradients."""
        return reduce_scatter(self.cut, grads)

    def at_rest(self, parts: list[Tensor], last: bool) -> list[Tensor]:
        """The parts of gradients where the params' parts lie.

        They are there at the end of the backward pass (`last`); earlier ones are on their way, unless autograd is to
        add several for one param, which it does at once.
        """
        if self.cut.device is None:
            return parts
        home = [cpu_offload.to_host(part, non_blocking=True) for part in parts]
        if last or self._repeated:
            cpu_offload.wait(self.cut.device)
        return home

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The param `name`, gathered by itself, once."""
        known = self._direct.get(name)
        if known is None or known[0] is not part:
            (whole,) = self.gather(self.held([name]), [part])
            self._direct[name] = known = part, whole
        return known[1]

    def gather(self, held: UnshardedUnit, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """The whole params of `parts`, on the chain."""
        held.first = not self._gathered
        self._repeated |= not self._gathered.isdisjoint(held.names)
        self._gathered.update(held.names)
        self.token, *wholes = _Gather.apply(held, self.token, *parts)  # type: ignore[no-untyped-call]
        return wholes  # type: ignore[no-any-return]

    def tie(self, out: Any, held: UnshardedUnit) -> Any:
        """The output of a unit, with `held` gathered again before the backward pass goes through the unit."""
        if not self.token.requires_grad or not torch.is_grad_enabled():
            return out
        leaves, spec = torch_pytree.tree_flatten(out)
        live = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.token, *tied = _Tie.apply(held, self.token, *(leaves[i] for i in live))  # type: ignore[no-untyped-call]
        for i, leaf in zip(live, tied, strict=True):
            leaves[i] = leaf
        return torch_pytree.tree_unflatten(leaves, spec)

    def finish(self, loss: Tensor) -> Tensor:
        """`loss` with the whole chain behind it, so that its gradient goes back through every gather."""
        if not self.token.requires_grad:
            return loss
        _, tied = _Tie.apply(None, self.token, loss)  # type: ignore[no-untyped-call]
        return tied  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let go of the graph, which knows this session: nobody else would break the circle before the next gc."""
        self.token = torch.zeros(())
        self._direct.clear()


class UnshardedUnit:
    """The memory of some params that are whole for now. It knows buffers only, and no tensor that autograd tracks."""

    def __init__(self, session: UnshardContext, names: Sequence[str]) -> None:
        self.session = session
        self.names = names
        self.first = False  # whether it was gathered before all others, and so is reduced after them
        self.shapes = [session.shapes[name] for name in names]
        self.parts: list[Tensor] = []
        self.room: list[Tensor] = []
        self.going: AllGatherHandle | None = None
        self.before: UnshardedUnit | None = None

    def launch(self, parts: Sequence[Tensor] | None = None) -> None:
        """Send for the params, unless that has been done."""
        if parts is not None:
            self.parts = [part.detach() for part in parts]
        if self.going is None:
            self.going = self.session.gathering(self)

    def fetch(self) -> list[Tensor]:
        """The whole params, in memory of their own."""
        self.launch()
        assert self.going is not None
        self.going.arrive()
        if not self.room:
            self.room = self.going.room()
        for flat in self.room:
            flat.untyped_storage().resize_(flat.numel() * flat.element_size())
        self.going.into(self.room)
        self.going = None
        return [alias(flat, shape) for flat, shape in zip(self.room, self.shapes, strict=True)]

    def free(self) -> None:
        """Give the memory back; who holds the tensors holds empty shells until the next `fetch`."""
        for flat in self.room:
            flat.untyped_storage().resize_(0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: UnshardedUnit, token: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        held.launch(parts)
        ctx.held = held
        return (token.clone(), *held.fetch())

    @staticmethod
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        held: UnshardedUnit = ctx.held
        held.free()
        if held.session.idle:  # 0 times infinity is no zero
            grads = tuple(torch.zeros_like(grad) for grad in grads)
        return (None, token, *held.session.at_rest(held.session.scattered(grads), held.first))


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: UnshardedUnit | None, token: Tensor, *outs: Tensor) -> tuple[Tensor, ...]:
        ctx.held = held
        return (token.clone(), *(out.view_as(out) for out in outs))

    @staticmethod
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        held: UnshardedUnit | None = ctx.held
        if held is not None:
            held.session.reached(grads)
            held.fetch()
            if held.before is not None and held.session.prefetch:
                held.before.launch()
        return (None, token, *grads)


class ForwardPass:
    """One application of a model: which units have been gathered, and what comes next."""

    def __init__(self, session: UnshardContext, units: FSDPUnits, whole: frozenset[str]) -> None:
        self.session, self.units, self.whole = session, units, whole
        self._next = 0
        self._parts: dict[str, Tensor] = {}
        self._places: dict[int, Places] = {}
        self._ahead: dict[int, UnshardedUnit] = {}
        self._running: dict[int, UnshardedUnit] = {}
        self._last: UnshardedUnit | None = None

    def begin(self, places: Places) -> None:
        """Take the parts out of the module and gather the root's."""
        for place in places:
            table, key, name = place
            if name in self.units.owner and name not in self.whole:
                self._places.setdefault(self.units.owner[name], []).append(place)
                self._parts[name] = table[key]
        for unit in self._places:
            self._hide(unit)
        self.enter(0)

    def enter(self, unit: int) -> None:
        """Put the whole params of a unit in their places, after those of the units that were passed over."""
        self._pass_over(unit)
        self._next = max(self._next, unit + 1)
        for (table, key, _), tensor in self._gather(unit):
            table[key] = tensor

    def leave(self, unit: int, out: Any) -> Any:
        """Take them away again; the unit's output knows to bring them back."""
        held = self._running.pop(unit, None)
        if held is None:
            return out
        self._hide(unit)
        if not unit:
            return out
        out = self.session.tie(out, held)
        held.before, self._last = self._last, held
        held.free()
        return out

    def end(self, out: Any) -> Any:
        """Pass over the units that did not run, so that all processes have gathered the same."""
        self._pass_over(len(self.units.names))
        return self.leave(0, out)

    def _pass_over(self, unit: int) -> None:
        while self._next < unit:
            skipped = self._next
            self._next += 1
            if self._gather(skipped):
                self.leave(skipped, None)

    def _gather(self, unit: int) -> list[tuple[tuple[dict[str, Any], str, str], Tensor]]:
        places = self._places.get(unit, [])
        names = list(dict.fromkeys(name for _, _, name in places))
        if not names:
            return []
        held = self._ahead.pop(unit, None) or self.session.held(names)
        held.launch([self._parts[name] for name in names])
        self._launch_ahead(unit)
        wholes = dict(zip(names, self.session.gather(held, [self._parts[name] for name in names]), strict=True))
        self._running[unit] = held
        return [(place, wholes[place[2]]) for place in places]

    def _launch_ahead(self, unit: int) -> None:
        for other in range(self._next, min(self._next + self.session.prefetch, len(self.units.names))):
            names = list(dict.fromkeys(name for _, _, name in self._places.get(other, [])))
            if names and other not in self._ahead and other > unit:
                self._ahead[other] = held = self.session.held(names)
                held.launch([self._parts[name] for name in names])

    def _hide(self, unit: int) -> None:
        for table, key, name in self._places[unit]:
            table[key] = LazyParam.of(self.session, name, self._parts[name])


def register_unit_hooks(current: Callable[[], ForwardPass], units: FSDPUnits) -> Callable[[nn.Module], None]:
    """What makes a skeleton tell the current pass which of its units runs."""

    def change(module: nn.Module) -> None:
        for unit, name in enumerate(units.names[1:], 1):
            each = module.get_submodule(name)
            each.register_forward_pre_hook(_entering(current, unit))
            each.register_forward_hook(_leaving(current, unit))
        module.register_forward_pre_hook(lambda root, args: current().begin(param_slots(root)))
        module.register_forward_hook(lambda root, args, out: current().end(out))

    return change


# Functions and not objects: a skeleton's copies must lead to the same pass.
def _entering(current: Callable[[], ForwardPass], unit: int) -> Callable[..., None]:
    return lambda module, args: current().enter(unit)


def _leaving(current: Callable[[], ForwardPass], unit: int) -> Callable[..., Any]:
    return lambda module, args, out: current().leave(unit, out)
