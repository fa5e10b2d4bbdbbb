"""`lm.tensor_parallel`: single matrices sharded over ranks, which compute each row together."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat, pending_weights, rules, sharding
from lumen.core.primitives import ApplyCall, Gradient, GradientCall, LossFn, WrappedLoss
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.sharding import REPLICATED, LeafSpec, ShardSpec, SpecTree
from lumen.core.step import StepFn, Transform, as_step, device_of, slot, with_slot, without_slot
from lumen.errors import (
    AxisError,
    HyperparameterError,
    OrderError,
    StateError,
)
from lumen.parallel import row_shards
from lumen.parallel.comm import consistency
from lumen.parallel.comm.mesh import Mesh
from lumen.parallel.fsdp.shard import flat_params
from lumen.parallel.lazy_param import LazyParam, unsharded
from lumen.parallel.optimizer_check import check_optimizer
from lumen.parallel.row_reducer import row_reducer
from lumen.parallel.tensor.autograd_collectives import TPGroup
from lumen.parallel.tensor.layers import FullParamView, shard_modules
from lumen.parallel.tensor.layout import (
    Plan,
    gather_tree,
    param_layouts,
    shard_spec,
    shard_specs,
    shard_tree,
)
from lumen.parallel.tensor.rank_checks import check_buffers, check_rows, has_dropout, share_generator
from lumen.parallel.tensor.runtime import TensorSharding, TPRuntime
from lumen.parallel.tensor.styles import Style


class tensor_parallel(Transform):
    """Shard single matrices over the ranks along the mesh's `tensor` axis, which compute the same rows together.

    `plan` gives modules a style by patterns of their names: `Colwise()`, `Rowwise()`, `SequenceParallel()` and
    `Region()` of `lm.parallel`, or a ready plan of `lm.parallel.plans`. Modules that it does not name are replicated.
    It shards `nn.Linear`, `nn.Embedding` and Hugging Face's `Conv1D`, whose forward is replaced by one that computes
    on shards. Other code that reads a sharded param, such as the loss function, gets the full param, which is gathered
    at that moment.

    `init` shards the tensors of the first rank along the axis, also frozen params and the optimizer's state. Inside the
    step params and grads are this rank's shards, plain tensors. `export` gathers them. All ranks along `tensor` must
    receive the same rows, as `lm.Loader` provides them. Rows are divided over the mesh's other axes by `lm.ddp` or
    `lm.fsdp` outside, on the same mesh: `lm.fsdp(mesh)(lm.tensor_parallel(plan, mesh)(step))`.

    Law: params, loss and metrics are those of one process, up to the order of floating-point sums. Dropout masks differ
    from single-process training: all ranks of the axis draw from the generator of the first rank, whose state is sent
    at the start of a step of a model with dropout. So replicated activations are the same everywhere, and each shard
    (of heads, features or a sequence) has the same mask.

    Raises, on every rank: `PatternError` for a pattern that matches nothing, a module that two patterns match, and tied
    weights with two layouts; `ParamsError` for sizes that the axis does not divide and layers that cannot be sharded;
    `HyperparameterError` for optimizers that need full tensors; `WorldError` where states, meshes or the buffers after
    the first step differ; `OrderError` for transforms that cannot be around it or inside it; `BatchError` where the
    first rows differ along the axis.

    >>> import lumen as lm
    >>> from lumen.parallel import Colwise, Rowwise
    >>> from lumen.parallel.tensor.tensor_parallel import tensor_parallel
    >>> tensor_parallel({"mlp.up": Colwise(), "mlp.down": Rowwise()})
    lm.tensor_parallel({'mlp.up': Colwise(), 'mlp.down': Rowwise()})
    """

    name = "tensor_parallel"
    level = "tensor"
    shards = True
    reads_pending = True
    reason = "rows are divided over groups of ranks, each of which computes its rows together"

    def __init__(self, plan: Plan, mesh: Mesh | None = None) -> None:
        if not isinstance(plan, Mapping) or not plan or not all(isinstance(s, Style) for s in plan.values()):
            raise HyperparameterError(
                f"tensor_parallel takes a plan, a dict of styles by patterns of module names, not {plan!r:.200}. Write"
                ' lm.tensor_parallel({"*.up": Colwise(), "*.down": Rowwise()}), or a plan of lm.parallel.plans.'
            )
        self.plan = dict(plan)
        self._mesh = mesh

    def _canonical(self) -> Mapping[str, Any]:
        return {"plan": dict(self.plan)}

    def _new_memory(self) -> TPRuntime:
        return TPRuntime(self._mesh, self.plan)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the constructor, by default all ranks along `tensor`."""
        runtime: TPRuntime = self._memory
        return runtime.mesh

    @property
    def tp_group(self) -> TPGroup | None:
        """The ranks along `tensor`; None where nothing is sharded."""
        runtime: TPRuntime = self._memory
        return runtime.tp_group

    def init(self, state: Any) -> Any:
        """This rank's shards of the first rank's state, after a check that all along `tensor` have the same."""
        flat_params(state, "lm.tensor_parallel shards")
        tp_group = self.tp_group
        if self.name in getattr(state, "slots", ()):
            return self._prepared(state)
        row_shards.check(state)
        if tp_group is not None:
            lines = consistency.fingerprint_lines(state, self.within)
            lines += [f"the plan's {pattern} is {style!r}" for pattern, style in self.plan.items()]
            consistency.assert_same_on_all_ranks(
                lines, tp_group.group, device_of(state), "the processes of lm.tensor_parallel"
            )
        layouts = param_layouts(
            state.apply_fn.module, self._memory.styles(state.apply_fn), 1 if tp_group is None else tp_group.size
        )
        row_reducer(self, self.mesh, "lm.tensor_parallel(plan, mesh)")
        is_pending = pending_weights.source_of(state) is not None
        if tp_group is None:
            return _with_weights(self, state, {}) if is_pending and not _is_read_outside(self) else state
        check_optimizer(state.tx, "lm.tensor_parallel", can_gather=False)
        specs = SpecTree.of(state, layouts)
        if is_pending:
            state = _with_weights(self, state, layouts)
        else:
            state = shard_tree(tp_group, consistency.broadcast(state, tp_group.group), specs)
        return with_slot(state, self.name, TensorSharding(specs=specs, size=tp_group.size))

    def _prepared(self, state: Any) -> Any:
        """A state that `init` has returned before, unchanged."""
        size = 1 if self.tp_group is None else self.tp_group.size
        layouts = param_layouts(state.apply_fn.module, self._memory.styles(state.apply_fn), size)
        record: TensorSharding = slot(state, self.name)
        if record.size != size or record.specs.params != layouts:
            raise StateError(
                f"this state was sharded over {record.size} ranks along tensor, or by another plan than {self!r} over"
                f" {size}. Gather it with the step that prepared it: state = step.export(state)"
            )
        return state

    def export(self, state: Any) -> Any:
        """The full state, on every rank."""
        tp_group = self.tp_group
        if tp_group is None:
            return state
        return gather_tree(tp_group, without_slot(state, self.name), slot(state, self.name).specs)

    def shard_specs(self, state: Any) -> dict[int, ShardSpec]:
        """What this rank has of each leaf that is laid out like a param; replicated ones are written by one rank.

        Where `lm.fsdp` outside shards a leaf once more, its spec is relative to this one.
        """
        tp_group = self.tp_group
        if tp_group is None:
            return {}
        specs = shard_specs(state, slot(state, self.name).specs, tp_group.size, tp_group.index)
        mesh = self.mesh
        first = not any(mesh.index(axis) for axis in ("data", "shard"))
        around = () if self.within is None else self.within.transforms
        outer = {index for t in around if t is not self and t.shards for index in t.shard_specs(state)}
        return {index: spec._replace(owner=spec.owner and (first or index in outer)) for index, spec in specs.items()}

    def wrap(self, step: StepFn) -> StepFn:
        """The step with its model computed on shards."""
        _check_inside(as_step(step).transforms)

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            runtime: TPRuntime = self._memory
            tp_group = runtime.tp_group
            if tp_group is None:
                return step(state, batch)
            _check_eager()
            layouts, view = runtime.layouts(slot(state, self.name))
            handlers: dict[Primitive, Rule] = {
                Primitive.APPLY: functools.partial(self._apply, runtime, layouts, view),
                Primitive.GRADIENT: functools.partial(_gradient, runtime, view),
            }
            with rules.rule_context(handlers), sharding.bound(_Shards(tp_group, view.layouts)):
                if self._is_alone():
                    with runtime.mesh.bound():
                        return step(state, batch)
                return step(state, batch)

        return run

    def wrap_host(self, step: StepFn) -> StepFn:
        """The step with checks, once, of rows and buffers along `tensor`, and with the first rank's random numbers."""
        checked = False

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            nonlocal checked
            tp_group = self.tp_group
            if tp_group is None:
                return step(state, batch)
            first, checked = not checked, True
            if first:
                check_rows(tp_group, batch, device_of(state))
            if has_dropout(state.apply_fn.module):
                share_generator(tp_group, device_of(state))
            new, metrics = step(state, batch)
            if first:
                check_buffers(tp_group, new)
            return new, metrics

        return run

    def _is_alone(self) -> bool:
        """Whether no transform outside has bound the axes of the mesh."""
        return rules.axis("tensor") is None

    def _apply(
        self, runtime: TPRuntime, layouts: Mapping[str, LeafSpec], view: FullParamView, next: Next, call: ApplyCall
    ) -> Any:
        """APPLY: run the model on the shards of its params."""
        if not call.params.keys() <= layouts.keys() or not {*call.params, *call.buffers} >= layouts.keys():
            return next(call.replace(params={k: unsharded(p) for k, p in call.params.items()}))
        params = {name: _shard_of(view, name, p) for name, p in call.params.items()}
        change = shard_modules(runtime.forward_context, view, runtime.styles(call.target))
        target = call.target.variant((self.name, runtime), change)
        try:
            return next(call.replace(target=target, params=params))
        finally:
            runtime.forward_context.leave()


class _Shards:
    """The `lumen.core.sharding.Shards` of the ranks along `tensor`: replicated params are the same on all of them."""

    def __init__(self, tp_group: TPGroup, layouts: Mapping[str, LeafSpec]) -> None:
        self._tp_group, self._layouts = tp_group, layouts
        self.reduce = tp_group.reduce

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Whether this rank adds `leaf` to a sum over all entries."""
        return self._tp_group.index == 0 or path in self._layouts


def _shard_of(view: FullParamView, name: str, param: Tensor) -> Tensor:
    """This rank's shard of a param, also of one that the loss function computed from full params."""
    if isinstance(param, LazyParam) and param.source is view:
        return param.shard
    layout = view.layouts.get(name)
    if layout is None or param.shape != torch.Size(layout.shape):
        return param
    return view.tp_group.slice(param, layout.dim, layout.groups)


def _gradient(runtime: TPRuntime, view: FullParamView, next: Next, call: GradientCall) -> Gradient:
    """GRADIENT: the loss function gets full params, which are gathered if it reads them."""
    if not isinstance(call.params, Mapping) or call.params.keys().isdisjoint(view.layouts):
        return next(call)  # type: ignore[no-any-return]

    def with_full_params(loss_fn: LossFn) -> LossFn:
        def run(params: Any, *args: Any) -> Any:
            return loss_fn({name: _lazy_param(view, name, p) for name, p in params.items()}, *args)

        return WrappedLoss(loss_fn, run, with_full_params)

    try:
        return next(call.replace(loss_fn=with_full_params(call.loss_fn)))  # type: ignore[no-any-return]
    finally:
        runtime.forward_context.leave()  # recomputing a layer in the backward pass enters its region again


def _with_weights(transform: tensor_parallel, state: Any, layouts: Mapping[str, LeafSpec]) -> Any:
    """`state` with this rank's shards of weights that are still in files."""
    tp_group, device = transform.tp_group, transform.mesh.device
    specs = {
        name: shard_spec(spec, tp_group.size, tp_group.index)
        for name, spec in layouts.items()
        if tp_group is not None and spec.dim != REPLICATED
    }
    values = pending_weights.read(state, specs, lambda shard: shard.to(device))
    within = () if transform.within is None else transform.within.transforms
    return pending_weights.filled(state, values, within[within.index(transform) + 1 :] if transform in within else ())


def _is_read_outside(transform: tensor_parallel) -> bool:
    """Whether a transform outside reads weights that are still in files."""
    around = () if transform.within is None else transform.within.transforms
    return any(t.reads_pending for t in around[: around.index(transform)]) if transform in around else False


def _lazy_param(view: FullParamView, name: str, param: Tensor) -> Tensor:
    layout = view.layouts.get(name)
    is_shard = layout is not None and param.shape != torch.Size(layout.shape)
    return LazyParam.of(view, name, param) if is_shard else param


def _check_eager() -> None:
    if rules.is_tracing():
        raise OrderError("lm.compile cannot trace lm.tensor_parallel, which runs eagerly. Leave lm.compile out.")
    if _torch_compat.peek_interpreter_stack() is not None:
        raise AxisError(
            "lm.tensor_parallel communicates between ranks, which is impossible for the lanes of lm.ensemble or"
            " vmap around a step. Train one model under lm.tensor_parallel."
        )


def _check_inside(transforms: Sequence[Transform]) -> None:
    for inner in transforms:
        if inner.level == "dp_sgd":
            raise OrderError(
                f"{inner!r} under lm.tensor_parallel would bound each example's gradient by its shard on one rank."
                " Train it without, under lm.accumulate for large batches."
            )
        if getattr(inner, "auto", False):
            raise OrderError(
                f"{inner!r} under lm.tensor_parallel would retry on the rank that ran out of memory alone. Give a"
                " number: lm.accumulate(2)."
            )
