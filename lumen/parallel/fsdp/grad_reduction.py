"""GRADIENT of fsdp: which params a loss function sees, and how its gradients are summed at each stage.

Stage 1 sums gradients in buckets, as ddp does. Stage 2 reduce-scatters them after the backward pass. At stage 3 the
loss function sees `LazyParam`s, and each unit's gradients are reduce-scattered when the backward pass leaves the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lumen.core import _torch_compat, batching, gradient, rules
from lumen.core.metrics import Mean
from lumen.core.primitives import Gradient, GradientCall, WrappedLoss, user_loss
from lumen.core.rules import Next
from lumen.errors import AxisError, LossError, ParamsError
from lumen.parallel.comm import collectives
from lumen.parallel.comm.buckets import Buckets
from lumen.parallel.comm.grad_reducer import GradReducer
from lumen.parallel.ddp.aux_reduction import BufferChecks
from lumen.parallel.ddp.grad_reduction import DataParallelRule, GradReduction, zero_weight_loss
from lumen.parallel.fsdp.chunks import byte_chunks
from lumen.parallel.fsdp.frozen_params import returning_shards
from lumen.parallel.fsdp.runtime import FSDPRuntime
from lumen.parallel.fsdp.shard import ShardLayout, reduce_scatter
from lumen.parallel.fsdp.sharded_states import ShardedStates
from lumen.parallel.fsdp.stage_params import gather_params
from lumen.parallel.fsdp.unit_plan import UnitPlans
from lumen.parallel.fsdp.unshard import UnshardContext, UnshardedUnit
from lumen.parallel.lazy_param import LazyParam


class ShardReducer:
    """The `GradReducer` of stage 2: this rank's shards of the sums, after the backward pass."""

    in_backward = False

    def __init__(self, layout: ShardLayout) -> None:
        self._layout = layout
        self.flat_sums: list[Tensor] = []

    def register_hooks(self, live: Sequence[Tensor]) -> None:
        """Nothing is sent before the backward pass has ended."""

    def finish(self, grads: Sequence[Tensor], stats: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """This rank's shards of the sums of `grads`, and the sum of `stats`."""
        shards = [shard for chunk in byte_chunks(grads) for shard in reduce_scatter(self._layout, grads[chunk])]
        return shards, collectives.all_reduce(stats, "sum", self._layout.row_group)()


class UnitReducer:
    """The `GradReducer` of stage 3: a unit's gradients are reduce-scattered when the backward pass leaves the unit."""

    in_backward = True

    def __init__(self, layout: ShardLayout) -> None:
        self._layout = layout
        self.flat_sums: list[Tensor] = []

    def register_hooks(self, live: Sequence[Tensor]) -> None:
        """Nothing: `lumen.parallel.fsdp.unshard` calls `reduce` in the backward pass of the all-gather."""

    def reduce(self, unit: UnshardedUnit, grads: Sequence[Tensor]) -> list[Tensor]:
        """This rank's shards of the sums of a unit's gradients."""
        return unit.reduce_scatter(grads)

    def finish(self, grads: Sequence[Tensor], stats: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """`grads`, which are shards of sums already, and the sum of `stats`."""
        return [*grads], collectives.all_reduce(stats, "sum", self._layout.row_group)()


class TracedUnitReducer(UnitReducer):
    """The `GradReducer` of stage 3 under `lm.compile`: each reduce-scatter is a node of the graph.

    It is sent after the sums of the unit before have arrived. Otherwise the graph could keep the full gradients of
    more than two units at once.
    """

    def __init__(self, layout: ShardLayout) -> None:
        super().__init__(layout)
        self._previous: list[Tensor] = []

    def reduce(self, unit: UnshardedUnit, grads: Sequence[Tensor]) -> list[Tensor]:
        """This rank's shards of the sums of a unit's gradients."""
        self._previous = unit.reduce_scatter(grads, self._previous)
        return self._previous


def unit_reducer(layout: ShardLayout) -> UnitReducer:
    """A reducer for one gradient of stage 3."""
    return TracedUnitReducer(layout) if rules.is_tracing() else UnitReducer(layout)


class FSDPRule(DataParallelRule):
    """What fsdp does with each gradient of one step; at stage 3 `by_units`, or with all params gathered before."""

    def __init__(
        self,
        runtime: FSDPRuntime,
        layout: ShardLayout,
        states: ShardedStates,
        state: Any,
        checks: BufferChecks,
        by_units: bool,
    ) -> None:
        super().__init__(runtime.comm, "merge", state, checks)
        self._runtime, self._layout, self._states = runtime, layout, states
        self._by_units = by_units

    def __call__(self, next: Next, call: GradientCall) -> Gradient:
        """The gradient of the global batch."""
        if _torch_compat.peek_interpreter_stack() is not None or call.engine == "func":
            raise AxisError(
                "lm.fsdp gathers params and sums gradients over ranks, which torch cannot do inside vmap or"
                ' torch.func.grad. Leave out lm.ensemble and engine="func".'
            )
        rows = batching.count(call.batch)
        frozen = self._states.frozen
        if frozen is not None and call.has_aux:
            call = call.replace(loss_fn=returning_shards(call.loss_fn))
        call = self._prepared_call(call, rows)
        try:
            result: Gradient = next(self._reduced(call.replace(summed=True), rows))
        except RuntimeError as error:
            if self._runtime.stage == 3 and "backward through the graph a second time" in str(error):
                raise _freed(call) from error
            raise
        if not rows:
            result = result.replace(aux=self._neutral_aux(result.aux))
        if frozen is not None:
            result = result.replace(aux=frozen.in_aux(result.aux))
        return result if call.summed else gradient.normalized(result)

    def _reduced(self, call: GradientCall, rows: int) -> GradientCall:
        """The call with its reduction; at stage 3 with a loss that gathers params as it uses them."""
        reducer = self._reducer(rows)
        if not isinstance(reducer, UnitReducer):
            if self._runtime.stage == 3:
                call = call.replace(params=gather_params(self._plans_of(call.params), call.params))
            return call.replace(reduction=GradReduction(self._comm, reducer, rows, self, self._device))
        plans, loss_fn, has_aux = self._plans_of(call.params), call.loss_fn, call.has_aux
        zero_weight = self._unsharding(plans, zero_weight_loss(loss_fn, has_aux), has_aux, reducer, zero_weight=True)
        reduction = GradReduction(self._comm, reducer, rows, self, self._device, zero_weight)
        loss_fn = self._unsharding(plans, loss_fn, has_aux, reducer, zero_weight=not rows)
        return call.replace(loss_fn=loss_fn, reduction=reduction)

    def _plans_of(self, params: Any) -> UnitPlans:
        plans = self._states.of_params(params)
        if plans is None:
            raise ParamsError(
                "under lm.fsdp(stage=3) a loss is differentiated in the state's own params, whose shards and shapes are"
                " known: lm.value_and_grad(loss_fn)(state.params, batch). For other trees use lm.fsdp(stage=2)."
            )
        return plans

    def _reducer(self, rows: int) -> GradReducer:
        runtime = self._runtime
        if runtime.stage == 1:
            return Buckets(runtime.comm, runtime.bucket_plans, rows > 0)
        return unit_reducer(self._layout) if self._by_units else ShardReducer(self._layout)

    def _unsharding(
        self, plans: UnitPlans, loss: Callable[..., Any], has_aux: bool, reducer: UnitReducer, zero_weight: bool
    ) -> Callable[..., Any]:
        """`loss` as a function of shards."""

        def run(context: UnshardContext, params: Any, args: tuple[Any, ...]) -> Any:
            context.zero_weight = zero_weight
            proxies = {}
            for name, shard in params.items():
                proxies[name] = (_nested_proxy if isinstance(shard, LazyParam) else LazyParam.of)(context, name, shard)
            self._runtime.contexts.append(context)
            try:
                with context.saving():
                    result = loss(proxies, *args)
                return _tied(context, result, has_aux)
            finally:
                self._runtime.contexts.pop()
                context.close()

        def loss_fn(params: Any, *args: Any) -> Any:
            context = self._runtime.context(plans, reducer)
            try:
                return run(context, params, args)
            except RuntimeError as error:
                if not context.saves_references or "saved tensor hooks" not in str(error):
                    raise
            # Transforms of torch.func refuse such hooks: the graph keeps the params of this loss full.
            context = self._runtime.context(plans, reducer)
            context.saves_references = False
            return run(context, params, args)

        return WrappedLoss(loss, loss_fn, lambda other: self._unsharding(plans, other, has_aux, reducer, zero_weight))


def _freed(call: GradientCall) -> LossError:
    name = getattr(user_loss(call.loss_fn), "__qualname__", "")
    return LossError(
        f"the loss of {name} takes a derivative and frees its graph, through which the backward pass of"
        " lm.fsdp(stage=3) goes again. Write torch.autograd.grad(..., retain_graph=True), or lm.fsdp(stage=2)."
    )


def _nested_proxy(context: UnshardContext, name: str, shard: LazyParam) -> LazyParam:
    """The param `name`, of which `lm.tensor_parallel` inside has a shard: that is gathered last."""
    return LazyParam.of(shard.source, name, LazyParam.of(context, name, shard.shard))


def _tied(context: UnshardContext, result: Any, has_aux: bool) -> Any:
    """The loss tied to the whole chain, so that every rank goes back through all of it."""
    loss, aux = result if has_aux and type(result) is tuple and len(result) == 2 else (result, None)
    if isinstance(loss, Mean):
        loss = Mean(context.finish(loss.total), loss.weight)
    elif isinstance(loss, Tensor):
        loss = context.finish(loss)
    return (loss, aux) if has_aux else loss
