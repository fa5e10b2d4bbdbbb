"""Weights that a state on the meta device will have: `init` reads the shards that each rank keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import errors
from lumen.core import distributed
from lumen.core.nested_states import all_slots, map_train_states
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.sharding import ShardSpec
from lumen.errors import StateError, WorldError

SLOT = "pending_weights"

T = TypeVar("T")
Move = Callable[[Tensor], Tensor]  # a tensor, moved to where it is kept


class WeightSource(Protocol):
    """Where the params and buffers of one model come from."""

    def fingerprint(self) -> str:
        """A text that is equal on ranks that read the same files."""

    def read(self, specs: Mapping[str, ShardSpec], seed: int, move: Move) -> dict[str, Tensor]:
        """`move(shard)` for each param and buffer by name; those without a spec are read in full.

        Tensors that no file has are drawn from `seed`. Ranks do not communicate here.
        """


@pytree_dataclass
class PendingWeights:
    """The slot of a state whose params and buffers have not been read yet, all static."""

    source: WeightSource = static()


def source_of(state: Any) -> WeightSource | None:
    """Where the weights of a training state are still to be read from; None where it has them."""
    slot: PendingWeights | None = (getattr(state, "slots", None) or {}).get(SLOT)
    return None if slot is None else slot.source


def with_source(state: Any, source: WeightSource) -> Any:
    """`state`, on the meta device, with the source that its weights are to be read from."""
    return state.replace(slots={**state.slots, SLOT: PendingWeights(source=source)})


def read(state: Any, specs: Mapping[str, ShardSpec], move: Move) -> dict[str, Tensor]:
    """This rank's params and buffers by name: the shards that have `specs`, and the full others.

    All ranks call it, and where one of them cannot read, all raise.
    """
    source = source_of(state)
    assert source is not None
    if distributed.is_dry_run():
        tensors = {**state.params, **state.buffers}
        return {name: move(_empty(x, specs.get(name))) for name, x in tensors.items()}
    values = on_all_ranks(lambda: source.read(specs, int(state.seed), move))
    _check_same(source.fingerprint())
    return values


def check_loaded(state: Any) -> None:
    """Raise `StateError` for a state whose weights have not been read yet."""
    if source_of(state) is not None:
        raise StateError(
            "the params of this state are on the meta device, and its weights have not been read from their files yet."
            " Prepare the state once, with the step it is for: state = step.init(state)"
        )


def filled(state: Any, values: Mapping[str, Tensor], inside: Sequence[Any] = ()) -> Any:
    """`state` with these params and buffers and new optimizer state; the transforms `inside` add their slots again."""
    params = {name: values[name] for name in state.params}
    buffers = {name: values[name] for name in state.buffers}
    state = state.replace(params=params, buffers=buffers, opt_state=state.tx.init(params), slots={})
    for transform in reversed(inside):
        state = transform.init(state)
    return state


def load_unsharded(state: Any, transforms: Sequence[Any]) -> Any:
    """`state` with its full pending weights, unless the `init` of a transform is going to read shards of them."""
    if not any(name == SLOT for name, _ in all_slots(state)):
        return state
    meshes = [t.mesh for t in transforms if hasattr(t, "mesh")]  # this joins the processes, which fail together
    if any(t.reads_pending for t in transforms):
        return state
    device = meshes[0].device if meshes else None

    def load(_: Any, inner: Any) -> Any:
        if source_of(inner) is None:
            return inner
        target = inner.seed.device if device is None else device
        return filled(inner, read(inner, {}, lambda x: x.to(target)))

    return map_train_states(load, state)


def shard_shape(spec: ShardSpec) -> tuple[int, ...]:
    """The shape of the shard that has this spec.

    >>> from lumen.core.sharding import rows_spec
    >>> shard_shape(rows_spec((5, 2), 3, 5, owner=True)), shard_shape(rows_spec((5, 2), 5, 5, owner=True))
    ((2, 2), (0, 2))
    """
    if not spec.boxes:
        return (0, *spec.shape[1:])
    ends = [[a + n for a, n in zip(box.local, box.size, strict=True)] for box in spec.boxes]
    return tuple(map(max, zip(*ends, strict=True)))


def read_shard(spec: ShardSpec | None, read_slices: Callable[[tuple[slice, ...]], Tensor]) -> Tensor:
    """The shard that has this spec, from a function that reads a block of the full tensor; None is all of it."""
    if spec is None:
        return read_slices(())
    blocks = [
        read_slices(tuple(slice(a, a + n) for a, n in zip(box.full, box.size, strict=True))) for box in spec.boxes
    ]
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return read_slices((slice(0, 0), *(slice(0, n) for n in spec.shape[1:])))
    shard = blocks[0].new_empty(shard_shape(spec))
    for box, block in zip(spec.boxes, blocks, strict=True):
        shard[tuple(slice(a, a + n) for a, n in zip(box.local, box.size, strict=True))] = block
    return shard


def on_all_ranks(run: Callable[[], T]) -> T:
    """`run()`, which all ranks call; where it fails on one of them, an error is raised on every rank.

    >>> on_all_ranks(lambda: 3)
    3
    """
    error: Exception | None = None
    try:
        result = run()
    except Exception as raised:
        error = raised
    if distributed.world_size() > 1 and not distributed.is_dry_run():
        failures: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(failures, None if error is None else (type(error).__name__, str(error)))
        rank, failure = next(((r, f) for r, f in enumerate(failures) if f is not None), (0, None))
        if failure is not None and error is None:
            kind = getattr(errors, failure[0], errors.WorldError)
            raise kind(f"rank {rank} failed: {failure[1]}")
    if error is not None:
        raise error
    return result


def _check_same(fingerprint: str) -> None:
    """Raise `WorldError`, on every rank, unless all have the same fingerprint."""
    if distributed.world_size() == 1:
        return
    fingerprints: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(fingerprints, fingerprint)
    other = next((rank for rank, text in enumerate(fingerprints) if text != fingerprints[0]), None)
    if other is not None:
        raise WorldError(
            f"rank {other} has read other files than rank 0, so that their shards are not of one model. Copy the same"
            " directory to all machines."
        )


def _empty(like: Tensor, spec: ShardSpec | None) -> Tensor:
    return torch.empty(like.shape if spec is None else shard_shape(spec), dtype=like.dtype)
