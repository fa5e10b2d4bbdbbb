"""`lm.fsdp`: params, gradients and optimizer state spread over processes, which each compute on their own rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core import row_fields, rules, sharding
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.rules import Primitive, Rule
from lumen.core.sharding import ShardSpec, Spread
from lumen.core.step import StepFn, Transform, as_step, slot, with_slot, without_slot
from lumen.errors import HyperparameterError, OrderError, StateError
from lumen.parallel import row_shards
from lumen.parallel.comm import consistency
from lumen.parallel.comm.mesh import Mesh
from lumen.parallel.ddp.aux_reduction import BufferChecks
from lumen.parallel.fsdp import cpu_offload as offload
from lumen.parallel.fsdp.apply_rule import apply_sharded
from lumen.parallel.fsdp.grad_reduction import FSDPRule
from lumen.parallel.fsdp.meta_init import (
    Initialize,
    Keep,
    begins_on_meta,
    init_from_meta,
    make_keep_fn,
    materialise,
    reset,
)
from lumen.parallel.fsdp.runtime import FSDPRuntime
from lumen.parallel.fsdp.shard import (
    ShardedParamGatherer,
    ShardLayout,
    cut_tree,
    flat_params,
    never_cut,
    places_of,
    whole_tree,
)
from lumen.parallel.fsdp.update_rule import update_shards
from lumen.parallel.optimizer_check import check_optimizer

Shapes = Mapping[str, torch.Size]


@pytree_dataclass
class Sharding(Spread):
    """The slot of `fsdp`, all static: each param's whole `shapes`, over how many processes they are cut, and the stage.

    A leaf anywhere in the state that stands under a param's name, and has the shape of this process's part of it, is
    such a part, except at the paths `kept`. At stages 1 and 2 that is so in the optimizer state alone.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...] = static()
    size: int = static()
    stage: int = static()
    kept: tuple[str, ...] = static(default=())


class fsdp(Transform):
    """Spread params, gradients and optimizer state over processes; each computes the rows it is handed.

    `stage=1` spreads the optimizer state alone, 2 the gradients too, 3 the params as well. `init` cuts each tensor
    along its first dim (the layout of DTensor's `Shard(0)`; the last parts may be shorter, or empty) and takes the
    values of the first process; tensors without dims stay whole, and of an `lm.row_field()` each process keeps the rows
    that it is given of a batch. Inside the step, params and grads of stage 3 are this
    process's parts, plain tensors, on which the optimizer runs; `export` gathers the whole state on every process.

    A model meets its params whole: those of a unit are gathered when it runs, let go afterwards, gathered again for its
    backward pass, and their gradients are summed as they come, each process keeping its part. `wrap` is one or more
    patterns of module names, by default the repeated blocks of the model's lists and sequences; the rest is one more
    unit, which stays from the start of the forward pass to the end of the backward pass. `prefetch` is how many units
    are sent for ahead of time. A param that the loss function, or a module outside the unit, reads is gathered there
    and then. `param_dtype="bf16"` sends float32 params in half the bytes. Declared change: their rounding; gradients
    are summed in float32.

    With `offload`, parts of params, gradients and optimizer state rest on the host (pinned for a GPU), where the
    optimizer runs; a unit's parts are sent to the device before they are gathered, and its parts of the gradients come
    back in the backward pass. The device then holds activations, buffers, and the units in work. Law: bitwise the step
    without it, where the device is the CPU. `lm.donate` keeps params in the memory that was pinned once. It takes stage
    3 and no `lm.compile`; alone, without other processes, it does nothing.

    A model that was made under `torch.device("meta")` gets its values in `init`: unit by unit, each process keeping its
    parts, so that none ever holds the whole. `param_init_fn(module)` is called for each module in order, after
    `torch.manual_seed` with the state's seed, and sets what that module itself holds; by default it calls
    `module.reset_parameters()`. Values are bitwise those of one process that does the same on the mesh's device.

    The mesh's `shard` axis cuts; a `data` axis beside it (HSDP) holds copies, whose gradients are summed as well.

    Law: with any parts of the batch, also empty ones, params and loss are those of one process on the global batch, up
    to the order of floating sums, for losses that are means over rows, as under `lm.ddp`. Under bf16 compute, a
    gradient's sum is taken in float32 and rounded to bfloat16. Losses and `lm.Aux` are as under `lm.ddp`. At stage 3
    all processes must run the same units in the same order, and apply the model equally often; a unit that some
    processes pass over counts as run where the order is that of the module. With `lm.accumulate` inside, gradients are
    summed once for an update; at stage 3 once for a microbatch, where a process with fewer microbatches repeats its
    last without weight.

    Muon, adafactor and lamb, which look at whole tensors, gather them leaf by leaf, and every process computes the
    whole update: give muon the matrices alone. Adafactor's rows and columns stay whole everywhere.

    Raises, on every process: `WorldError` where states, versions or steps differ; `HyperparameterError` for optimizers
    of torch's or of others that are not known to update entry by entry; `PatternError` for units that match nothing;
    `OrderError` for what cannot stand around or inside it.

    >>> import lumen as lm
    >>> lm.fsdp(stage=2), lm.fsdp(wrap="blocks.*")
    (lm.fsdp(stage=2), lm.fsdp(wrap='blocks.*'))
    """

    name = "fsdp"
    level = "parallel"
    shards = True
    reason = "what is inside computes the gradient of this process's rows; params and grads are joined around it"
    stage: int
    patterns: str | Sequence[str] | None
    param_dtype: str | None
    prefetch: int
    offload: bool
    param_init_fn: Initialize | None
    _given: Mesh | None

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
        if type(stage) is not int or stage not in (1, 2, 3):
            raise HyperparameterError(
                f"fsdp(stage={stage!r}) is unknown; give 1 (optimizer state), 2 (and gradients) or 3 (and params)."
            )
        if param_dtype not in (None, "bf16"):
            raise HyperparameterError(f"fsdp(param_dtype={param_dtype!r}) is unknown; give 'bf16' or None.")
        if type(prefetch) is not int or prefetch < 0:
            raise HyperparameterError(f"fsdp(prefetch={prefetch!r}) must be a number of units, from 0.")
        if stage < 3 and (wrap is not None or param_dtype is not None):
            raise HyperparameterError(
                f"fsdp(stage={stage}) gathers no units: leave wrap and param_dtype out, or use 3."
            )
        if type(offload) is not bool:
            raise HyperparameterError(f"fsdp(offload={offload!r}) must be True or False.")
        if stage < 3 and offload:
            raise HyperparameterError(
                f"fsdp(stage={stage}) keeps whole params on the device, and offload is for parts. Write"
                " lm.fsdp(stage=3, offload=True)."
            )
        self.stage = stage
        self.patterns = wrap
        self.param_dtype = param_dtype
        self.prefetch = prefetch
        self.offload = offload
        self.param_init_fn = param_init_fn
        self._given = mesh

    def _new_memory(self) -> FSDPRuntime:
        return FSDPRuntime(self._given, self)

    @property
    def mesh(self) -> Mesh:
        """The mesh that was given, or all processes along `shard`."""
        runtime: FSDPRuntime = self._memory
        return runtime.mesh

    @property
    def cut(self) -> ShardLayout | None:
        """How this process's parts lie in the whole; None where nothing is cut."""
        runtime: FSDPRuntime = self._memory
        return runtime.layout

    def init(self, state: Any) -> Any:
        """This process's parts of the first process's state, after checking that all have the same."""
        cut = self.cut
        if self.name in getattr(state, "slots", ()):
            return self._prepared(state)
        row_shards.check(state)
        params = getattr(state, "params", None)
        if cut is None:  # what several processes would be refused is refused here too
            self.check_offload()
            if self.patterns is not None and type(params) is dict:
                self._memory.units(state.apply_fn, [*params])
            return self._made(state, None) if begins_on_meta(state) else state
        params = flat_params(state, "lm.fsdp cuts")
        check_optimizer(state.tx)
        self.check_offload()
        lines = consistency.fingerprint_lines(state, self.within)
        consistency.assert_same_on_all_ranks(lines, cut.everyone, self.mesh.device, "the processes of lm.fsdp")
        shapes = {name: p.shape for name, p in params.items()}
        kept = never_cut(self._cut_of(state), shapes)
        kept += tuple(path for path, _ in row_fields.named(self._cut_of(state)))  # whatever names they have
        self._memory.units(state.apply_fn, [*shapes])  # patterns that match nothing are told here
        if begins_on_meta(state):
            state = self._made(state, cut)
        elif self.offload:
            state = offload.shard_to_host(state, cut, shapes, kept, self.mesh.device)
        else:
            state = consistency.broadcast(state, cut.everyone)
            parts = cut_tree(cut, self._cut_of(state), shapes, kept)
            state = parts if self.stage == 3 else state.replace(opt_state=parts)
        if self.offload:
            state = offload.place_state(state, cut, shapes, kept, self.mesh.device)
        state = row_shards.shard(state, self.mesh, self.name)
        record = tuple((name, tuple(shape)) for name, shape in shapes.items())
        return with_slot(state, self.name, Sharding(shapes=record, size=cut.size, stage=self.stage, kept=kept))

    def _prepared(self, state: Any) -> Any:
        """A state that `init` gave, as it is."""
        record: Sharding = slot(state, self.name)
        size = 1 if self.cut is None else self.cut.size
        if (record.size, record.stage) != (size, self.stage):
            raise StateError(
                f"this state was sharded by lm.fsdp(stage={record.stage}) over {record.size} ranks, and {self!r} shards"
                f" over {size}. Gather it with the step that prepared it: state = step.export(state)"
            )
        return state

    def _made(self, state: Any, cut: ShardLayout | None) -> Any:
        """The state of a model on the meta device with values, made where they stay."""
        units = self._memory.units(state.apply_fn, [*state.params])
        kept = make_keep_fn(cut, state.params if self.stage == 3 else ())
        at_rest = self.offload and cut is not None
        keep: Keep = (lambda name, whole: offload.to_host(kept(name, whole))) if at_rest else kept
        module = state.apply_fn.module
        values = materialise(module, units.names, self.param_init_fn or reset, int(state.seed), self.mesh.device, keep)
        within = () if self.within is None else self.within.transforms
        inside = within[within.index(self) + 1 :] if self in within else ()
        return init_from_meta(state, values, None if at_rest else self.mesh.device, cut, inside)

    def _cut_of(self, state: Any) -> Any:
        """What of a state is cut."""
        return state if self.stage == 3 else state.opt_state

    def export(self, state: Any) -> Any:
        """The whole state, on every process; with `offload`, on the host."""
        cut = self.cut
        if cut is None:
            return state
        shapes, kept = self._shapes(state), slot(state, self.name).kept
        state = without_slot(state, self.name)
        state = row_shards.unshard(state, self.mesh)
        whole = whole_tree(cut, self._cut_of(state), shapes, kept)
        if self.offload:
            return tree.map(lambda leaf: leaf.to(offload.HOST) if isinstance(leaf, Tensor) else leaf, whole)
        return whole if self.stage == 3 else state.replace(opt_state=whole)

    def shard_specs(self, state: Any) -> dict[int, ShardSpec]:
        """This process's rows of each leaf that is cut, and of the row fields."""
        cut = self.cut
        if cut is None:
            return {}
        found = row_shards.specs(state, self.mesh)
        shapes = self._shapes(state)
        chosen = self._cut_of(state)
        leaves = tree.leaves(chosen)
        names = {
            id(leaves[place]): name
            for place, name in places_of(chosen, shapes, cut, slot(state, self.name).kept)
            if shapes[name]
        }
        held = enumerate(tree.leaves(state))
        return found | {place: cut.piece(shapes[names[id(leaf)]]) for place, leaf in held if id(leaf) in names}

    def _shapes(self, state: Any) -> Shapes:
        record: Sharding = slot(state, self.name)
        return {name: torch.Size(shape) for name, shape in record.shapes}

    def wrap(self, step: StepFn) -> StepFn:
        """The step with params gathered as they are used, and gradients summed over processes."""
        inside = as_step(step).transforms
        self._check_inside(inside)
        checks = BufferChecks("lm.fsdp")

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            runtime: FSDPRuntime = self._memory
            cut = runtime.layout
            if cut is None:
                with runtime.mesh.bound():
                    return step(state, batch)
            plans = runtime.unit_plans(slot(state, self.name))
            gatherer = ShardedParamGatherer(cut, plans.shapes)
            rule = FSDPRule(runtime, cut, plans, state, checks)
            handlers: dict[Primitive, Rule] = {Primitive.GRADIENT: rule, Primitive.APPLY: rule.apply}
            if self.stage == 3:
                handlers[Primitive.APPLY] = functools.partial(apply_sharded, runtime, plans, rule)
            else:
                handlers[Primitive.UPDATE] = functools.partial(update_shards, cut, gatherer, self.stage)
            with runtime.mesh.bound(), rules.rule_context(handlers):
                if self.stage == 1:
                    return step(state, batch)
                with sharding.bound(cut, gatherer):
                    return step(state, batch)

        return row_shards.checked(run, lambda: self.mesh)

    def check_offload(self) -> None:
        """Raise `OrderError` where params that rest on the host cannot be gathered."""
        outside = () if self.within is None else self.within.transforms
        if self.offload and (rules.is_tracing() or any(t.level == "compile" for t in outside)):
            raise OrderError(
                "lm.compile cannot trace lm.fsdp(offload=True), whose params come from the host in the middle of the"
                " step. Leave out lm.compile(), or write lm.fsdp()."
            )

    def _check_inside(self, transforms: Sequence[Transform]) -> None:
        for inner in transforms:
            if inner.level == "tensor" and self.offload:
                raise OrderError(
                    f"{inner!r} cuts params on the device, and lm.fsdp(offload=True) keeps them on the host. Write"
                    " lm.fsdp() around it."
                )
            if inner.level == "dp_sgd":
                raise OrderError(f"{inner!r} under lm.fsdp would add its noise for the rows of one process alone.")
            if getattr(inner, "auto", False) and self.stage == 3:
                raise OrderError(
                    f"{inner!r} cannot stand in lm.fsdp(stage=3): a process that runs out of memory between two gathers"
                    " would leave the others waiting in the next. Give a number, lm.accumulate(2), or use"
                    " lm.fsdp(stage=2), where processes meet only after each has computed its gradient."
                )
