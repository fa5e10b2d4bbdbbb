"""`lm.pipeline`: a model split into stages, each on one process, through which microbatches go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lumen.core import _torch_compat, rules, sharding
from lumen.core.annotations import integer_of
from lumen.core.rules import Primitive, Rule
from lumen.core.sharding import ShardSpec
from lumen.core.step import StepFn, Transform, as_step, device_of, slot, with_slot, without_slot
from lumen.errors import AxisError, HyperparameterError, OrderError, StateError
from lumen.parallel import row_shards
from lumen.parallel.comm import consistency
from lumen.parallel.comm.mesh import Mesh
from lumen.parallel.fsdp.meta_init import begins_on_meta
from lumen.parallel.fsdp.shard import flat_params
from lumen.parallel.pipeline import layout
from lumen.parallel.pipeline.layout import PipelineSharding
from lumen.parallel.pipeline.rule import PipelineRule
from lumen.parallel.pipeline.runtime import PipelineRuntime
from lumen.parallel.pipeline.schedule import SCHEDULES, ScheduleName, check_numbers
from lumen.parallel.pipeline.share import PipelineGroup
from lumen.parallel.pipeline.split import changed_buffer
from lumen.parallel.pipeline.stages import Stages, split_points_of, stage_of_params
from lumen.parallel.row_reducer import row_reducer

_EAGER = "it sends activations between processes in the middle of the step, which runs eagerly. Leave one out"


class pipeline(Transform):
    """Split a model into stages, each of which lives on one process, and send microbatches through them.

    Params, gradients and optimizer state of a stage are on its process alone. The mesh's `pipeline` axis counts the
    processes. `stages` says where the model is split: names of the modules with which stages 1, 2, … begin, or a number
    of stages, which divides the blocks of the model's `nn.Sequential` or `nn.ModuleList` evenly; by default as many as
    there are processes. Params belong to stages in the order in which their modules are registered, so that modules
    before the blocks are part of the first stage, and those after them of the last.

    `microbatches` is the number of equal parts of a batch. `schedule` is "1f1b" (a stage stores activations of at most
    as many microbatches as there are stages), "gpipe" (of all microbatches), or "interleaved" (1F1B with several stages
    on each process, stage i on process i modulo their number).

    The model must be a sequence: between two stages only one tensor passes, the first argument of the module with which
    a stage begins. Each stage runs the model's own forward pass with what it has. What depends on another stage by any
    other way is refused by name, before anything is sent. The loss function runs where the last stage is, and its
    loss and aux come to all processes. It applies the model once, and of params it may read those of the last stage.
    Outside of the gradient, `state.apply` runs the stages in turn, and returns its output on all processes.

    Inside the step, params and grads of other stages are empty tensors. All ranks along `pipeline` must receive the
    same rows, as `lm.Loader` provides them. `lm.ddp` outside, on the same mesh, divides rows over its other axes:
    `lm.ddp(mesh)(lm.pipeline(mesh, microbatches=8)(step))`. `lm.fsdp` outside also shards the params and optimizer
    state of a stage over `shard`, and all-gathers a stage's params once for each gradient.

    Law: params, loss and metrics are those of one process, up to the order of floating-point sums, for losses that are
    means over rows, as under `lm.accumulate`. Dropout masks differ from single-process training.

    Raises, on every rank: `PatternError` and `ParamsError` for split points that the model does not have, tied weights
    on two stages and buffers that change; `LossError` for a model that is not a sequence, or a loss that applies it
    twice; `BatchError` for rows that `microbatches` does not divide; `HyperparameterError` for optimizers that need
    full tensors; `WorldError` where states differ; `OrderError` for transforms that cannot be around it or inside it.

    >>> import lumen as lm
    >>> lm.pipeline(microbatches=4), lm.pipeline(microbatches=8, stages=["blocks.4"], schedule="gpipe")
    (lm.pipeline(microbatches=4), lm.pipeline(microbatches=8, stages=['blocks.4'], schedule='gpipe'))
    """

    name = "pipeline"
    level = "pipeline"
    shards = True
    reason = "it runs the forward and backward passes of a batch in the order of its schedule"
    incompatible: Mapping[str, str] = {
        "compile": f"lm.compile cannot trace it, as {_EAGER}",
        "ensemble": f"vmap cannot map it, as {_EAGER}",
        "context_parallel": "attention would wait for other ranks in the middle of the schedule. Leave one out",
        "tensor_parallel": "a stage cannot be sharded further yet. Leave one out",
        "deepspeed": "its engine runs the backward pass itself. Leave one out",
        "chunked_logits": "the form of logits that are never computed is not known before. Leave one out",
        "quantized_matmul": "both replace the forward of layers. Leave one out",
        "dp_sgd": "it needs the gradient of each row. Leave one out",
    }

    def __init__(
        self, mesh: Mesh | None = None, *, microbatches: int, stages: Stages = None, schedule: ScheduleName = "1f1b"
    ) -> None:
        count = integer_of(microbatches, low=1)
        if count is None:
            raise HyperparameterError(f"pipeline(microbatches={microbatches!r}) must be a positive number.")
        if schedule not in SCHEDULES:
            raise HyperparameterError(
                f"pipeline(schedule={schedule!r}) is unknown; give {', '.join(map(repr, SCHEDULES))}."
            )
        if isinstance(stages, str) or not (
            stages is None
            or integer_of(stages, low=1) is not None
            or (isinstance(stages, Sequence) and all(isinstance(point, str) for point in stages))
        ):
            raise HyperparameterError(
                f"pipeline(stages={stages!r}) must be a number of stages, or a list of the names of modules with which"
                ' stages begin: stages=["blocks.4", "blocks.8"].'
            )
        self.microbatches = count
        self.stages = stages if isinstance(stages, Sequence) else integer_of(stages)
        self.schedule = schedule
        self._mesh = mesh

    def _new_memory(self) -> PipelineRuntime:
        return PipelineRuntime(self._mesh, self.schedule, self.microbatches, repr(self))

    @property
    def mesh(self) -> Mesh:
        """The mesh of the constructor, by default all ranks along `pipeline`."""
        runtime: PipelineRuntime = self._memory
        return runtime.mesh

    @property
    def group(self) -> PipelineGroup | None:
        """The ranks along `pipeline`; None where nothing is split."""
        runtime: PipelineRuntime = self._memory
        return runtime.group

    def init(self, state: Any) -> Any:
        """The first rank's state, of which each rank keeps its stages, after a check that all have the same."""
        flat_params(state, "lm.pipeline divides")
        group = self.group
        module = state.apply_fn.module
        size = 1 if group is None else group.size
        split_points = split_points_of(module, self.stages, size)
        if self.name in getattr(state, "slots", ()):
            _check_prepared(self, slot(state, self.name), split_points, size)
            return state
        row_shards.check(state)
        self._check_state(state)
        owners = stage_of_params(module, split_points) if split_points else {}
        if group is None:
            return state
        check_numbers(self.schedule, self.microbatches, len(split_points) + 1, size)
        self._check_outside()
        lines = [*consistency.fingerprint_lines(state, self.within), f"the split points {split_points}"]
        consistency.assert_same_on_all_ranks(lines, group.group, device_of(state), "the processes of lm.pipeline")
        specs = layout.specs_of(state, owners)
        state = layout.keep_own(consistency.broadcast(state, group.group), specs, owners, group)
        return with_slot(state, self.name, PipelineSharding(specs=specs, split_points=split_points, size=size))

    def export(self, state: Any) -> Any:
        """The full state, on every rank."""
        group = self.group
        if group is None:
            return state
        record: PipelineSharding = slot(state, self.name)
        owners = stage_of_params(state.apply_fn.module, record.split_points)
        return layout.gather(without_slot(state, self.name), record.specs, owners, group)

    def shard_specs(self, state: Any) -> dict[int, ShardSpec]:
        """The leaves of this rank's stages, and those of others, of which it has nothing."""
        group = self.group
        if group is None:
            return {}
        record: PipelineSharding = slot(state, self.name)
        owners = stage_of_params(state.apply_fn.module, record.split_points)
        first = not any(self.mesh.index(axis) for axis in ("data", "shard"))
        around = () if self.within is None else self.within.transforms
        outer = {index for t in around if t is not self and t.shards for index in t.shard_specs(state)}
        specs = layout.shard_specs(state, record.specs, owners, group)
        return {index: spec._replace(owner=spec.owner and (first or index in outer)) for index, spec in specs.items()}

    def wrap(self, step: StepFn) -> StepFn:
        """The step with its gradient computed stage by stage."""
        _check_inside(as_step(step).transforms)

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            runtime: PipelineRuntime = self._memory
            group = runtime.group
            if group is None:
                return step(state, batch)
            _check_eager()
            rule = PipelineRule(runtime, group, runtime.model(state, slot(state, self.name)), state)
            handlers: dict[Primitive, Rule] = {Primitive.GRADIENT: rule.gradient, Primitive.APPLY: rule.apply}
            with rules.rule_context(handlers), sharding.bound(_StageShards(group)):
                if rules.axis("pipeline") is None:  # no transform outside has bound the axes of the mesh
                    with runtime.mesh.bound():
                        return step(state, batch)
                return step(state, batch)

        return run

    def _check_state(self, state: Any) -> None:
        if begins_on_meta(state):
            raise StateError(
                "the params are on the meta device, and lm.pipeline divides those of the first process. Create the"
                " model outside torch.device('meta')."
            )
        for name in state.apply_fn.merges:
            raise changed_buffer(name)
        reason = getattr(state.tx, "needs_full_tensors", "")
        if reason:
            raise HyperparameterError(
                f"this optimizer cannot run under lm.pipeline, where each rank has its stages only: {reason}. Use"
                " lm.optim.adamw or another rule that updates entry by entry."
            )

    def _check_outside(self) -> None:
        around = () if self.within is None else self.within.transforms
        for outer in around:
            if getattr(outer, "auto", False):
                raise OrderError(
                    f"{outer!r} around lm.pipeline would retry on the rank that ran out of memory alone. Give a number:"
                    " lm.accumulate(2)."
                )
        row_reducer(self, self.mesh, "lm.pipeline(mesh, ...)")


class _StageShards:
    """The `lumen.core.sharding.Shards` of the ranks along `pipeline`: each leaf has its entries on one of them."""

    def __init__(self, group: PipelineGroup) -> None:
        self.reduce = group.reduce

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Every leaf counts: those of other ranks are empty."""
        return True


def _check_prepared(transform: pipeline, record: PipelineSharding, split_points: tuple[str, ...], size: int) -> None:
    if (record.size, record.split_points) != (size, split_points):
        raise StateError(
            f"this state was split at {', '.join(record.split_points)} over {record.size} ranks along pipeline, and"
            f" {transform!r} over {size} splits at {', '.join(split_points)}. Gather it with the step that prepared it:"
            " state = step.export(state)"
        )


def _check_eager() -> None:
    if rules.is_tracing():
        raise OrderError(f"lm.compile cannot trace lm.pipeline: {_EAGER}.")
    if _torch_compat.peek_interpreter_stack() is not None:
        raise AxisError(f"vmap cannot map lm.pipeline: {_EAGER}.")


def _check_inside(transforms: Sequence[Transform]) -> None:
    for inner in transforms:
        if getattr(getattr(inner, "policy", None), "loss_scale", None) is not None:
            raise OrderError(
                f"{inner!r} scales the loss by a rule for the gradient, which lm.pipeline computes by a schedule of its"
                ' own. Write lm.precision("bf16").'
            )
        if inner.name == "guard":
            raise OrderError(f"{inner!r} must be outside lm.pipeline. Write lm.compose({inner!r}, lm.pipeline(...)).")
