"""Params that are all-gathered when their unit runs and freed when it has run, forward and backward.

All communication hangs on one chain of tokens: each all-gather takes the token of the one before it and returns its
own. So autograd reaches the all-gathers in exactly the reverse order on every rank, also those of params that a rank
did not use. This is what keeps the collectives of all ranks in step.

    forward    gather root -> gather 1, run 1, free 1 -> gather 2, run 2, free 2 -> …
    backward   … gather 2 again, back through 2, reduce 2 -> gather 1 again, back through 1, reduce 1 -> reduce root

A loss may take gradients itself, in its inputs: then the backward pass of these runs while the chain is still open. It
gathers units again as the other does, and reduces nothing. With `create_graph=True` the units that it has passed stay
full, because its own graph goes through them before the chain comes back to them.

Frozen params are gathered and freed with the others of their unit, and have no gradient. The backward pass ends at the
first all-gather of a trained param: frozen units before it are not gathered again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.tensor_proxy import TensorProxy
from lumen.errors import OrderError
from lumen.parallel.fsdp import cpu_offload
from lumen.parallel.fsdp.unit_plan import InFlight, UnitPlans

if TYPE_CHECKING:
    from lumen.parallel.fsdp.grad_reduction import UnitReducer

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
        self.beside: list[UnshardContext] = []  # those that continue this chain
        self.is_open = True  # until the loss function has returned
        self.saves_references = False  # in place of full params
        self._direct: dict[str, tuple[Tensor, Tensor]] = {}
        self._gathered: set[str] = set()
        self._repeated = False  # whether a param was gathered more than once

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
        if not self.is_open:  # in a recomputation, whose graph nothing goes back through
            return self.launch((name,), (shard,)).recall()[0]
        known = self._direct.get(name)
        return known[1] if known is not None and known[0] is shard else self.unshard_all({name: shard})[name]

    def unshard_all(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The full params of these `shards`, by their names, which stay full until the backward pass has used them.

        Inside of a transform of torch.func they are gathered outside of it, of which they are constants.
        """
        missing = {name: shard for name, shard in shards.items() if self._direct.get(name, (None,))[0] is not shard}
        if missing:
            in_func = _torch_compat.peek_interpreter_stack() is not None
            with _torch_compat.temporarily_clear_interpreter_stack() if in_func else nullcontext():
                full = self.gather(self.launch((*missing,), (*missing.values(),)), (*missing.values(),))
            self._direct.update((name, (missing[name], p)) for name, p in zip(missing, full, strict=True))
        return {name: self._direct[name][1] for name in shards}

    def gather(self, unit: UnshardedUnit, shards: Sequence[Tensor]) -> Sequence[Tensor]:
        """The full params of `shards`, on the chain."""
        count = unit.trained
        unit.first = not self._gathered
        self._repeated |= not self._gathered.isdisjoint(unit.names[:count])
        self._gathered.update(unit.names[:count])
        full: list[Tensor]
        self.chain.token, *full = _Gather.apply(unit, self.chain.token, *shards[:count])  # type: ignore[no-untyped-call]
        unit.in_backward = self.chain.token.requires_grad
        frozen, unit.frozen = unit.frozen, []
        return [*full, *frozen]

    def tie(self, output: Any, unit: UnshardedUnit) -> Any:
        """The output of a unit, whose params are gathered again before the backward pass goes through the unit."""
        if not torch.is_grad_enabled():
            return output
        if type(output) is Tensor and output.requires_grad:
            self.chain.token, tied = _Tie.apply(unit, self.chain.token, output)  # type: ignore[no-untyped-call]
            return tied
        leaves, spec = _torch_compat.torch_pytree.tree_flatten(output)
        if any(isinstance(leaf, TensorProxy) for leaf in leaves):
            raise OrderError(
                f"a unit of lm.fsdp, which has the params {', '.join(unit.names)}, is the head whose logits"
                " lm.chunked_logits computes after the unit has been freed. Name other modules for units:"
                ' lm.fsdp(wrap=["*.blocks.*"])'
            )
        live = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not live and not self.chain.token.requires_grad:
            return output
        self.chain.token, *outs = _Tie.apply(  # type: ignore[no-untyped-call]
            unit, self.chain.token, *(leaves[i] for i in live)
        )
        for i, leaf in zip(live, outs, strict=True):
            leaves[i] = leaf
        return _torch_compat.torch_pytree.tree_unflatten(leaves, spec)

    def finish(self, loss: Tensor) -> Tensor:
        """`loss` tied to the end of the chain, so that its gradient goes back through every all-gather."""
        if not self.chain.token.requires_grad:
            return loss
        tied: Tensor
        _, tied = _Tie.apply(None, self.chain.token, loss)  # type: ignore[no-untyped-call]
        return tied

    def close(self) -> None:
        """Drop the graph, which refers to this context: without this the cycle would last until the next gc."""
        self.is_open = False
        self.chain.token = torch.zeros(())
        self._direct.clear()
        for context in self.beside:
            context.close()
        self.beside.clear()

    def attach(self, context: UnshardContext) -> None:
        """Let the all-gathers of other params, in which no gradient is taken, continue this chain until it is closed.

        What is computed from those params may still be differentiated in its inputs.
        """
        context.chain = self.chain
        self.beside.append(context)


class UnshardedUnit:
    """The memory of params that are full for now. It refers to buffers only, and to no tensor that autograd tracks."""

    # From gradients of the unit, and tensors to wait for (in a graph): this rank's shards of their sums.
    reduce_scatter: Callable[..., list[Tensor]]

    def __init__(self, context: UnshardContext, names: tuple[str, ...], shards: Sequence[Tensor]) -> None:
        self.context = context
        self.names = names
        self.first = False  # whether no gradient is reduced after its own
        self.trained = context.plans.trained(names)  # how many of its params have gradients; the others are frozen
        self.frozen: list[Tensor] = []  # the full ones, until they are handed out
        self.shards = [*map(Tensor.detach, shards)]
        self.previous: UnshardedUnit | None = None
        self.in_backward = False  # whether the backward pass comes back to it
        self.has_left = False  # whether its modules have run, and it was freed after that
        self.stays_full = False  # for a graph that a gradient inside of the loss has made

    def launch(self) -> None:
        """Start the all-gather, unless it has been started."""
        raise NotImplementedError

    def fetch(self) -> list[Tensor]:
        """The full params."""
        raise NotImplementedError

    def refetch(self, reached: Sequence[Tensor]) -> None:
        """Have the params full again, in the backward pass, which has `reached` these gradients."""
        raise NotImplementedError

    def recall(self) -> list[Tensor]:
        """The full params for a recomputation, which are all-gathered again unless they are there."""
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
        self._is_full = False
        self._in_flight: InFlight | None = self._plan.all_gather(self.shards)

    def launch(self) -> None:
        """Start the all-gather, unless it has been started."""
        if self._in_flight is None and not self._is_full:
            self._in_flight = self._plan.all_gather(self.shards)

    def fetch(self) -> list[Tensor]:
        """The full params."""
        in_flight = self._in_flight or self._plan.all_gather(self.shards)
        self._in_flight = None
        self._is_full = True
        return self._plan.receive(in_flight, self._buffers)

    def refetch(self, reached: Sequence[Tensor]) -> None:
        """Have the full params where they were, in the backward pass."""
        if not self._is_full:
            self.fetch()

    def recall(self) -> list[Tensor]:
        """The full params for a recomputation."""
        params = self._plan.aliases(self._buffers) if self._is_full else self.fetch()
        for param in params[: self.trained]:
            param.requires_grad_()
        return params

    def free(self) -> None:
        """Free the memory."""
        self._is_full = False
        for buffer in self._buffers:
            buffer.untyped_storage().resize_(0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: UnshardedUnit, token: Tensor, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        params = unit.fetch()
        if unit.trained < len(params):  # constants to autograd, so no outputs of this function
            params, unit.frozen = params[: unit.trained], params[unit.trained :]
        if True not in ctx.needs_input_grad[2:]:  # of a model through which the gradient of another one goes
            ctx.mark_non_differentiable(*params)
        return (token.clone(), *params)

    @staticmethod
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        unit: UnshardedUnit = ctx.unit
        context = unit.context
        if context.is_open:  # a gradient that the loss takes itself, in something else than params
            if unit.has_left and not unit.stays_full:
                unit.free()
            return (None, token, *(None for _ in grads))
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
            # Where the gradient itself will be differentiated, its graph needs the params later than this.
            unit.stays_full |= torch.is_grad_enabled()
            with torch.no_grad():
                unit.refetch(grads)
                if unit.previous is not None and unit.context.prefetch:
                    unit.previous.launch()
        return (None, token, *grads)
