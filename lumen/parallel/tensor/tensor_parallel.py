"""`lm.tensor_parallel`: single matrices cut over processes, which compute each row together."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumen import tree
from lumen.core import distributed, rules, sharding
from lumen.core.device import module_of
from lumen.core.primitives import ApplyCall, Gradient, GradientCall
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.sharding import LeafSpec, ShardingSlot, ShardSpec, SpecTree
from lumen.core.step import StepFn, Transform, as_step, device_of, slot, with_slot, without_slot
from lumen.core.wrapped_loss import LossFn, WrappedLoss
from lumen.errors import (
    AxisError,
    BatchError,
    HyperparameterError,
    OrderError,
    StateError,
    WorldError,
    printable,
)
from lumen.parallel import row_shards
from lumen.parallel.comm import consistency
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.fsdp.shard import flat_params
from lumen.parallel.lazy_param import LazyParam, unsharded
from lumen.parallel.optimizer_check import check_optimizer
from lumen.parallel.tensor.autograd_collectives import TPGroup
from lumen.parallel.tensor.layers import FullParamView, Run, cut_modules
from lumen.parallel.tensor.layout import (
    Plan,
    gather_tree,
    module_styles,
    param_layouts,
    shard_specs,
    shard_tree,
)
from lumen.parallel.tensor.styles import Style


@pytree_dataclass
class TensorSharding(ShardingSlot):
    """The slot of `tensor_parallel`, all static: the specs of the state's leaves, and over how many ranks."""

    specs: SpecTree = static()
    size: int = static()


class tensor_parallel(Transform):
    """Cut single matrices over the processes along the mesh's `tensor` axis, which compute the same rows together.

    `plan` says how, by patterns of module names: `Colwise()`, `Rowwise()`, `SequenceParallel()` and `Region()` of
    `lm.parallel`, or a ready plan of `lm.parallel.plans`. What it does not name stays whole. Layers that it cuts are
    `nn.Linear`, `nn.Embedding` and Hugging Face's `Conv1D`; their own forward gives way to the same on parts. Whoever
    else reads a cut param, the loss function say, finds it whole: it is gathered there and then.

    `init` cuts the tensors of the first process along the axis, frozen ones and the optimizer's too; inside the step
    params and grads are this process's parts, plain tensors. `export` gathers them. All processes along `tensor` must
    be handed the same rows, as `lm.Loader` does. Rows are spread over the mesh's other axes by `lm.ddp` or `lm.fsdp` on
    the same mesh, which stand outside: `lm.fsdp(mesh)(lm.tensor_parallel(plan, mesh)(step))`.

    Law: params, loss and metrics are those of one process, up to the order of floating sums. With dropout they are
    those of other random numbers than one process draws: all processes of the axis draw alike, from the generator of
    the first (a step of a model with dropout begins with its state), so that what is whole stays the same everywhere,
    and what is cut (heads, features, parts of a sequence) has the same mask in each part.

    Raises, on every process: `PatternError` for a pattern that matches nothing, a module that two match, and tied
    weights cut in two ways; `ParamsError` for sizes that the axis does not divide and layers that cannot be cut;
    `HyperparameterError` for optimizers that need whole tensors; `WorldError` where states, meshes or
    the buffers after the first step differ; `OrderError` for what cannot stand around it or inside; `BatchError` where
    the first rows differ along the axis.

    >>> import lumen as lm
    >>> from lumen.parallel import Colwise, Rowwise
    >>> from lumen.parallel.tensor.tensor_parallel import tensor_parallel
    >>> tensor_parallel({"mlp.up": Colwise(), "mlp.down": Rowwise()})
    lm.tensor_parallel({'mlp.up': Colwise(), 'mlp.down': Rowwise()})
    """

    name = "tensor_parallel"
    level = "tensor"
    shards = True
    reason = "rows are spread over groups of processes, each of which computes its rows together"

    def __init__(self, plan: Plan, mesh: Mesh | None = None) -> None:
        if not isinstance(plan, Mapping) or not plan or not all(isinstance(s, Style) for s in plan.values()):
            raise HyperparameterError(
                f"tensor_parallel takes a plan, a dict of styles by patterns of module names, not {plan!r:.200}. Write"
                ' lm.tensor_parallel({"*.up": Colwise(), "*.down": Rowwise()}), or a plan of lm.parallel.plans.'
            )
        self.plan = dict(plan)
        self._given = mesh

    def _canonical(self) -> Mapping[str, Any]:
        return {"plan": dict(self.plan)}

    def _new_memory(self) -> _Runtime:
        return _Runtime(self._given, self.plan)

    @property
    def mesh(self) -> Mesh:
        """The mesh that was given, or all processes along `tensor`."""
        runtime: _Runtime = self._memory
        return runtime.mesh

    @property
    def team(self) -> TPGroup | None:
        """The processes along `tensor`; None where nothing is cut."""
        runtime: _Runtime = self._memory
        return runtime.team

    def init(self, state: Any) -> Any:
        """This process's parts of the first process's state, after checking that all along `tensor` have the same."""
        flat_params(state, "lm.tensor_parallel cuts")
        team = self.team
        if self.name in getattr(state, "slots", ()):
            return self._prepared(state)
        row_shards.check(state)
        if team is not None:
            lines = consistency.fingerprint_lines(state, self.within)
            lines += [f"the plan's {pattern} is {style!r}" for pattern, style in self.plan.items()]
            consistency.assert_same_on_all_ranks(
                lines, team.group, device_of(state), "the processes of lm.tensor_parallel"
            )
        layouts = param_layouts(
            state.apply_fn.module, self._memory.styles(state.apply_fn), 1 if team is None else team.size
        )
        self._check_outside()
        if team is None:
            return state
        check_optimizer(state.tx, "lm.tensor_parallel", can_gather=False)
        specs = SpecTree.of(state, layouts)
        state = shard_tree(team, consistency.broadcast(state, team.group), specs)
        return with_slot(state, self.name, TensorSharding(specs=specs, size=team.size))

    def _prepared(self, state: Any) -> Any:
        """A state that `init` gave, as it is."""
        size = 1 if self.team is None else self.team.size
        layouts = param_layouts(state.apply_fn.module, self._memory.styles(state.apply_fn), size)
        record: TensorSharding = slot(state, self.name)
        if record.size != size or record.specs.params != layouts:
            raise StateError(
                f"this state was sharded over {record.size} ranks along tensor, or by another plan than {self!r} over"
                f" {size}. Gather it with the step that prepared it: state = step.export(state)"
            )
        return state

    def export(self, state: Any) -> Any:
        """The whole state, on every process."""
        team = self.team
        if team is None:
            return state
        return gather_tree(team, without_slot(state, self.name), slot(state, self.name).specs)

    def shard_specs(self, state: Any) -> dict[int, ShardSpec]:
        """What each leaf is that stands under a param's name: a part, or whole and written by one process.

        Where `lm.fsdp` outside cuts a leaf once more, its piece is of what this one says.
        """
        team = self.team
        if team is None:
            return {}
        found = shard_specs(state, slot(state, self.name).specs, team.size, team.index)
        mesh = self.mesh
        first = not any(mesh.index(axis) for axis in ("data", "shard"))
        around = () if self.within is None else self.within.transforms
        outer = {place for t in around if t is not self and t.shards for place in t.shard_specs(state)}
        return {
            place: piece._replace(owner=piece.owner and (first or place in outer)) for place, piece in found.items()
        }

    def wrap(self, step: StepFn) -> StepFn:
        """The step with its model run on parts."""
        _check_inside(as_step(step).transforms)

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            runtime: _Runtime = self._memory
            team = runtime.team
            if team is None:
                return step(state, batch)
            _check_engine()
            layouts, outside = runtime.layouts(slot(state, self.name))
            handlers: dict[Primitive, Rule] = {
                Primitive.APPLY: functools.partial(self._apply, runtime, layouts, outside),
                Primitive.GRADIENT: functools.partial(self._gradient, runtime, outside),
            }
            with rules.rule_context(handlers), sharding.bound(_Parts(team, outside.layouts)):
                if self._is_alone():
                    with runtime.mesh.bound():
                        return step(state, batch)
                return step(state, batch)

        return run

    def wrap_host(self, step: StepFn) -> StepFn:
        """Check, once, that the processes along `tensor` have the same rows, and then buffers; let them draw alike."""
        checked = False

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            nonlocal checked
            team = self.team
            if team is None:
                return step(state, batch)
            first, checked = not checked, True
            if first:
                _check_rows(team, batch, device_of(state))
            if _draws(state.apply_fn.module):
                _draw_alike(team, device_of(state))
            new, metrics = step(state, batch)
            if first:
                _check_buffers(team, new)
            return new, metrics

        return run

    def _is_alone(self) -> bool:
        """Whether nobody outside has bound the axes of the mesh."""
        return rules.axis("tensor") is None

    def _apply(
        self, runtime: _Runtime, layouts: Mapping[str, LeafSpec], outside: FullParamView, next: Next, call: ApplyCall
    ) -> Any:
        """P0: run the model on the parts of its params."""
        if not call.params.keys() <= layouts.keys() or not self._names(call) >= layouts.keys():
            return next(call.replace(params={k: unsharded(p) for k, p in call.params.items()}))
        params = {name: self._part(outside, name, p) for name, p in call.params.items()}
        change = cut_modules(runtime.run, outside, runtime.styles(call.target))
        target = call.target.variant((self.name, runtime), change)
        try:
            return next(call.replace(target=target, params=params))
        finally:
            runtime.run.leave()

    @staticmethod
    def _names(call: ApplyCall) -> set[str]:
        return {*call.params, *call.buffers}

    @staticmethod
    def _part(outside: FullParamView, name: str, param: Tensor) -> Tensor:
        """This process's part of a param, also of one that was computed from whole ones in the loss function."""
        if isinstance(param, LazyParam) and param.source is outside:
            return param.shard
        layout = outside.layouts.get(name)
        if layout is None or param.shape != torch.Size(layout.shape):
            return param
        return outside.team.slice(param, layout.dim, layout.groups)

    @staticmethod
    def _gradient(runtime: _Runtime, outside: FullParamView, next: Next, call: GradientCall) -> Gradient:
        """P1: let the loss function see whole params, which are gathered if it reads them."""
        if not isinstance(call.params, Mapping) or call.params.keys().isdisjoint(outside.layouts):
            return next(call)  # type: ignore[no-any-return]

        def seeing(loss_fn: LossFn) -> LossFn:
            def run(params: Any, *rest: Any) -> Any:
                return loss_fn({name: _seen(outside, name, p) for name, p in params.items()}, *rest)

            return WrappedLoss(loss_fn, run, seeing)

        try:
            return next(call.replace(loss_fn=seeing(call.loss_fn)))  # type: ignore[no-any-return]
        finally:
            runtime.run.leave()  # a layer that was computed again for the backward pass has entered once more

    def _check_outside(self) -> None:
        around = () if self.within is None else self.within.transforms
        joining = next((t for t in around if t.level == "parallel"), None)
        mesh = self.mesh
        if joining is None and mesh.size("data", "shard") > 1:
            raise OrderError(
                f"{mesh!r} spreads rows over data and shard, and nothing joins their gradients. Write"
                " lm.ddp(mesh)(lm.tensor_parallel(plan, mesh)(step)), or lm.fsdp(mesh) in place of lm.ddp(mesh)."
            )
        other = getattr(joining, "mesh", mesh)
        if other.sizes != mesh.sizes:
            raise WorldError(
                f"{joining!r} stands on {other!r} and lm.tensor_parallel on {mesh!r}: they must share one mesh."
                f" Write mesh = lm.mesh(data=..., tensor=...), lm.{joining.name if joining else 'ddp'}(mesh) and"
                " lm.tensor_parallel(plan, mesh)."
            )


class _Runtime(StepMesh):
    """What one step keeps on the host: its processes, and the styles and layouts of its models."""

    def __init__(self, given: Mesh | None, plan: Plan) -> None:
        super().__init__(given, "tensor")
        self._plan = plan
        self._styles: dict[Any, dict[str, Style]] = {}
        self._known: tuple[TensorSharding, dict[str, LeafSpec], FullParamView] | None = None

    @functools.cached_property
    def team(self) -> TPGroup | None:
        """The processes along `tensor`; None where nothing is cut."""
        group = self.mesh.group("tensor")
        return None if group is None else TPGroup(group)

    @functools.cached_property
    def run(self) -> Run:
        """What the layers share while a model runs."""
        assert self.team is not None
        return Run(self.team)

    def styles(self, apply: Any) -> dict[str, Style]:
        """The style of each module that the plan names."""
        if apply not in self._styles:
            self._styles[apply] = module_styles(apply.module, self._plan)
        return self._styles[apply]

    def layouts(self, record: TensorSharding) -> tuple[dict[str, LeafSpec], FullParamView]:
        """What the slot says, and what makes params whole by it."""
        if self._known is None or self._known[0].specs != record.specs:
            assert self.team is not None
            layouts = record.specs.params
            self._known = record, layouts, FullParamView(self.team, layouts)
        return self._known[1:]


class _Parts:
    """`lumen.core.sharding.Shards`: what is cut, and what all processes along `tensor` hold alike."""

    def __init__(self, team: TPGroup, layouts: Mapping[str, LeafSpec]) -> None:
        self._team, self._layouts = team, layouts
        self.reduce = team.reduce

    def counts(self, path: str, leaf: Tensor) -> bool:
        """Whether this process adds `leaf` to a sum over all entries."""
        return self._team.index == 0 or path in self._layouts


def _seen(outside: FullParamView, name: str, param: Tensor) -> Tensor:
    layout = outside.layouts.get(name)
    is_part = layout is not None and param.shape != torch.Size(layout.shape)
    return LazyParam.of(outside, name, param) if is_part else param


def _check_engine() -> None:
    if rules.is_tracing():
        raise OrderError("lm.compile cannot trace lm.tensor_parallel, which runs eagerly. Leave lm.compile out.")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise AxisError(
            "lm.tensor_parallel moves tensors between processes, which cannot be done for the lanes of lm.ensemble or"
            " vmap around a step. Train one model under lm.tensor_parallel."
        )


def _check_inside(transforms: Sequence[Transform]) -> None:
    for inner in transforms:
        if inner.level == "dp_sgd":
            raise OrderError(
                f"{inner!r} under lm.tensor_parallel would bound each example's gradient by its part on one process."
                " Train it without, under lm.accumulate for large batches."
            )
        if getattr(inner, "auto", False):
            raise OrderError(
                f"{inner!r} under lm.tensor_parallel would retry on the process that ran out of memory alone. Give a"
                " number: lm.accumulate(2)."
            )


def _check_rows(team: TPGroup, batch: Any, device: torch.device) -> None:
    """Raise `BatchError`, on every process, unless all were handed the same tensors."""
    sums = [consistency.checksum(leaf) for leaf in tree.tensors(batch)]
    mine = torch.stack([torch.zeros(2, dtype=torch.int64), *(each.cpu() for each in sums)]).sum(0).to(device)
    found = [torch.empty_like(mine) for _ in range(team.size)]
    dist.all_gather(found, mine, group=team.group)
    if any(not torch.equal(found[0], other) for other in found):
        raise BatchError(
            "the processes along tensor were handed different rows, and must compute the same ones together. Make"
            " batches with lm.Loader, made after the mesh, or cut them by lm.parallel.rows(): which part is this"
            " process's, and of how many."
        )


def _check_buffers(team: TPGroup, state: Any) -> None:
    """Raise `WorldError`, on every process, unless all came to the same buffers, which nothing joins."""
    whole = {name: b for name, b in state.buffers.items() if name not in state.apply_fn.frozen}
    if not whole or distributed.is_dry_run():
        return
    mine = torch.stack([consistency.checksum(buffer) for buffer in whole.values()])
    found = [torch.empty_like(mine) for _ in range(team.size)]
    dist.all_gather(found, mine, group=team.group)
    differs = torch.stack([(other != found[0]).any(1) for other in found]).any(0).tolist()
    names = [name for name, bad in zip(whole, differs, strict=True) if bad]
    if names:
        raise WorldError(
            "the processes along tensor compute the same rows, but came to different buffers:"
            f" {', '.join(map(printable, names))}. Were they computed from a part of the features, or drawn at"
            " random? Compute them from what is whole, outside of"
            " the layers that lm.tensor_parallel cuts, or leave these layers out of the plan."
        )


def _draws(module: nn.Module) -> bool:
    """Whether a module in training mode has dropout: a layer, or a number of that name that it hands on."""
    if not module.training:
        return False
    for each in module.modules():
        if isinstance(each, nn.modules.dropout._DropoutNd) and each.p > 0:
            return True
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(each).items()):
            return True
    return False


def _draw_alike(team: TPGroup, device: torch.device) -> None:
    """Give every process the generator of the first, as it is on the device that draws."""
    module = module_of(device)
    own = torch.get_rng_state() if module is None else module.get_rng_state(device)
    first = own.to(device)
    dist.broadcast(first, group=team.group, group_src=0)
    if team.index:
        torch.set_rng_state(first) if module is None else module.set_rng_state(first.cpu(), device)
