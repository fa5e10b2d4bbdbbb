"""`lm.deepspeed`: the step under a DeepSpeed engine, which shards params, gradients and optimizer state by ZeRO."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core.primitives import ApplyCall, UpdateCall
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn, Transform, as_step, compose, slot, with_slot, without_slot
from lumen.errors import LossError, OrderError, ParamsError, StateError
from lumen.parallel import row_shards
from lumen.parallel.comm import consistency
from lumen.parallel.comm.mesh import Mesh
from lumen.parallel.ddp.grad_reduction import DataParallelRule
from lumen.parallel.deepspeed.config import INSTEAD, Setup, read, setup, stage_of
from lumen.parallel.deepspeed.engine import Engine
from lumen.parallel.deepspeed.grad_reduction import EngineRule
from lumen.parallel.deepspeed.holder import HOLDERS, EngineHolder, EngineSlot, holder_of
from lumen.parallel.deepspeed.optimizer import Update
from lumen.parallel.deepspeed.partitions import gather_span, gather_tree, shard_tree
from lumen.parallel.deepspeed.proxies import PartitionedParam
from lumen.parallel.fsdp.shard import flat_params
from lumen.parallel.lazy_param import unsharded
from lumen.parallel.optimizer_check import check_optimizer
from lumen.transforms._precision import precision

_BY_ENGINE = ("accumulate", "precision")  # transforms that become part of the engine's configuration


class deepspeed(Transform):
    """Run the step under a DeepSpeed engine: ZeRO's stages 0 to 3, by DeepSpeed's own configuration.

    `config` is what DeepSpeed takes, a dict or the path of a JSON file. Offload to the host, ZeRO++, communication,
    profilers and logging go through it unchanged. The optimizer stays the state's own, any rule of `lumen.optim` that
    updates entry by entry: the engine calls it on this rank's shards. `lm.accumulate(k)`, `lm.precision(...)` and
    `lm.clip(norm)` set the engine's `gradient_accumulation_steps`, `bf16` or `fp16`, and `gradient_clipping`, whose
    norm leaves out params that `lm.optim.freeze` freezes. If the configuration sets another value, the error names
    both.

    Gradients stay in the engine. Pass the result of `lm.value_and_grad` to `state.apply_gradients`; reading it raises
    `LossError`, and `gradient(name)` of this transform returns one full gradient. A step computes one gradient and one
    update. The engine updates in place, so the input state cannot be used afterwards. At stage 3 `state.params` have no
    memory and are gathered where they are used. Between steps `export` returns the full plain state on every rank.
    Checkpoints store that, so they can be restored under other strategies.

    Law: stages 0 to 3 give the params and the loss of one process on the global batch, for any shares of it, also empty
    ones, up to the order of floating-point sums (params are float32). Losses and `lm.Aux` are as under `lm.ddp`. A
    param that is used in some steps only must be used by some rank in the first one.

    Raises `ImportError` without DeepSpeed (the extra `[deepspeed]`), `OrderError` for transforms that
    cannot be combined with an engine, `HyperparameterError` for a configuration that contradicts them or the optimizer,
    `WorldError` where ranks differ.

    >>> import lumen as lm
    >>> lm.deepspeed({"zero_optimization": {"stage": 2}})
    lm.deepspeed({'zero_optimization': {'stage': 2}})
    """

    name = "deepspeed"
    level = "parallel"
    shards = True
    opaque_state = True
    incompatible = INSTEAD
    reason = "the engine computes the gradients of this rank's rows, and reduces them"

    def __init__(self, config: Mapping[str, Any] | str | os.PathLike[str], mesh: Mesh | None = None) -> None:
        self.config = read(config)
        self.stage = stage_of(self.config)
        self._mesh = mesh

    def _canonical(self) -> Mapping[str, Any]:
        return {"config": copy.deepcopy(self.config)}

    def _new_memory(self) -> EngineHolder:
        return EngineHolder(self, self._mesh)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the constructor, by default all ranks along `data`."""
        holder: EngineHolder = self._memory
        return holder.mesh

    @property
    def engine(self) -> Any:
        """DeepSpeed's own engine, once `init` has created it: that of the step that is running, or the only one."""
        return self._holder().require_engine().engine

    def _holder(self) -> EngineHolder:
        if self.within is not None:
            own: EngineHolder = self._memory
            return own.other or own
        holders = [holder for holder in HOLDERS.values() if holder.transform is self and holder.engine is not None]
        if len(holders) > 1:
            raise StateError(
                "several steps have this lm.deepspeed(...), each with its own engine. Use it inside the step, or create"
                " a transform for each."
            )
        return holders[0] if holders else self._new_memory()

    def gradient(self, name: str) -> Tensor:
        """The full gradient of the param `name`, on every rank, between `lm.value_and_grad` and the update.

        All ranks must call it. Raises `LossError` where there is none.
        """
        holder = self._holder()
        pending, engine = holder.pending, holder.require_engine()
        grad = None if pending is None else engine.gradient(name)
        if pending is None or grad is None:
            raise LossError(
                f"there is no gradient of {name!r} now. Call this between lm.value_and_grad and apply_gradients."
            )
        return grad if pending.scale is None else grad * pending.scale.to(grad.device, grad.dtype)

    def init(self, state: Any) -> Any:
        """The state in an engine, with the first rank's values, after a check that all ranks have the same."""
        if self.name in getattr(state, "slots", ()):
            holder_of(slot(state, self.name))
            return state
        row_shards.check(state)
        params = flat_params(state, "lm.deepspeed shards")
        check_optimizer(state.tx, "lm.deepspeed", can_gather=False)
        _check_params(params, self.stage)
        engine_setup = self._setup()
        holder: EngineHolder = self._memory
        if self.within is None:
            raise StateError("an engine belongs to a step. Write: state = step.init(state)")
        comm = holder.comm
        consistency.assert_same_on_all_ranks(
            consistency.fingerprint_lines(state, self.within),
            comm.group,
            holder.mesh.device,
            "the processes of lm.deepspeed",
        )
        state = consistency.broadcast(state, comm.group)
        engine = holder.hold(state, engine_setup)
        dtypes = tuple((name, p.dtype) for name, p in params.items())
        record = EngineSlot(specs=holder.specs, number=holder.number, dtypes=dtypes)
        state = state.replace(
            params={name: self._state_param(holder, name) for name in params},
            opt_state=shard_tree(state.opt_state, holder.param_slots, engine.spans),
        )
        return with_slot(row_shards.shard(state, self.mesh, self.name), self.name, record)

    def export(self, state: Any) -> Any:
        """The full plain state, in new memory, on every rank."""
        record: EngineSlot = slot(state, self.name)
        holder = holder_of(record)
        spans = holder.require_engine().spans
        params = {name: gather_span(spans[name].master, spans[name]).to(dtype) for name, dtype in record.dtypes}
        opt_state = gather_tree(state.opt_state, record.specs.locate(state.opt_state, ("opt_state",)), spans)
        state = row_shards.unshard(state, self.mesh)
        return without_slot(state, self.name).replace(params=params, opt_state=opt_state)

    def wrap(self, step: StepFn) -> StepFn:
        """The step by the engine, without the transforms inside whose work the engine does."""
        inner = as_step(step)
        inside = inner.transforms
        if any(t.name in _BY_ENGINE for t in inside):
            inner = compose(*[t for t in inside if t.name not in _BY_ENGINE])(inner.user)
        setup(self.config, (self, *inside))  # raises for transforms that cannot be inside

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            if rules.is_tracing():
                raise OrderError("lm.compile cannot trace lm.deepspeed's engine. Leave lm.compile() out.")
            own: EngineHolder = self._memory
            holder = holder_of(slot(state, self.name))
            own.other = None if holder is own else holder
            rule = EngineRule(holder, state)
            handlers: dict[Primitive, Rule] = {
                Primitive.APPLY: functools.partial(self._apply, rule, holder.require_engine()),
                Primitive.GRADIENT: rule,
                Primitive.UPDATE: functools.partial(_update, holder, self.stage),
            }
            with holder.mesh.bound(), rules.rule_context(handlers):
                return inner(state, batch)

        # The precision of float32 matrix products is a setting of torch's, which an engine does not make.
        hosted: StepFn = row_shards.checked(run, lambda: self.mesh)
        for transform in inside:
            hosted = transform.wrap_host(hosted) if isinstance(transform, precision) else hosted
        return hosted

    def _setup(self) -> Setup:
        around = () if self.within is None else self.within.transforms
        return setup(self.config, around)

    def _state_param(self, holder: EngineHolder, name: str) -> Tensor:
        """The param as the state has it."""
        engine = holder.require_engine()
        return engine.live(name).detach() if self.stage < 3 else PartitionedParam.of(holder, name, engine.params[name])

    # The three primitives.

    def _apply(self, rule: DataParallelRule, engine: Engine, next: Next, call: ApplyCall) -> Any:
        return rule.apply(functools.partial(self._cast, engine, next), call)

    def _cast(self, engine: Engine, next: Next, call: ApplyCall) -> Any:
        casts = engine.setup.casts
        if casts is None:
            return self._run_model(engine, next, call)
        return casts.apply(functools.partial(self._run_model, engine, next), call)

    def _run_model(self, engine: Engine, next: Next, call: ApplyCall) -> Any:
        params = call.params
        if self.stage < 3:
            return next(call)
        if params.keys() == engine.params.keys() and all(isinstance(p, PartitionedParam) for p in params.values()):
            return engine.run(call.target, call.buffers, call.args, call.kwargs)
        return next(call.replace(params={name: unsharded(p) for name, p in params.items()}))


def _check_params(params: Mapping[str, Tensor], stage: int) -> None:
    wrong = {str(p.dtype) for p in params.values()} - {"torch.float32"}
    if wrong:
        raise ParamsError(
            f"lm.deepspeed keeps params in float32, and some are {', '.join(sorted(wrong))}. Write net.float(), and"
            ' lm.precision("bf16") for the model to compute in bfloat16.'
        )
    scalars = [name for name, p in params.items() if not p.dim()]
    if scalars and stage == 3:
        raise ParamsError(
            f"ZeRO's stage 3 takes no params without dims, as {scalars[0]!r} is. Make it torch.ones(1), or use"
            ' {"zero_optimization": {"stage": 2}}.'
        )


def _update(holder: EngineHolder, stage: int, next: Next, call: UpdateCall) -> tuple[Any, Any]:
    pending, engine = holder.pending, holder.require_engine()
    if pending is None or call.grads is not pending.grads:
        raise LossError(
            "under lm.deepspeed state.apply_gradients takes the very grads that lm.value_and_grad returned in"
            " this step: their values are in the engine, which applies them unchanged. To change gradients use"
            " lm.fsdp()."
        )
    limit = engine.setup.clip
    unused_fn = getattr(call.tx, "unused_fn", None)
    if limit and unused_fn is not None:
        unused = tree.unflatten(tree.structure(call.params), unused_fn(call.params))
        engine.drop_gradients([name for name in unused if unused[name]])
    if limit and pending.scale is not None:
        limit /= float(pending.scale)
    scale = pending.scale
    if stage == 0 and scale is not None:  # where the engine clips the params' own gradients
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
