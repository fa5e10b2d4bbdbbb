"""`lm.deepspeed`: the step under a DeepSpeed engine, which keeps params, gradients and optimizer state by ZeRO."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import batching, gradient, rules
from lumen.core.metrics import Mean
from lumen.core.primitives import ApplyCall, Gradient, GradientCall, UpdateCall
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn, Transform, as_step, compose, slot, with_slot, without_slot
from lumen.errors import AxisError, LossError, OrderError, ParamsError, StateError
from lumen.parallel import row_shards
from lumen.parallel.comm import collectives, consistency
from lumen.parallel.comm.buckets import GradComm
from lumen.parallel.comm.mesh import Mesh
from lumen.parallel.ddp.grad_reduction import DataParallelRule, GradReduction, zero_weight_loss
from lumen.parallel.deepspeed.config import INSTEAD, Setup, read, setup, stage_of
from lumen.parallel.deepspeed.engine import Engine
from lumen.parallel.deepspeed.holder import HOLDERS, EngineHolder, EngineSlot, PendingGrads, holder_of
from lumen.parallel.deepspeed.optimizer import Update
from lumen.parallel.deepspeed.partitions import gather_span, gather_tree, shard_tree
from lumen.parallel.fsdp.shard import flat_params
from lumen.parallel.lazy_param import LazyParam, TensorProxy, empty_meta, unsharded
from lumen.parallel.optimizer_check import check_optimizer
from lumen.transforms._precision import precision

_TAKEN_OVER = ("accumulate", "precision")  # by the engine's configuration


class deepspeed(Transform):
    """Run the step under a DeepSpeed engine: ZeRO's stages 0 to 3, by DeepSpeed's own configuration.

    `config` is what DeepSpeed takes, a dict or the path of a JSON file. Offload to the host, ZeRO++, communication,
    profilers and logging go through it unchanged. The optimizer stays the state's own, any rule of `lumen.optim` that
    updates entry by entry: the engine calls it on this process's part. What is written as `lm.accumulate(k)`,
    `lm.precision(...)` and `lm.clip(norm)` becomes the engine's `gradient_accumulation_steps`, `bf16` or `fp16`, and
    `gradient_clipping`, which leaves out what `lm.optim.freeze` keeps; where the configuration says something else, an
    error names both.

    Gradients stay in the engine: what `lm.value_and_grad` gives is to be handed to `state.apply_gradients`, and raises
    `LossError` when it is read; `gradient(name)` of this transform gives one, whole. A step makes one gradient and one
    update. The engine updates in place, so the state that was handed in is dead afterwards. At stage 3 `state.params`
    are empty shells that gather when they are used. Between steps `export` gives the whole plain state on every
    process, and checkpoints hold that, so that they move to and from other strategies.

    Law: stages 0 to 3 give the params and the loss of one process on the global batch, with any parts of it, also empty
    ones, up to the order of floating sums (params are float32). Losses and `lm.Aux` are as under `lm.ddp`. A param that
    is used by some steps and not by others must be used by some process in the first one.

    Raises `ImportError` without DeepSpeed (`pip install 'lumen-torch[deepspeed]'`), `OrderError` for transforms that
    cannot stand beside an engine, `HyperparameterError` for a configuration at odds with them or with the optimizer,
    `WorldError` where processes differ.

    >>> import lumen as lm
    >>> lm.deepspeed({"zero_optimization": {"stage": 2}})
    lm.deepspeed({'zero_optimization': {'stage': 2}})
    """

    name = "deepspeed"
    level = "parallel"
    shards = True
    opaque_state = True
    incompatible = INSTEAD
    reason = "the engine computes the gradients of this process's rows, and joins them"

    def __init__(self, config: Mapping[str, Any] | str | os.PathLike[str], mesh: Mesh | None = None) -> None:
        self.config = read(config)
        self.stage = stage_of(self.config)
        self._given = mesh

    def _canonical(self) -> Mapping[str, Any]:
        return {"config": copy.deepcopy(self.config)}

    def _new_memory(self) -> EngineHolder:
        return EngineHolder(self, self._given)

    @property
    def mesh(self) -> Mesh:
        """The mesh that was given, or all processes along `data`."""
        holder: EngineHolder = self._memory
        return holder.mesh

    @property
    def engine(self) -> Any:
        """DeepSpeed's own engine, once `init` has made it: of the step that is being called, or of the only one."""
        return self._holder().used().engine

    def _holder(self) -> EngineHolder:
        if self.within is not None:
            own: EngineHolder = self._memory
            return own.other or own
        found = [holder for holder in HOLDERS.values() if holder.transform is self and holder.engine is not None]
        if len(found) > 1:
            raise StateError(
                "this lm.deepspeed(...) is part of several steps, each with an engine of its own. Ask inside the step,"
                " or make a transform for each."
            )
        return found[0] if found else self._new_memory()

    def gradient(self, name: str) -> Tensor:
        """The whole gradient of the param `name`, on every process, between `lm.value_and_grad` and the update.

        All processes must ask for it. Raises `LossError` where there is none.
        """
        holder = self._holder()
        pending, engine = holder.pending, holder.used()
        found = None if pending is None else engine.gradient(name)
        if pending is None or found is None:
            raise LossError(f"there is no gradient of {name!r} now. Ask between lm.value_and_grad and apply_gradients.")
        return found if pending.scale is None else found * pending.scale.to(found.device, found.dtype)

    def init(self, state: Any) -> Any:
        """The state held by an engine, after checking that all processes have the same; values are the first's."""
        if self.name in getattr(state, "slots", ()):
            holder_of(slot(state, self.name))
            return state
        row_shards.check(state)
        params = flat_params(state, "lm.deepspeed takes")
        check_optimizer(state.tx, "lm.deepspeed", can_gather=False)
        wrong = {str(p.dtype) for p in params.values()} - {"torch.float32"}
        if wrong:
            raise ParamsError(
                f"lm.deepspeed keeps params in float32, and some are {', '.join(sorted(wrong))}. Write net.float(), and"
                ' lm.precision("bf16") for the model to compute in bfloat16.'
            )
        scalars = [name for name, p in params.items() if not p.dim()]
        if scalars and self.stage == 3:
            raise ParamsError(
                f"ZeRO's stage 3 takes no params without dims, as {scalars[0]!r} is. Make it torch.ones(1), or use"
                ' {"zero_optimization": {"stage": 2}}.'
            )
        engine_setup = self._setup()
        holder: EngineHolder = self._memory
        if self.within is None:
            raise StateError("an engine belongs to the step that it is for. Write: state = step.init(state)")
        wire = holder.wire
        consistency.assert_same_on_all_ranks(
            consistency.fingerprint_lines(state, self.within),
            wire.group,
            holder.mesh.device,
            "the processes of lm.deepspeed",
        )
        state = consistency.broadcast(state, wire.group)
        engine = holder.hold(state, engine_setup)
        dtypes = tuple((name, p.dtype) for name, p in params.items())
        record = EngineSlot(specs=holder.specs, number=holder.number, dtypes=dtypes)
        state = state.replace(
            params={name: self._shown(holder, name) for name in params},
            opt_state=shard_tree(state.opt_state, holder.param_slots, engine.spans),
        )
        return with_slot(row_shards.shard(state, self.mesh, self.name), self.name, record)

    def export(self, state: Any) -> Any:
        """The whole plain state, in memory of its own, on every process."""
        record: EngineSlot = slot(state, self.name)
        holder = holder_of(record)
        spans = holder.used().spans
        params = {name: gather_span(spans[name].master, spans[name]).to(dtype) for name, dtype in record.dtypes}
        opt_state = gather_tree(state.opt_state, record.specs.locate(state.opt_state, ("opt_state",)), spans)
        state = row_shards.unshard(state, self.mesh)
        return without_slot(state, self.name).replace(params=params, opt_state=opt_state)

    def wrap(self, step: StepFn) -> StepFn:
        """The step by the engine; transforms inside it that the engine takes over are left out."""
        inner = as_step(step)
        given = inner.transforms
        if any(t.name in _TAKEN_OVER for t in given):
            inner = compose(*[t for t in given if t.name not in _TAKEN_OVER])(inner.user)
        setup(self.config, (self, *given))  # what cannot stand here is told at once

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            if rules.is_tracing():
                raise OrderError("lm.compile cannot trace lm.deepspeed's engine. Leave lm.compile() out.")
            own: EngineHolder = self._memory
            holder = holder_of(slot(state, self.name))
            own.other = None if holder is own else holder
            rule = _Rule(self, holder, state)
            handlers: dict[Primitive, Rule] = {
                Primitive.APPLY: functools.partial(self._apply, rule, holder.used()),
                Primitive.GRADIENT: rule,
                Primitive.UPDATE: functools.partial(self._update, holder),
            }
            with holder.mesh.bound(), rules.rule_context(handlers):
                return inner(state, batch)

        # How products of float32 matrices are computed is torch's setting, of which an engine knows nothing.
        hosted: StepFn = row_shards.checked(run, lambda: self.mesh)
        for each in given:
            hosted = each.wrap_host(hosted) if isinstance(each, precision) else hosted
        return hosted

    def _setup(self) -> Setup:
        around = () if self.within is None else self.within.transforms
        return setup(self.config, around)

    def _shown(self, holder: EngineHolder, name: str) -> Tensor:
        """The param as it stands in the state."""
        engine = holder.used()
        return engine.live(name).detach() if self.stage < 3 else PartitionedParam.of(holder, name, engine.params[name])

    # The three primitives.

    def _apply(self, rule: DataParallelRule, engine: Engine, next: Next, call: ApplyCall) -> Any:
        return rule.apply(functools.partial(self._cast, engine, next), call)

    def _cast(self, engine: Engine, next: Next, call: ApplyCall) -> Any:
        casts = engine.setup.casts
        if casts is None:
            return self._applied(engine, next, call)
        return casts.apply(functools.partial(self._applied, engine, next), call)

    def _applied(self, engine: Engine, next: Next, call: ApplyCall) -> Any:
        params = call.params
        if self.stage < 3:
            return next(call)
        if params.keys() == engine.params.keys() and all(isinstance(p, PartitionedParam) for p in params.values()):
            return engine.run(call.target, call.buffers, call.args, call.kwargs)
        return next(call.replace(params={name: unsharded(p) for name, p in params.items()}))

    def _update(self, holder: EngineHolder, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        pending, engine = holder.pending, holder.used()
        if pending is None or call.grads is not pending.grads:
            raise LossError(
                "under lm.deepspeed state.apply_gradients takes the very grads that lm.value_and_grad gave in this"
                " step: the engine holds them, and applies them as they are. To change gradients use lm.fsdp()."
            )
        limit = engine.setup.clip
        unused_fn = getattr(call.tx, "unused_fn", None)
        if limit and unused_fn is not None:
            unused = tree.unflatten(tree.structure(call.params), unused_fn(call.params))
            engine.drop_gradients([name for name in unused if unused[name]])
        if limit and pending.scale is not None:
            limit /= float(pending.scale)
        scale = pending.scale
        if self.stage == 0 and scale is not None:  # where the engine bounds the params' own gradients
            for p in engine.params.values():
                p.grad.mul_(scale.to(p.device, p.dtype))  # type: ignore[union-attr]
            limit, scale = engine.setup.clip, None
        engine.adapter.begin(Update(call.tx, call.opt_state, holder.param_slots, engine.spans, scale))
        try:
            engine.step(limit)
        finally:
            opt_state = engine.adapter.end()
        holder.pending = None
        return call.params, opt_state


_DESCRIBING = {
    Tensor._version.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
}


class PartitionedParam(LazyParam):
    """A param of stage 3 as it stands in a state."""

    form = LazyParam.form | _DESCRIBING


class EngineGrad(TensorProxy):
    """The gradient of one param, of which only the form is known; the engine `does` the work of some transforms."""

    form = TensorProxy.form | _DESCRIBING
    does = ("clip",)

    @classmethod
    def answered(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Nothing: it is held elsewhere."""
        raise LossError(
            "a gradient was read that DeepSpeed's engine holds, in parts. Hand grads to state.apply_gradients as they"
            " are. To read one: strategy = lm.deepspeed(...), and inside the step, on every process,"
            ' strategy.gradient("head.weight"); its norm: strategy.engine.get_global_grad_norm() after the update.'
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<a gradient of shape {tuple(self.shape)}, held by DeepSpeed's engine>"


class _Rule(DataParallelRule):
    """What deepspeed makes of each P1 call of one step."""

    def __init__(self, transform: deepspeed, holder: EngineHolder, state: Any) -> None:
        super().__init__(holder.wire, "merge", state, holder.checks)
        self._transform, self._holder = transform, holder
        self._engine, self._params = holder.used(), state.params

    def __call__(self, next: Next, call: GradientCall) -> Gradient:
        self._check(call)
        size = batching.count(call.batch)
        reduction = GradReduction(self._comm, EngineReducer(self._comm), size, self, self._device)
        everyone = self._comm.launch(torch.tensor(float(size), device=self._device), exact=True)()
        call = self._prepared_call(call, size)
        each = self._comm.size / everyone  # the engine takes the mean over processes
        answers = []
        count = self._engine.setup.microbatches
        parts = batching.split(call.batch, max(1, min(count, size))) if size else [call.batch]
        with rules.splitting(repr(self._transform) if count > 1 else None):
            for place in range(count):
                if place < len(parts):
                    answers.append(self._backward(call.replace(batch=parts[place]), each, place == count - 1))
                    self._tracker.carry(answers[-1].aux)
                else:
                    idle = call.replace(batch=parts[-1], loss_fn=zero_weight_loss(call.loss_fn, call.has_aux))
                    self._backward(idle, each, place == count - 1)
        answer = batching.add_gradients(answers, self._tracker.origins)
        if not size:
            answer = answer.replace(aux=self._neutral_aux(answer.aux))
        answer = reduction.finish(answer.replace(grads={}))
        loss = answer.loss
        assert isinstance(loss, Mean)
        pending = PendingGrads(
            {name: _unread(p) for name, p in self._params.items()},
            None if answer.scalar else everyone / loss.weight,
        )
        self._holder.pending = pending
        return answer.replace(grads=pending.grads, loss=loss.compute() if answer.scalar else loss)

    def _check(self, call: GradientCall) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None or call.engine == "func":
            raise AxisError(
                "lm.deepspeed's engine differentiates by itself, and not inside vmap or torch.func.grad. Leave out"
                ' lm.ensemble and engine="func".'
            )
        if call.summed:
            raise OrderError("a transform outside lm.deepspeed asks for summed gradients, which its engine keeps.")
        params = call.params
        if not isinstance(params, Mapping) or any(params.get(name) is not p for name, p in self._params.items()):
            raise ParamsError(
                "under lm.deepspeed a loss is differentiated in the state's own params, which the engine holds:"
                " lm.value_and_grad(loss_fn)(state.params, batch)."
            )
        if self._holder.pending is not None:
            raise OrderError(
                "a second gradient was asked for before the first one was applied, and the engine would add them. Under"
                " lm.deepspeed a step makes one gradient and one update; for several use lm.fsdp()."
            )

    def _backward(self, call: GradientCall, each: Tensor, last: bool) -> Gradient:
        """The gradient of one microbatch, left in the engine; its loss and aux."""
        engine, transform = self._engine, self._transform
        live = {name: engine.live(name) if transform.stage < 3 else p for name, p in self._params.items()}
        found: list[Any] = []
        size = batching.count(call.batch)

        def run() -> Tensor:
            with rules.inside_loss:
                objective, *rest = gradient.objective_of(call.replace(summed=True), live, size)
            found.extend(rest)
            if not objective.requires_grad:
                raise gradient.independent_of(call)
            missing = self._holder.unreached
            key = getattr(inspect.unwrap(call.loss_fn), "__code__", None)
            if key not in missing:
                missing[key] = self._agreed(objective)
            return _tied(objective, [engine.live(name) for name in missing[key]])

        with torch.enable_grad():
            objective = engine.forward(run)
            engine.backward(objective * each.to(objective.dtype), last)
        loss, aux, scalar = found
        return Gradient(gradient.detached(loss), None, gradient.detached(aux), scalar, size)

    def _agreed(self, objective: Tensor) -> list[str]:
        """The params that the loss does not reach on some process, and that must have gradients all the same."""
        engine = self._engine
        reached = {id(leaf) for leaf in gradient.graph_leaves(objective)}
        names = list(engine.params)
        missing = torch.tensor([float(id(engine.params[name]) not in reached) for name in names], device=self._device)
        missing = self._comm.launch(missing, "max", exact=True)()
        return [name for name, flag in zip(names, missing.tolist(), strict=True) if flag]


class EngineReducer:
    """The `GradReducer` of deepspeed: the engine sums the gradients and keeps them, so that the tail alone is left."""

    in_backward = False

    def __init__(self, comm: GradComm) -> None:
        self._comm = comm
        self.flat_sums: list[Tensor] = []

    def register_hooks(self, live: Sequence[Tensor]) -> None:
        """Nothing: the engine has hooks of its own."""

    def finish(self, grads: Sequence[Tensor], tail: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """No gradients, and the sum of `tail`."""
        return [], collectives.all_reduce(tail, "sum", self._comm.group)()


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, objective: Tensor, *params: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in params]
        return objective.view_as(objective)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like))


def _tied(objective: Tensor, params: list[Tensor]) -> Tensor:
    """`objective`, which gives these params a gradient of zeros beside what else they may have."""
    if not params:
        return objective
    tied: Tensor = _Tie.apply(objective, *params)  # type: ignore[no-untyped-call]
    return tied


def _unread(like: Tensor) -> Tensor:
    made: Tensor = torch.Tensor._make_subclass(EngineGrad, empty_meta(like.shape, like.dtype), False)
    return made
