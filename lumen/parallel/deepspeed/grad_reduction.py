"""Gradients by a DeepSpeed engine: the rule for GRADIENT, in which the engine computes, sums and keeps them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat, batching, external_grads, gradient, loss_errors, rules
from lumen.core.metrics import Mean
from lumen.core.primitives import Gradient, GradientCall
from lumen.core.rules import Next
from lumen.errors import AxisError, OrderError, ParamsError
from lumen.parallel.comm import collectives
from lumen.parallel.comm.buckets import GradComm
from lumen.parallel.ddp.grad_reduction import DataParallelRule, GradReduction, zero_weight_loss
from lumen.parallel.deepspeed.holder import EngineHolder, PendingGrads
from lumen.parallel.deepspeed.proxies import engine_grad


class EngineRule(DataParallelRule):
    """The rule of one step for GRADIENT, in which the engine computes the gradients."""

    def __init__(self, holder: EngineHolder, state: Any) -> None:
        super().__init__(holder.comm, "merge", state, holder.checks)
        self._holder = holder
        self._engine, self._params = holder.require_engine(), state.params

    def __call__(self, next: Next, call: GradientCall) -> Gradient:
        """The loss and aux, with grads whose values are in the engine."""
        self._check(call)
        size = batching.count(call.batch)
        reduction = GradReduction(self._comm, EngineReducer(self._comm), size, self, self._device)
        rows = self._comm.launch(torch.tensor(float(size), device=self._device), exact=True)()
        call = self._prepared_call(call, size)
        results = self._microbatches(call, size, self._comm.size / rows)  # the engine takes the mean over ranks
        result = batching.add_gradients(results, self._tracker.origins)
        if not size:
            result = result.replace(aux=self._neutral_aux(result.aux))
        result = reduction.finish(result.replace(grads={}))
        loss = result.loss
        assert isinstance(loss, Mean)
        pending = PendingGrads(
            {name: engine_grad(p) for name, p in self._params.items()},
            None if result.scalar else rows / loss.weight,
        )
        self._holder.pending = pending
        return result.replace(grads=pending.grads, loss=loss.compute() if result.scalar else loss)

    def _microbatches(self, call: GradientCall, size: int, factor: Tensor) -> list[Gradient]:
        """The result for each microbatch; a rank with fewer of them repeats its last one with weight zero."""
        count = self._engine.setup.microbatches
        microbatches = batching.split(call.batch, max(1, min(count, size))) if size else [call.batch]
        results = []
        with rules.splitting(repr(self._holder.transform) if count > 1 else None):
            for i in range(count):
                if i < len(microbatches):
                    results.append(self._backward(call.replace(batch=microbatches[i]), factor, i == count - 1))
                    self._tracker.carry(results[-1].aux)
                else:
                    padding = call.replace(batch=microbatches[-1], loss_fn=zero_weight_loss(call.loss_fn, call.has_aux))
                    self._backward(padding, factor, i == count - 1)
        return results

    def _check(self, call: GradientCall) -> None:
        if _torch_compat.peek_interpreter_stack() is not None or call.engine == "func":
            raise AxisError(
                "lm.deepspeed's engine computes gradients itself, and not inside vmap or torch.func.grad. Leave out"
                ' lm.ensemble and engine="func".'
            )
        if call.summed:
            raise OrderError("a transform outside lm.deepspeed requests summed gradients, which stay in its engine.")
        params = call.params
        if not isinstance(params, Mapping) or any(params.get(name) is not p for name, p in self._params.items()):
            raise ParamsError(
                "under lm.deepspeed a loss is differentiated in the state's own params, which are the engine's:"
                " lm.value_and_grad(loss_fn)(state.params, batch)."
            )
        if self._holder.pending is not None:
            raise OrderError(
                "a second gradient was computed before the first one was applied, and the engine would add them. Under"
                " lm.deepspeed a step makes one gradient and one update; for several use lm.fsdp()."
            )

    def _backward(self, call: GradientCall, factor: Tensor, last: bool) -> Gradient:
        """The loss and aux of one microbatch, whose gradient times `factor` is added in the engine."""
        engine = self._engine
        live = {name: engine.live(name) if engine.setup.stage < 3 else p for name, p in self._params.items()}
        results: list[Any] = []
        size = batching.count(call.batch)

        def run() -> Tensor:
            with rules.inside_loss:
                objective, *values = gradient.objective_of(call.replace(summed=True), live, size)
            results.extend(values)
            if not objective.requires_grad:
                raise loss_errors.independent_of(call)
            unreached = self._holder.unreached
            key = getattr(inspect.unwrap(call.loss_fn), "__code__", None)
            if key not in unreached:
                unreached[key] = self._unreached_on_any_rank(objective)
            return _with_zero_grads(objective, [engine.live(name) for name in unreached[key]])

        with torch.enable_grad():
            objective = engine.forward(run)
            engine.backward(objective * factor.to(objective.dtype), last)
        loss, aux, scalar = results
        return Gradient(gradient.detached(loss), None, gradient.detached(aux), scalar, size)

    def _unreached_on_any_rank(self, objective: Tensor) -> list[str]:
        """The params that the loss does not reach on some rank. They need gradients of zeros there."""
        engine = self._engine
        reached = {id(leaf) for leaf in external_grads.graph_leaves(objective)}
        names = list(engine.params)
        missing = torch.tensor([float(id(engine.params[name]) not in reached) for name in names], device=self._device)
        missing = self._comm.launch(missing, "max", exact=True)()
        return [name for name, flag in zip(names, missing.tolist(), strict=True) if flag]


class EngineReducer:
    """The `GradReducer` of deepspeed: the engine sums the gradients and keeps them, so that only the stats are left."""

    in_backward = False

    def __init__(self, comm: GradComm) -> None:
        self._comm = comm
        self.flat_sums: list[Tensor] = []

    def register_hooks(self, live: Sequence[Tensor]) -> None:
        """Nothing: the engine has hooks of its own."""

    def finish(self, grads: Sequence[Tensor], stats: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """No gradients, and the sum of `stats`."""
        return [], collectives.all_reduce(stats, "sum", self._comm.group)()


class _ZeroGrads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, objective: Tensor, *params: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in params]
        return objective.view_as(objective)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like))


def _with_zero_grads(objective: Tensor, params: list[Tensor]) -> Tensor:
    """`objective`, whose backward pass adds zeros to the gradients of these params."""
    if not params:
        return objective
    result: Tensor = _ZeroGrads.apply(objective, *params)  # type: ignore[no-untyped-call]
    return result
