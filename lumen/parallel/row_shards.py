"""Row fields of a state, sharded over the ranks of a mesh: each rank has the rows that it also receives of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lumen.core import distributed, row_fields
from lumen.core.donation import is_retired
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.sharding import ShardingSlot, ShardSpec, rows_spec
from lumen.core.step import StepFn, with_slot, without_slot
from lumen.errors import BatchError, StateError
from lumen.parallel.comm import collectives, consistency
from lumen.parallel.comm.mesh import Mesh

SLOT = "row_field"


@pytree_dataclass
class RowShards(ShardingSlot):
    """The slot of row fields, all static: the global number of rows of each leaf, by its path, over `size` shards.

    `owner` is the name of the transform that shards them.
    """

    rows: tuple[tuple[str, int], ...] = static()
    size: int = static()
    owner: str = static()


def check(state: Any) -> None:
    """Raise `StateError` for a row field that has a leaf without rows."""
    for path, leaf in row_fields.named(state):
        if not isinstance(leaf, Tensor) or not leaf.dim():
            text = "a tensor without dims" if isinstance(leaf, Tensor) else f"{leaf!r:.40}, a {type(leaf).__name__}"
            raise StateError(
                f"state.{path} is {text}, and an lm.row_field() holds tensors with an entry for each row along their"
                " first dim. Put it into a field of its own, without lm.row_field()."
            )


def is_sharded(state: Any) -> bool:
    """Whether the row fields of `state` are this rank's already."""
    return SLOT in getattr(state, "slots", ())


def check_size(state: Any, mesh: Mesh) -> None:
    """Raise `StateError` where the row fields of `state` were sharded over another number of ranks."""
    size = mesh.size("data", "shard")
    if is_sharded(state) and state.slots[SLOT].size != size:
        raise StateError(
            f"the row fields of this state were sharded over {state.slots[SLOT].size} ranks, and {mesh!r} has {size}."
            " Gather it with the step that prepared it: state = step.export(state)"
        )


def shard(state: Any, mesh: Mesh, owner: str) -> Any:
    """`state`, which passed `check`, with this rank's rows of the first rank's row fields."""
    group = mesh.group("data", "shard")
    without_rows, leaves = row_fields.split_off(state)
    if group is None or not leaves:
        return state
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    shards = [_own_rows(leaf, rank, size) for leaf in consistency.broadcast(leaves, group)]
    rows = tuple((path, len(leaf)) for path, leaf in row_fields.named(state))
    return with_slot(row_fields.joined(without_rows, shards), SLOT, RowShards(rows=rows, size=size, owner=owner))


def unshard(state: Any, mesh: Mesh) -> Any:
    """The inverse of `shard`, on every rank."""
    if not is_sharded(state):
        return state
    check_counts(state, mesh)
    group, totals = mesh.group("data", "shard"), _totals(state)
    assert group is not None
    without_rows, _ = row_fields.split_off(state)
    gathered = [_all_gather(leaf, totals[path], group) for path, leaf in row_fields.named(state)]
    return without_slot(row_fields.joined(without_rows, gathered), SLOT)


def specs(state: Any, mesh: Mesh) -> dict[int, ShardSpec]:
    """Which rows this rank has of each row leaf, by its index among `tree.leaves(state)`."""
    if not is_sharded(state):
        return {}
    check_counts(state, mesh)
    (rank, size), totals = _share(mesh), _totals(state)
    row_specs = {}
    for index, (path, leaf) in zip(row_fields.indices(state), row_fields.named(state), strict=True):
        start, stop = distributed.shard_bounds(totals[path], rank, size)
        shape = (totals[path], *leaf.shape[1:])
        row_specs[index] = rows_spec(shape, start, stop, owner=not mesh.index("tensor") and not mesh.index("pipeline"))
    return row_specs


def checked(step: StepFn, mesh: Callable[[], Mesh]) -> StepFn:
    """`step`, which must keep this rank's number of rows in each row field."""

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        try:
            new, metrics = step(state, batch)
        except BatchError as error:
            if not is_retired(state) and row_fields.declared(state):
                error.add_note(_explanation(state, mesh()))
            raise
        if is_sharded(new):
            check_counts(new, mesh())
        return new, metrics

    return run


def check_counts(state: Any, mesh: Mesh) -> None:
    """Raise `StateError` where a row leaf does not have this rank's number of rows."""
    (rank, size), totals = _share(mesh), _totals(state)
    for path, leaf in row_fields.named(state):
        start, stop = distributed.shard_bounds(totals[path], rank, size)
        if not leaf.dim() or len(leaf) != stop - start:
            raise StateError(
                f"state.{path} has the shape {tuple(leaf.shape)}, and this rank's shard of its {totals[path]} rows is"
                f" {stop - start}: an lm.row_field() keeps its number of rows from step to step. Give batches of"
                f" {totals[path]} rows (lm.Loader(..., drop_last=True)), and create the state with as many."
            )


def _totals(state: Any) -> Mapping[str, int]:
    record: RowShards = state.slots[SLOT]
    return dict(record.rows)


def _share(mesh: Mesh) -> tuple[int, int]:
    group = mesh.group("data", "shard")
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _own_rows(leaf: Tensor, rank: int, size: int) -> Tensor:
    start, stop = distributed.shard_bounds(len(leaf), rank, size)
    return leaf[start:stop].detach().clone()


def _all_gather(leaf: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
    """All rows, from each rank's."""
    size = dist.get_world_size(group)
    bounds = [distributed.shard_bounds(total, rank, size) for rank in range(size)]
    return collectives.all_gather_rows(leaf.detach(), [stop - start for start, stop in bounds], group)()


def _explanation(state: Any, mesh: Mesh) -> str:
    if not is_sharded(state):
        has_ranks = mesh.group("data", "shard") is not None
        return "The state has row fields, and was not prepared: state = step.init(state)" if has_ranks else ""
    totals = _totals(state)
    shards = [f"{len(leaf)} of the {totals[path]} rows of state.{path}" for path, leaf in row_fields.named(state)]
    return (
        f"This rank holds {', '.join(shards)}. Create the state with the rows of the global batch: each rank keeps as"
        " many as lm.Loader gives it of a batch."
    )
