"""`lm.local`: ranks train apart, and an outer optimizer joins them every few steps (local SGD, DiLoCo)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import batching, distributed, row_fields
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.sharding import ShardingSlot, ShardSpec, rows_spec
from lumen.core.step import StepFn, Transform, add_slot, as_step, device_of, field_of, slot, with_slot, without_slot
from lumen.errors import BatchError, OrderError, StateError, printable
from lumen.optim._base import GradientTransformation
from lumen.optim._hyperparams import check_count
from lumen.optim._sgd import sgd
from lumen.parallel.comm import consistency
from lumen.parallel.comm.mesh import Mesh, StepMesh
from lumen.parallel.local.average import average_trees, check_equal_scalars

OUTER = "local_outer"
_DILOCO = sgd(0.7, momentum=0.9, nesterov=True)
_TOGETHER = "its ranks share every gradient, and those of lm.local do not. Write lm.ddp() or lm.fsdp() around it"
_ONE_GRAPH = "it runs several steps as one, and lm.local may have to join the ranks between them"


@pytree_dataclass
class LocalSlot(ShardingSlot):
    """The slot that says that each of `size` ranks has params and optimizer state of its own; all static."""

    size: int = static()
    owner: str = static()


@pytree_dataclass
class OuterState:
    """The slot of the outer optimizer, the same on all ranks: the params that it updates, and its state.

    `steps` counts the steps since the ranks were joined (int64 scalar, on the host).
    """

    params: Any
    opt_state: Any
    steps: Tensor


class local(Transform):
    """Train each rank on its own rows with its own optimizer, and join the ranks every `every` steps.

    In between, no gradient is sent. Then the mean over ranks of how far the params have moved from those of the last
    time is the gradient of the `outer` optimizer, which updates these, and all ranks continue from the result. So it
    takes a fraction of the communication of `lm.ddp`, for ranks with a slow network between them. Without `outer` that
    is DiLoCo's, `lm.optim.sgd(0.7, momentum=0.9, nesterov=True)`; with `lm.optim.sgd(1.0)` params are averaged, as in
    local SGD. The state of the step's own optimizer stays on its rank and is not averaged. Floating-point buffers that
    are trained along, such as BatchNorm's statistics, are averaged, and others take the largest value.

    Declared change: the mathematics, unless `every` is 1, both optimizers are `lm.optim.sgd`, the outer one with a rate
    of 1, and ranks have equally many rows: then it is `lm.ddp`, up to the order of sums.

    Each rank counts the same, however many rows it has. Gradients, losses and metrics are those of this rank's rows;
    the Runner merges metrics when it logs, as under `lm.ddp`. Checkpoints may be made after any step: each rank writes
    its own params and optimizer state, along their first dim, and only a run with the same number of ranks resumes from
    them, exactly. Scalars in the optimizer's state must be the same on all ranks. `step.export(state)` has the params
    of the outer optimizer, of the last time that the ranks were joined, and everything else of the first rank.

    Args:
        mesh: the ranks, by default all of the world along `data`.
        every: how many steps a rank trains by itself.
        outer: the outer optimizer.

    Raises `OrderError` for transforms that it cannot be combined with, `StateError` for a state with row fields or with
    scalars that differ between ranks, `BatchError` for a rank without rows, and `WorldError` where states or steps
    differ.

    Algorithms: Stich 2018, "Local SGD Converges Fast and Communicates Little"; Douillard et al. 2023, "DiLoCo:
    Distributed Low-Communication Training of Language Models".

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     loss_fn = lambda params, batch: lm.Mean.of(state.apply(params, batch)[0] ** 2)
    ...     loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 2.0)
    >>> diloco = lm.local(every=2, outer=lm.optim.sgd(0.5))(step)
    >>> state = diloco.init(lm.TrainState.create(net, lm.optim.sgd(0.25)))
    >>> for _ in range(2):  # from 2 to 1, to 0.5; then the outer optimizer goes half of the way
    ...     state, _ = diloco(state, torch.ones(1, 1))
    >>> state.params["weight"]
    tensor([[1.2500]])
    """

    name = "local"
    level = "parallel"
    reason = "what is inside runs on one rank's rows alone"
    _unshown = ("outer",)
    incompatible: Mapping[str, str] = {
        "dp_sgd": "each rank would add noise of its own, which its privacy budget does not count",
        "ema": "each rank would average its own params. Average those of the outer optimizer over its steps instead",
        "guard": "one rank would skip what the others do not. Write lm.clip(1.0) inside",
        "tensor_parallel": _TOGETHER,
        "context_parallel": _TOGETHER,
        "pipeline": _TOGETHER,
        "unroll": _ONE_GRAPH,
        "ensemble": _ONE_GRAPH,
    }

    def __init__(self, mesh: Mesh | None = None, *, every: int, outer: GradientTransformation | None = None) -> None:
        self.every = check_count("every", every, low=1)
        self.outer = outer
        self._mesh = mesh

    def _new_memory(self) -> StepMesh:
        return StepMesh(self._mesh, "data")

    @property
    def _optimizer(self) -> GradientTransformation:
        return _DILOCO if self.outer is None else self.outer

    @property
    def mesh(self) -> Mesh:
        """The mesh of the constructor, by default all ranks along `data`."""
        memory: StepMesh = self._memory
        return memory.mesh

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self.mesh.group("data", "shard")

    def init(self, state: Any) -> Any:
        """The first rank's state, after a check that all ranks have the same, with the outer optimizer's slot."""
        if OUTER in getattr(state, "slots", ()):
            self._check_size(state)
            return state
        params = field_of(state, "params", "lm.local")
        if any(row_fields.named(state)):
            raise StateError("lm.local keeps no lm.row_field(): write lm.ddp(), or keep the rows in the batch.")
        scalar = next((path for path, leaf in tree.named_tensors(params) if not leaf.dim()), None)
        if scalar is not None:
            raise StateError(
                f"params[{printable(scalar)!r}] is a scalar, and lm.local saves each rank's params along their first"
                " dim. Give it one: torch.nn.Parameter(torch.ones(1))."
            )
        group = self._group
        if group is not None:
            lines = consistency.fingerprint_lines(state, self.within)
            lines += consistency.settings_lines(self._optimizer, "outer")
            consistency.assert_same_on_all_ranks(lines, group, device_of(state), "the processes of lm.local")
            state = consistency.broadcast(state, group)
            record = LocalSlot(size=dist.get_world_size(group), owner=self.name)
            state = with_slot(state, self.name, record)
            params = state.params

        def make() -> OuterState:
            copies = tree.map(lambda p: p.detach().clone(), params)
            return OuterState(copies, self._optimizer.init(copies), torch.zeros((), dtype=torch.int64))

        return add_slot(state, OUTER, make)

    def export(self, state: Any) -> Any:
        """The state with the params of the outer optimizer, and everything else of the first rank."""
        outer: OuterState = slot(state, OUTER)
        state = without_slot(without_slot(state, OUTER), self.name)
        group = self._group
        state = state if group is None else consistency.broadcast(state, group)
        return state.replace(params=tree.map(torch.clone, outer.params))

    def shard_specs(self, state: Any) -> dict[int, ShardSpec]:
        """Each rank's params, optimizer state and buffers as its rows of all ranks' ones."""
        group = self._group
        if group is None or self.name not in getattr(state, "slots", ()):
            return {}
        self._check_size(state)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        specs = {}
        shared = _shared_paths(state)
        for index, (path, leaf) in enumerate(zip(tree.paths(state), tree.leaves(state), strict=True)):
            if isinstance(leaf, Tensor) and leaf.dim() and not path.startswith(shared):
                rows = len(leaf)
                shape = (size * rows, *leaf.shape[1:])
                specs[index] = rows_spec(shape, rank * rows, (rank + 1) * rows, owner=True)
        return specs

    def wrap(self, step: StepFn) -> StepFn:
        """The step on this rank's rows."""
        _check_inside(as_step(step).transforms)
        return step

    def wrap_host(self, step: StepFn) -> StepFn:
        """The step, after which the ranks are joined whenever that is due."""

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            outer: OuterState = slot(state, OUTER)
            self._check_size(state)
            if not batching.count(batch):
                raise BatchError(
                    "this rank has no rows, and lm.local trains each rank by itself. Give every rank some rows:"
                    " lm.Loader(..., drop_last=True)."
                )
            new, metrics = step(state, batch)
            if distributed.is_dry_run():  # whose counter has no value
                return new, metrics
            steps = int(outer.steps) + 1
            if steps == self.every:
                return self._join(new, outer), metrics
            counted = torch.tensor(steps)
            return with_slot(new, OUTER, OuterState(outer.params, outer.opt_state, counted)), metrics

        return run

    def _join(self, state: Any, outer: OuterState) -> Any:
        """The state with which all ranks continue."""
        group = self._group
        movement = tree.map(lambda before, now: before - now, outer.params, state.params)
        buffers = getattr(state, "buffers", None)
        if group is not None:
            check_equal_scalars(state, group)
            movement = average_trees(movement, group)
            if buffers:
                frozen = getattr(getattr(state, "apply_fn", None), "frozen", ())
                joined = average_trees({name: b for name, b in buffers.items() if name not in frozen}, group)
                state = state.replace(buffers={**buffers, **joined})
        params, opt_state = self._optimizer.apply(movement, outer.opt_state, outer.params)
        new = OuterState(params, opt_state, torch.zeros((), dtype=torch.int64))
        return with_slot(state.replace(params=tree.map(torch.clone, params)), OUTER, new)

    def _check_size(self, state: Any) -> None:
        record = state.slots.get(self.name)
        prepared = 1 if record is None else record.size
        size = 1 if self._group is None else dist.get_world_size(self._group)
        if prepared != size:
            raise StateError(
                f"this state was prepared for {prepared} ranks of lm.local, and {self.mesh!r} has {size}. Export it"
                " with the step that prepared it: state = step.export(state)"
            )


def _shared_paths(state: Any) -> tuple[str, ...]:
    """The beginnings of the paths of what is the same on all ranks."""
    frozen = getattr(getattr(state, "apply_fn", None), "frozen", ())
    return (f"slots[{OUTER}]", *(f"buffers[{name}]" for name in frozen))


def _check_inside(transforms: Sequence[Transform]) -> None:
    for inner in transforms:
        if getattr(getattr(inner, "policy", None), "loss_scale", None) is not None:
            raise OrderError(
                f"{inner!r} skips the updates of a rank whose gradient overflows, and under lm.local the others would"
                ' not. Write lm.precision("bf16").'
            )
