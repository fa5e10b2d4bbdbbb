"""`lm.fsdp`: params, gradients and optimizer state sharded over ranks, each of which computes its own rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor

from lumen import tree
from lumen.core import pending_weights, rules, sharding
from lumen.core.annotations import integer_of
from lumen.core.nested_states import map_train_states, train_states
from lumen.core.param_leaves import Path
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.rules import Primitive, Rule
from lumen.core.sharding import REPLICATED, LeafSpec, ShardingSlot, ShardSpec, SpecTree
from lumen.core.step import StepFn, Transform, as_step, slot, with_slot, without_slot
from lumen.errors import HyperparameterError, OrderError, StateError
from lumen.parallel import row_shards
from lumen.parallel.comm import consistency
from lumen.parallel.comm.mesh import Mesh
from lumen.parallel.ddp.aux_reduction import BufferChecks
from lumen.parallel.fsdp import cpu_offload as offload
from lumen.parallel.fsdp.apply_rule import apply_sharded
from lumen.parallel.fsdp.frozen_params import FrozenParams, plain_frozen
from lumen.parallel.fsdp.grad_reduction import FSDPRule, unit_reducer
from lumen.parallel.fsdp.meta_init import (
    Initialize,
    Keep,
    begins_on_meta,
    init_from_meta,
    make_keep_fn,
    materialize,
    read_pending,
    reset,
)
from lumen.parallel.fsdp.runtime import FSDPRuntime
from lumen.parallel.fsdp.shard import (
    Sharded,
    ShardLayout,
    flat_params,
    gather_tree,
    shard_specs,
    shard_tree,
)
from lumen.parallel.fsdp.sharded_states import ShardedStates
from lumen.parallel.fsdp.sharded_update import update_shards
from lumen.parallel.fsdp.stage_params import apply_gathered, check_pipeline, has_pipeline
from lumen.parallel.fsdp.unit_plan import UnitPlans
from lumen.parallel.optimizer_check import check_optimizer
from lumen.parallel.row_reducer import check_context


@pytree_dataclass
class Sharding(ShardingSlot):
    """The slot of `fsdp`, all static: the specs of the state's leaves, over how many ranks they are sharded, the stage.

    At stages 1 and 2 only leaves of the optimizer's state are sharded. At stage 3 the specs of frozen params are among
    those of the params, and their leaves among the buffers.
    """

    specs: SpecTree = static()
    size: int = static()
    stage: int = static()


class fsdp(Transform):
    """Shard params, gradients and optimizer state over ranks (ZeRO); each rank computes its own rows.

    `stage` is that of ZeRO: 1 shards the optimizer state alone, 2 the gradients too, 3 the params as well, also frozen
    ones (`requires_grad=False`), which are among the state's buffers. `init` shards each tensor of the first rank's
    state along its first dim, in the layout of DTensor's `Shard(0)`: the last shards may be shorter, or empty. Tensors
    without dims stay full. Of an `lm.row_field()` each rank keeps the rows that it receives of a batch. Inside the
    step, params and grads of stage 3 are this rank's shards, plain tensors, on which the optimizer runs. `export`
    gathers the full state on every rank.

    Modules see full params. Those of a unit are all-gathered when the unit runs, freed afterwards, and all-gathered
    again for its backward pass, which reduce-scatters the gradients of those that are trained. `wrap` is one or more
    patterns of module names, by default the repeated blocks of the model's lists and sequences. All other modules form
    the root unit, which is full from the start of the forward pass to the end of the backward pass. `prefetch` is the
    number of units that are all-gathered ahead of time. A param that is read by the loss function, or by a module
    outside its unit, is gathered at that moment, and so is a frozen one that is read from `state.buffers`.
    `param_dtype="bf16"` sends float32 params in half the bytes, and frozen ones as they are. Declared change: params
    are rounded; gradients are summed in float32.

    With `offload`, shards of params, gradients and optimizer state are kept on the host (pinned for a GPU), where the
    optimizer runs. A unit's shards are copied to the device before they are gathered, and its gradients' shards are
    copied back in the backward pass. The device then has activations, buffers, and the units that are running. Law:
    bitwise the step without it, where the device is the CPU. `lm.donate` keeps params in the memory that was pinned
    once. It needs stage 3 and excludes `lm.compile`; in a world of one rank it does nothing.

    A model that was created under `torch.device("meta")` is initialized in `init`, unit by unit. Each rank keeps its
    shards, so that no rank ever has the full model. `param_init_fn(module)` is called for each module in order, after
    `torch.manual_seed` with the state's seed, and sets the module's own tensors; by default it calls
    `module.reset_parameters()`. The values are bitwise those of one process that does the same on the mesh's device.
    After `lm.bridges.huggingface.load_pretrained`, each rank reads its shards of the published weights instead.

    The mesh's `shard` axis shards. A `data` axis beside it (HSDP) replicates, and gradients are summed over it too.

    Law: for any shares of the batch, also empty ones, params and loss are those of one process on the global batch, up
    to the order of floating-point sums, for losses that are means over rows, as under `lm.ddp`. Sharding frozen params
    changes no bit. Under bf16 compute, a gradient is summed in float32 and rounded to bfloat16. Losses and `lm.Aux` are
    as under `lm.ddp`. At stage 3 all ranks must run the same units in the same order, and apply the model equally
    often. A unit that some ranks skip counts as run if the order is that of the module. With `lm.accumulate` inside,
    gradients are reduced once for an update; at stage 3 once for a microbatch, and a rank with fewer microbatches
    repeats its last one with weight zero. Around `lm.pipeline`, the params of a rank's pipeline stages are gathered
    together, once for each gradient, and its frozen params stay full.

    Muon, adafactor and lamb need full tensors. They gather them leaf by leaf, and every rank computes the full update:
    use muon for the matrices alone. Adafactor's row and column statistics are not sharded.

    Raises, on every rank: `WorldError` where states, versions or steps differ; `HyperparameterError` for optimizers
    of torch or others that are not known to update entry by entry; `PatternError` for units that match nothing;
    `OrderError` for transforms that cannot be around it or inside it.

    >>> import lumen as lm
    >>> lm.fsdp(stage=2), lm.fsdp(wrap="blocks.*")
    (lm.fsdp(stage=2), lm.fsdp(wrap='blocks.*'))
    """

    name = "fsdp"
    level = "parallel"
    shards = True
    reads_pending = True
    reason = "transforms inside compute the gradient of this rank's rows; params and grads are reduced around them"

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        stage: Literal[1, 2, 3] = 3,
        wrap: str | Sequence[str] | None = None,
        param_dtype: Literal["bf16"] | None = None,
        prefetch: int = 1,
        offload: bool = False,
        param_init_fn: Initialize | None = None,
    ) -> None:
        _check_arguments(stage, wrap, param_dtype, prefetch, offload)
        self.stage = int(stage)
        self.patterns = wrap
        self.param_dtype = param_dtype
        self.prefetch = int(prefetch)
        self.offload = offload
        self.param_init_fn = param_init_fn
        self._mesh = mesh

    def _new_memory(self) -> FSDPRuntime:
        return FSDPRuntime(self._mesh, self)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the constructor, by default all ranks along `shard`."""
        runtime: FSDPRuntime = self._memory
        return runtime.mesh

    @property
    def layout(self) -> ShardLayout | None:
        """The layout of this rank's shards; None where nothing is sharded."""
        runtime: FSDPRuntime = self._memory
        return runtime.layout

    def init(self, state: Any) -> Any:
        """This rank's shards of the first rank's state, after a check that all ranks have the same."""
        layout = self.layout
        states = train_states(state)
        if any(self.name in inner.slots for _, inner in states):
            _check_prepared(self, state)
            return state
        row_shards.check(state)
        params = getattr(state, "params", None)
        if layout is None:  # the checks that apply to several ranks apply here too
            self.check_offload()
            if self.patterns is not None and type(params) is dict:
                self._memory.units(state.apply_fn, [*params])
            return _init_meta(self, state, None) if begins_on_meta(state) else state
        check_context(self, self.mesh)
        for _, inner in _states(state):
            flat_params(inner, "lm.fsdp shards")
            check_optimizer(inner.tx)
        self.check_offload()
        lines = consistency.fingerprint_lines(state, self.within)
        consistency.assert_same_on_all_ranks(lines, layout.row_group, self.mesh.device, "the processes of lm.fsdp")
        has_frozen = self.stage == 3 and not has_pipeline(_inside(self))  # each is on one process, which keeps it full
        specs = {path: _specs(inner, self.stage, has_frozen) for path, inner in states}
        sharded = sharding.locate_all(state, specs)
        for _, inner in states:
            self._memory.units(inner.apply_fn, [*inner.params])  # raises for patterns that match nothing
        if any(begins_on_meta(inner) for _, inner in states):
            _check_only_state(states)
            state = _init_meta(self, state, layout)
        elif self.offload:
            state = offload.shard_to_host(state, layout, sharded, self.mesh.device)
        else:
            state = shard_tree(layout, consistency.broadcast(state, layout.row_group), sharded)
        if self.offload:
            state = offload.place_state(state, sharding.locate_all(state, specs), [*specs], self.mesh.device)
        state = row_shards.shard(state, self.mesh, self.name)

        def recorded(path: Path, inner: Any) -> Any:
            return with_slot(inner, self.name, Sharding(specs=specs[path], size=layout.size, stage=self.stage))

        return map_train_states(recorded, state)

    def export(self, state: Any) -> Any:
        """The full state, on every rank; with `offload`, on the host."""
        layout = self.layout
        if layout is None:
            return state
        sharded = _sharded(state, self.name)
        state = map_train_states(lambda _, inner: without_slot(inner, self.name), state)
        full = gather_tree(layout, row_shards.unshard(state, self.mesh), sharded)
        if self.offload:
            return tree.map(lambda leaf: leaf.to(offload.HOST) if isinstance(leaf, Tensor) else leaf, full)
        return full

    def shard_specs(self, state: Any) -> dict[int, ShardSpec]:
        """This rank's rows of each sharded leaf, and of the row fields."""
        layout = self.layout
        if layout is None:
            return {}
        return row_shards.specs(state, self.mesh) | shard_specs(layout, _sharded(state, self.name))

    def wrap(self, step: StepFn) -> StepFn:
        """The step with params gathered where they are used, and gradients reduced over ranks."""
        inside = as_step(step).transforms
        _check_inside(self, inside)
        checks = BufferChecks("lm.fsdp")
        by_units = self.stage == 3 and not has_pipeline(inside)

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            runtime: FSDPRuntime = self._memory
            layout = runtime.layout
            if layout is None:
                with runtime.mesh.bound():
                    return step(state, batch)
            if runtime.mesh.sizes["context"] > 1:
                check_context(self, runtime.mesh, inside)
            plans = {path: runtime.unit_plans(path, slot(inner, self.name)) for path, inner in _states(state)}
            frozen = _frozen_params(runtime, layout, plans)
            states = ShardedStates(layout, [(inner, plans[path]) for path, inner in _states(state)], frozen)
            rule = FSDPRule(runtime, layout, states, state, checks, by_units)
            handlers = _handlers(self.stage, runtime, states, rule, by_units)
            with runtime.mesh.bound(), rules.rule_context(handlers):
                if self.stage == 1:
                    return step(state, batch)
                view = nullcontext() if frozen is None else sharding.bound_view(frozen)
                with sharding.bound(layout, states.gatherer), view:
                    return step(state, batch)

        return row_shards.checked(run, lambda: self.mesh)

    def check_offload(self) -> None:
        """Raise `OrderError` where params on the host cannot be gathered."""
        outside = () if self.within is None else self.within.transforms
        if self.offload and (rules.is_tracing() or any(t.level == "compile" for t in outside)):
            raise OrderError(
                "lm.compile cannot trace lm.fsdp(offload=True), whose params come from the host in the middle of the"
                " step. Leave out lm.compile(), or write lm.fsdp()."
            )


def _init_meta(transform: fsdp, state: Any, layout: ShardLayout | None) -> Any:
    """The state of a model on the meta device, initialized on the ranks that keep the values."""
    on_host, device = transform.offload and layout is not None, transform.mesh.device
    sharded = {*state.params, *state.apply_fn.frozen} if transform.stage == 3 else set()
    if pending_weights.source_of(state) is not None:
        move = (lambda shard: offload.to_host(shard.to(device))) if on_host else (lambda shard: shard.to(device))
        values = read_pending(state, layout, sharded, move)
    else:
        units = transform._memory.units(state.apply_fn, [*state.params])
        keep_fn = make_keep_fn(layout, sharded)
        keep: Keep = (lambda name, full: offload.to_host(keep_fn(name, full))) if on_host else keep_fn
        init, seed = transform.param_init_fn or reset, int(state.seed)
        values = materialize(state.apply_fn.module, units.names, init, seed, device, keep)
    return init_from_meta(state, values, None if on_host else device, layout, _inside(transform))


def _inside(transform: fsdp) -> Sequence[Transform]:
    """The transforms inside `transform` in the step that is being prepared."""
    within = () if transform.within is None else transform.within.transforms
    return within[within.index(transform) + 1 :] if transform in within else ()


def _handlers(
    stage: int, runtime: FSDPRuntime, states: ShardedStates, rule: FSDPRule, by_units: bool
) -> dict[Primitive, Rule]:
    """The rules of one step."""
    apply: Rule = rule.apply
    if stage == 3:
        sharded = functools.partial(apply_sharded, runtime, states, rule)
        apply = sharded if by_units else functools.partial(apply_gathered, states, rule)
    return {
        Primitive.GRADIENT: rule,
        Primitive.APPLY: apply,
        Primitive.UPDATE: functools.partial(update_shards, states, stage),
    }


def _frozen_params(runtime: FSDPRuntime, layout: ShardLayout, plans: Mapping[Path, UnitPlans]) -> FrozenParams | None:
    """What a step sees of its states' frozen params; None where none are sharded."""
    sources = {path: runtime.frozen_source(path, plan, unit_reducer) for path, plan in plans.items() if plan.frozen}
    return FrozenParams(layout, sources) if sources else None


def _check_arguments(stage: Any, wrap: Any, param_dtype: Any, prefetch: Any, offload: Any) -> None:
    if integer_of(stage) not in (1, 2, 3):
        raise HyperparameterError(
            f"fsdp(stage={stage!r}) is unknown; give 1 (optimizer state), 2 (and gradients) or 3 (and params)."
        )
    if param_dtype not in (None, "bf16"):
        raise HyperparameterError(f"fsdp(param_dtype={param_dtype!r}) is unknown; give 'bf16' or None.")
    if integer_of(prefetch, low=0) is None:
        raise HyperparameterError(f"fsdp(prefetch={prefetch!r}) must be a number of units, 0 or more.")
    if stage < 3 and (wrap is not None or param_dtype is not None):
        raise HyperparameterError(f"fsdp(stage={stage}) gathers no units: leave wrap and param_dtype out, or use 3.")
    if type(offload) is not bool:
        raise HyperparameterError(f"fsdp(offload={offload!r}) must be True or False.")
    if stage < 3 and offload:
        raise HyperparameterError(
            f"fsdp(stage={stage}) keeps full params on the device, and offload is for shards. Write"
            " lm.fsdp(stage=3, offload=True)."
        )


def _check_inside(transform: fsdp, transforms: Sequence[Transform]) -> None:
    check_pipeline(transform, transforms)
    for inner in transforms:
        if inner.level == "tensor" and transform.offload:
            raise OrderError(
                f"{inner!r} shards params on the device, and lm.fsdp(offload=True) keeps them on the host. Write"
                " lm.fsdp() around it."
            )
        if inner.level == "dp_sgd":
            raise OrderError(f"{inner!r} under lm.fsdp would add noise for the rows of one rank alone.")
        if getattr(inner, "auto", False) and transform.stage == 3:
            raise OrderError(
                f"{inner!r} cannot be inside lm.fsdp(stage=3): a rank that runs out of memory between all-gathers"
                " would block the others in the next one. Give a number, lm.accumulate(2), or use"
                " lm.fsdp(stage=2), which communicates only after each rank has computed its gradient."
            )


def _check_prepared(transform: fsdp, state: Any) -> None:
    """Raise `StateError` for a state that `init` has returned for another number of ranks or another stage."""
    size = 1 if transform.layout is None else transform.layout.size
    for _, inner in train_states(state):
        record: Sharding = slot(inner, transform.name)
        if (record.size, record.stage) != (size, transform.stage):
            raise StateError(
                f"this state was sharded by lm.fsdp(stage={record.stage}) over {record.size} ranks, and {transform!r}"
                f" shards over {size}. Gather it with the step that prepared it: state = step.export(state)"
            )


def _sharded(state: Any, name: str) -> Sharded:
    """The sharded leaves of a state that `init` has returned."""
    return sharding.locate_all(state, {path: slot(inner, name).specs for path, inner in _states(state)})


def _states(state: Any) -> list[tuple[Path, Any]]:
    """The training states in a state, or the state itself, which then lacks what it should have."""
    return train_states(state) or [((), state)]


def _check_only_state(states: Sequence[tuple[Path, Any]]) -> None:
    if len(states) > 1 or states[0][0]:
        path = ".".join(map(str, next(path for path, inner in states if begins_on_meta(inner))))
        raise StateError(
            f"the params of state{'.' * bool(path)}{path} are on the meta device, and lm.fsdp initializes those of a"
            " single lm.TrainState only. Create the models of a state with several outside torch.device('meta')."
        )


def _specs(state: Any, stage: int, has_frozen: bool) -> SpecTree:
    """The specs of a state that is about to be sharded; with `has_frozen` of its frozen params, too."""
    frozen = plain_frozen(state) if has_frozen else {}
    params = {
        name: LeafSpec(tuple(p.shape), dim=0 if p.dim() else REPLICATED) for name, p in (state.params | frozen).items()
    }
    specs = SpecTree.of(state, params, field=None if stage == 3 else "opt_state")
    unsharded = {name for name in frozen if ("buffers", name) not in specs.leaves}
    return SpecTree({name: spec for name, spec in params.items() if name not in unsharded}, specs.leaves)
