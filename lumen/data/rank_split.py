"""Which ranks' rows data has: those of all ranks, which are sharded here, those of this one, or unknown."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lumen.core import distributed
from lumen.core.arguments import describe
from lumen.data import grain
from lumen.data._per_rank import PerRank
from lumen.data.epoch_order import SETTINGS
from lumen.data.hf_streams import is_stream, order_of, split, split_of
from lumen.data.loader import Loader
from lumen.data.nested import name_of, nested, shares
from lumen.errors import BatchError, InexactWarning

_STATEFUL_LOADER = "torchdata.stateful_dataloader.stateful_dataloader"
_ADVICE = (
    "Write lm.Loader(rows, batch_size=…), which shards each batch by rank, or, for rows that are this rank's own,"
    " lm.data.per_rank(data)."
)


def refusal(data: Any) -> str:
    """Why this process cannot train on `data`: it is no iterable of batches, or may have rows of other ranks."""
    source = data.data if isinstance(data, PerRank) else data
    if isinstance(source, str | bytes | Mapping) or not hasattr(source, "__iter__"):
        return (
            f"the data must be an lm.Loader or an iterable of batches, not {describe(source)}."
            " For tensors in memory write lm.Loader(data, batch_size=64)."
        )
    if _are_columns(source):
        return (
            f"the data is a tuple of {len(source)} tensors, each of which would be a batch. Write lm.Loader((x, y),"
            " batch_size=64), whose batches are such tuples. Tensors that are batches go into a list: [x, y]."
        )
    flaw = grain.flaw(source)
    rank, size = distributed.rows()
    if flaw or size == 1 or isinstance(data, PerRank):
        return flaw
    declared = _declared(source)
    if declared:
        return _wrong_share(declared, rank, size)
    if isinstance(source, Loader) or is_table_loader(source) or _stream_of(source) is not None:
        return ""
    kind = grain.kind_of(source)
    if kind == grain.MAP:
        return ""
    fix = grain.advice(source) if kind else _ADVICE
    return (
        f"this process is rank {rank} of {size}, and whose rows this {name_of(source)} has is unknown: if all ranks"
        f" have the same, each row would be trained on, or counted, several times. {fix}"
    )


def _declared(source: Any) -> list[tuple[str, int, int, int]]:
    """The shards that `source` declares: a name, the rank, the world size, and the number of repeated rows."""
    if isinstance(source, Loader):
        return [] if source.share in (None, (0, 1)) else [("lm.Loader", *source.share, 0)]
    if (shard := grain.declared_shard(source)) is not None:
        return [(f"grain {type(source).__name__}", *shard, 0)]
    streams = [data for data in nested(source) if is_stream(data)]
    splits = [("IterableDataset", *shard, 0) for stream in streams if (shard := split_of(stream)) is not None]
    return [*shares(source), *splits]


def _wrong_share(declared: Sequence[tuple[str, int, int, int]], rank: int, size: int) -> str:
    for name, its_rank, its_size, _ in declared:
        if (its_rank, its_size) != (rank, size):
            return (
                f"this process is rank {rank} of {size}, and its {name} gives the rows of rank {its_rank} of"
                f" {its_size}. Give it rank={rank} of {size}, which are lm.rank() and lm.world_size() after"
                " lm.mesh(), or leave the sharding to Lumen."
            )
    return ""


def assert_same_on_all_ranks(source: Any) -> None:
    """Raise `BatchError` if the ranks have different orders of rows; warn if a sampler repeats rows."""
    _check_same_order(source)
    _check_same_pipeline(source)
    _check_repeats(source)


def _check_repeats(source: Any) -> None:
    repeated = max((share.repeats for share in shares(source)), default=0)
    if repeated:
        warnings.warn(
            f"this DistributedSampler repeats {repeated} rows to give all ranks the same number: they count twice."
            " Leave the sampler out, and each batch is sharded by rank, each row once; or write drop_last=True.",
            InexactWarning,
            stacklevel=4,
        )


def _check_same_order(source: Any) -> None:
    stream = _stream_of(source)
    if stream is None or distributed.is_dry_run():
        return
    orders: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(orders, order_of(stream))
    if len(set(orders)) > 1:
        raise BatchError(
            "the ranks shuffle this stream in different orders, so their shards would overlap. Give the shuffle the"
            " same seed on each: stream.shuffle(seed=0, buffer_size=…)."
        )


def _check_same_pipeline(source: Any) -> None:
    if grain.kind_of(source) != grain.MAP or distributed.is_dry_run():
        return
    pipelines: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(pipelines, [grain.layout(source), grain.first_records(source)])
    if all(pipeline == pipelines[0] for pipeline in pipelines):
        return
    layouts = [layout for layout, _ in pipelines]
    lines = [line for line in zip(*layouts, strict=False) if len(set(line)) > 1]
    what = f"different pipelines ({' / '.join(lines[0])})" if lines else "different records"
    raise BatchError(
        f"the ranks have {what} in this grain.MapDataset. Its batches are sharded by rank, so all ranks need the same."
        " Leave out the slices by rank, or, if each rank has its own rows, write lm.data.per_rank(data)."
    )


def is_table_loader(source: Any) -> bool:
    """Whether it is a DataLoader over a map-style data set whose batches are those of its sampler."""
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        return False
    if is_stateful_loader(source):
        return not hasattr(source.dataset, "state_dict")  # torchdata saves such a state
    return type(source).__iter__ is DataLoader.__iter__


def is_stateful_loader(source: Any) -> bool:
    """Whether it is torchdata's loader."""
    return type(source).__name__ == "StatefulDataLoader" and type(source).__module__ == _STATEFUL_LOADER


def _stream_of(source: Any) -> Any:
    """The Hugging Face stream that `source` is or has batches of, if it can be split by rank; else None."""
    if is_stream(source):
        return source
    plain_loader = type(source) is DataLoader or is_stateful_loader(source)
    return source.dataset if plain_loader and is_stream(source.dataset) else None


def split_by_rank(source: Any) -> Any:
    """`source` with this rank's rows of its Hugging Face stream, if that is not split yet; else unchanged."""
    rank, size = distributed.rows()
    stream = _stream_of(source)
    if size == 1 or stream is None or split_of(stream) is not None:
        return source
    split_stream = split(stream, rank, size)
    if stream is source:
        return split_stream
    names = [*SETTINGS, "batch_size", "drop_last", "persistent_workers", "in_order"]
    names += ["snapshot_every_n_steps"] if is_stateful_loader(source) else []
    return type(source)(split_stream, **{name: getattr(source, name) for name in names})


def _are_columns(source: Any) -> TypeGuard[tuple[Any, ...]]:
    """Whether this is a tuple of tensors of different kinds, as inputs and labels are; parts of a split are of one."""
    if type(source) is not tuple or not all(isinstance(x, Tensor | np.ndarray) for x in source):
        return False
    return len({(str(x.dtype), x.shape[1:]) for x in source}) > 1
