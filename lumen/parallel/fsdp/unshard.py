"""Params that are all-gathered when their unit runs and freed when it has run, forward and backward.

All communication hangs on one chain of tokens: each all-gather takes the token of the one before it and returns its
own. So autograd reaches the all-gathers in exactly the reverse order on every rank, also those of params that a rank
did not use. This is what keeps the collectives of all ranks in step.

    forward    gather root -> gather 1, run 1, free 1 -> gather 2, run 2, free 2 -> …
    backward   … gather 2 again, back through 2, reduce 2 -> gather 1 again, back through 1, reduce 1 -> reduce root
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat
from lumen.core.module import param_slots
from lumen.errors import OrderError
from lumen.parallel.fsdp import cpu_offload
from lumen.parallel.fsdp.unit_plan import InFlight, UnitPlans
from lumen.parallel.fsdp.wrap import FSDPUnits
from lumen.parallel.lazy_param import LazyParam

if TYPE_CHECKING:
    from lumen.parallel.fsdp.grad_reduction import UnitReducer

ParamSlot = tuple[dict[str, Any], str, str]  # a module's table, the key in it, and the name of the param

_dtype_of = attrgetter("dtype")
_NO_SAVING: AbstractContextManager[Any] = nullcontext()


class Chain:
    """The token of the all-gather before, which contexts that run within one another share."""

    def __init__(self) -> None:
        self.token = torch.zeros(())


class UnshardContext:
    """The all-gathers of one gradient, or of one application of a model outside of any."""

    def __init__(self, plans: UnitPlans, prefetch: int, reducer: UnitReducer) -> None:
        self.plans, self.prefetch, self.reducer = plans, prefetch, reducer
        self.empty_meta: Callable[[str, torch.dtype], Tensor] = plans.empty_meta
        self.zero_weight = False  # whether what is computed weighs nothing, whatever its gradients
        self.chain = Chain()
        self._beside: list[UnshardContext] = []
        self._direct: dict[str, tuple[Tensor, Tensor]] = {}
        self._gathered: set[str] = set()
        self._repeated = False  # whether a param was gathered more than once

    @property
    def token(self) -> Tensor:
        """The token of the all-gather before."""
        return self.chain.token

    @token.setter
    def token(self, token: Tensor) -> None:
        self.chain.token = token

    def launch(self, names: tuple[str, ...], shards: Sequence[Tensor]) -> UnshardedUnit:
        """Start the all-gather of the params `names`, of which this rank has `shards`."""
        return EagerUnit(self, names, shards)

    def saving(self) -> AbstractContextManager[Any]:
        """Entered while the loss is computed, for what its graph saves."""
        return _NO_SAVING

    def to_rest(self, shards: list[Tensor], last: bool) -> list[Tensor]:
        """Shards of gradients on the host, where `offload` keeps the params' shards.

        They have arrived at the end of the backward pass (`last`). Earlier ones are on their way, unless autograd adds
        several for one param, which it does at once.
        """
        device = self.plans.layout.device
        assert device is not None
        on_host = [cpu_offload.to_host(shard, non_blocking=True) for shard in shards]
        if last or self._repeated:
            cpu_offload.wait(device)
        return on_host

    def unshard(self, name: str, shard: Tensor) -> Tensor:
        """The full param `name`, gathered by itself, once."""
        known = self._direct.get(name)
        if known is None or known[0] is not shard:
            (full,) = self.gather(self.launch((name,), (shard,)), (shard,))
            self._direct[name] = known = shard, full
        return known[1]

    def gather(self, unit: UnshardedUnit, shards: Sequence[Tensor]) -> Sequence[Tensor]:
        """The full params of `shards`, on the chain."""
        unit.first = not self._gathered
        self._repeated |= not self._gathered.isdisjoint(unit.names)
        self._gathered.update(unit.names)
        full: list[Tensor]
        self.token, *full = _Gather.apply(unit, self.token, *shards)  # type: ignore[no-untyped-call]
        return full

    def tie(self, output: Any, unit: UnshardedUnit) -> Any:
        """The output of a unit, whose params are gathered again before the backward pass goes through the unit."""
        if not torch.is_grad_enabled():
            return output
        if type(output) is Tensor and output.requires_grad:
            self.token, tied = _Tie.apply(unit, self.token, output)  # type: ignore[no-untyped-call]
            return tied
        leaves, spec = _torch_compat.torch_pytree.tree_flatten(output)
        live = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not live and not self.token.requires_grad:
            return output
        self.token, *outs = _Tie.apply(unit, self.token, *(leaves[i] for i in live))  # type: ignore[no-untyped-call]
        for i, leaf in zip(live, outs, strict=True):
            leaves[i] = leaf
        return _torch_compat.torch_pytree.tree_unflatten(leaves, spec)

    def finish(self, loss: Tensor) -> Tensor:
        """`loss` tied to the end of the chain, so that its gradient goes back through every all-gather."""
        if not self.token.requires_grad:
            return loss
        tied: Tensor
        _, tied = _Tie.apply(None, self.token, loss)  # type: ignore[no-untyped-call]
        return tied

    def close(self) -> None:
        """Drop the graph, which refers to this context: without this the cycle would last until the next gc."""
        self.token = torch.zeros(())
        self._direct.clear()
        for context in self._beside:
            context.close()
        self._beside.clear()

    def attach(self, context: UnshardContext) -> None:
        """Let the all-gathers of other params, in which no gradient is taken, continue this chain until it is closed.

        What is computed from those params may still be differentiated in its inputs.
        """
        context.chain = self.chain
        self._beside.append(context)


class UnshardedUnit:
    """The memory of params that are full for now. It refers to buffers only, and to no tensor that autograd tracks."""

    # From gradients of the unit, and tensors to wait for (in a graph): this rank's shards of their sums.
    reduce_scatter: Callable[..., list[Tensor]]

    def __init__(self, context: UnshardContext, names: tuple[str, ...], shards: Sequence[Tensor]) -> None:
        self.context = context
        self.names = names
        self.first = False  # whether it was gathered before all others, and so is reduced after them
        self.shards = [*map(Tensor.detach, shards)]
        self.previous: UnshardedUnit | None = None

    def launch(self) -> None:
        """Start the all-gather, unless it has been started."""
        raise NotImplementedError

    def fetch(self, reached: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The full params; in the backward pass once it has `reached` these gradients."""
        raise NotImplementedError

    def free(self) -> None:
        """Free the memory; tensors that alias it are empty until the next `fetch`."""
        raise NotImplementedError


class EagerUnit(UnshardedUnit):
    """A unit whose buffers are resized to nothing while it does not run."""

    def __init__(self, context: UnshardContext, names: tuple[str, ...], shards: Sequence[Tensor]) -> None:
        super().__init__(context, names, shards)
        self._plan = context.plans.plan(names, (*map(_dtype_of, shards),))
        self.reduce_scatter = self._plan.reduce_scatter
        self._buffers: list[Tensor] = []
        self._in_flight: InFlight | None = self._plan.all_gather(self.shards)

    def launch(self) -> None:
        """Start the all-gather, unless it has been started."""
        if self._in_flight is None:
            self._in_flight = self._plan.all_gather(self.shards)

    def fetch(self, reached: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The full params."""
        in_flight = self._in_flight or self._plan.all_gather(self.shards)
        self._in_flight = None
        return self._plan.receive(in_flight, self._buffers)

    def free(self) -> None:
        """Free the memory."""
        for buffer in self._buffers:
            buffer.untyped_storage().resize_(0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: UnshardedUnit, token: Tensor, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        params = unit.fetch()
        if True not in ctx.needs_input_grad[2:]:  # of a model through which the gradient of another one goes
            ctx.mark_non_differentiable(*params)
        return (token.clone(), *params)

    @staticmethod
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        unit: UnshardedUnit = ctx.unit
        context = unit.context
        unit.free()
        if True not in ctx.needs_input_grad[2:]:
            return (None, token, *(None for _ in grads))
        if context.zero_weight:  # zeros, and not 0 times a gradient, which may be infinite
            grads = tuple(torch.zeros_like(grad) for grad in grads)
        shards = context.reducer.reduce(unit, grads)
        if context.plans.layout.device is not None:
            shards = context.to_rest(shards, unit.first)
        return (None, token, *shards)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: UnshardedUnit | None, token: Tensor, *outs: Tensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        return (token.clone(), *map(Tensor.view_as, outs, outs))

    @staticmethod
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        unit: UnshardedUnit | None = ctx.unit
        if unit is not None:
            unit.fetch(grads)
            if unit.previous is not None and unit.context.prefetch:
                unit.previous.launch()
        return (None, token, *grads)


class ForwardPass:
    """One application of a model: which units have been gathered, and which one is next.

    `full` are the names of params that are not sharded; `proxies` are what the loss function sees of the others.
    """

    def __init__(
        self, context: UnshardContext, units: FSDPUnits, full: frozenset[str], proxies: Mapping[str, LazyParam]
    ) -> None:
        self.context, self.units, self.full = context, units, full
        self._proxies = dict(proxies)
        self._next = 0
        self._slots: dict[int, list[ParamSlot]] = {}
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._ahead: dict[int, UnshardedUnit] = {}
        self._running: dict[int, UnshardedUnit] = {}
        self._last: UnshardedUnit | None = None

    def begin(self, slots: Sequence[ParamSlot]) -> None:
        """Take the shards out of the module, and gather the root's params."""
        owner, full, proxies = self.units.owner, self.full, self._proxies
        for slot in slots:
            table, key, name = slot
            if name not in owner or name in full:
                continue
            shard = table[key]
            unit = owner[name]
            self._slots.setdefault(unit, []).append(slot)
            self._shards.setdefault(unit, {})[name] = shard
            proxy = proxies.get(name)
            # The loss function's own, unless a rule inside has changed the shard: cast it, say.
            if proxy is None or proxy.shard is not shard or proxy.source is not self.context:
                proxies[name] = proxy = LazyParam.of(self.context, name, shard)
            table[key] = proxy
        self.enter(0)

    def enter(self, unit: int) -> None:
        """Gather the params of a unit into its modules, after those of the units that were skipped."""
        if self._next < unit:
            self._skip_to(unit)
        if self._next <= unit:
            self._next = unit + 1
        if unit in self._slots:
            params = self._gather(unit)
            for table, key, name in self._slots[unit]:
                table[key] = params[name]

    def leave(self, unit: int, output: Any) -> Any:
        """Free the params of a unit; its output gathers them again in the backward pass."""
        unsharded = self._running.pop(unit, None)
        if unsharded is None:
            return output
        for table, key, name in self._slots[unit]:
            table[key] = self._proxies[name]
        if not unit:
            return output
        output = self.context.tie(output, unsharded)
        unsharded.previous, self._last = self._last, unsharded
        unsharded.free()
        return output

    def end(self, output: Any) -> Any:
        """Gather and free the units that did not run, so that all ranks have gathered the same."""
        if self._next < len(self.units.names):
            self._skip_to(len(self.units.names))
        return self.leave(0, output)

    def _skip_to(self, unit: int) -> None:
        while self._next < unit:
            skipped = self._next
            self._next += 1
            if skipped in self._slots:
                self._gather(skipped)
                self.leave(skipped, None)

    def _gather(self, unit: int) -> dict[str, Tensor]:
        shards = self._shards[unit]
        names = (*shards,)
        unsharded = self._ahead.pop(unit, None)
        if unsharded is None:
            unsharded = self.context.launch(names, (*shards.values(),))
        self._launch_ahead(unit)
        params = self.context.gather(unsharded, (*shards.values(),))
        self._running[unit] = unsharded
        return dict(zip(names, params, strict=True))

    def _launch_ahead(self, unit: int) -> None:
        for other in range(self._next, min(self._next + self.context.prefetch, len(self.units.names))):
            if other in self._shards and other not in self._ahead and other > unit:
                shards = self._shards[other]
                self._ahead[other] = self.context.launch((*shards,), (*shards.values(),))


def register_unit_hooks(passes: Sequence[ForwardPass], units: FSDPUnits) -> Callable[[nn.Module], None]:
    """A change of a module after which its units are gathered by the innermost of the `passes` that are running."""

    def change(module: nn.Module) -> None:
        for unit, name in enumerate(units.names[1:], 1):
            submodule = module.get_submodule(name)
            submodule.register_forward_pre_hook(_entering(passes, unit))
            submodule.register_forward_hook(_leaving(passes, unit))
        module.register_forward_pre_hook(lambda root, args: _current(passes).begin(param_slots(root)))
        module.register_forward_hook(lambda root, args, output: _current(passes).end(output))

    return change


# Closures and not objects: the copies of a module must share the list of passes.
def _entering(passes: Sequence[ForwardPass], unit: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        (passes[-1] if passes else _current(passes)).enter(unit)

    return hook


def _leaving(passes: Sequence[ForwardPass], unit: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (passes[-1] if passes else _current(passes)).leave(unit, output)

    return hook


def _current(passes: Sequence[ForwardPass]) -> ForwardPass:
    if not passes:
        raise OrderError(
            "a module that contains units of lm.fsdp ran again in the backward pass, where none of them can be"
            " gathered. Recompute the units themselves, lm.remat('blocks.*'), or make that module the unit:"
            " lm.fsdp(wrap='body')."
        )
    return passes[-1]
