"""The state of each rank in a checkpoint: random generators, metrics to be logged, its position in the data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.checkpoint import json_tree
from lumen.core import distributed
from lumen.errors import InexactWarning
from lumen.train.byte_layout import from_bytes, to_bytes
from lumen.train.distributed import ProcessGroupContext
from lumen.train.metric_entries import reweight


class SavedMetrics(NamedTuple):
    """The saved metrics that a rank continues from, and whether each rank continues from metrics of the same names."""

    window: Sequence[Any]
    epoch: Sequence[Any]
    on_all_ranks: bool


def gather_rank_state(group: ProcessGroupContext, own: Mapping[str, Any]) -> dict[str, Any]:
    """On rank 0 the `own` states of all ranks, for the checkpoint that it writes; empty on the others."""
    if group.size == 1:
        return dict(own)
    states: list[Any] | None = [None] * group.size if group.is_main else None
    dist.gather_object(_on_host(own), states, dst=0)  # tensors on a GPU would arrive on the sender's GPU
    if states is None:
        return {}
    copies = {"copies": distributed.row_replicas()} if distributed.row_replicas() > 1 else {}
    return {**states[0], **copies, "ranks": bundle(states[1:])}


def _on_host(own: Mapping[str, Any]) -> dict[str, Any]:
    moved: dict[str, Any] = tree.map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, dict(own))
    return moved


def own_rank_state(
    group: ProcessGroupContext, extra: Mapping[str, Any], processes: int
) -> tuple[Mapping[str, Any], SavedMetrics]:
    """This rank's state in a checkpoint of `processes` ranks, and the metrics that it continues from.

    If the number of processes has changed, `rng` is None and the generators are to be seeded from those of rank 0.
    Rank 0 then takes over all metrics that were not logged yet, weighted as in the run before.
    """
    states: list[Mapping[str, Any]] = [extra, *(unbundle(extra["ranks"]) if "ranks" in extra else [])]
    copies = extra.get("copies", 1)
    if processes == group.size and copies == distributed.row_replicas():
        own = states[group.rank]
        return own, SavedMetrics([own.get("metrics", {})], [own.get("epoch_metrics", {})], on_all_ranks=True)
    if group.is_main:
        warnings.warn(
            f"this run resumes with {group.size} processes, and had {processes}. An lm.Loader keeps its order, but"
            " random numbers such as dropout's will differ. Under lm.seeded they depend on the step alone.",
            InexactWarning,
            stacklevel=2,
        )
    states = states[::copies] if group.is_main else []
    window, epoch = (
        reweight([state.get(name, {}) for state in states], distributed.rows()[1])
        for name in ("metrics", "epoch_metrics")
    )
    return {**extra, "rng": None}, SavedMetrics(window, epoch, on_all_ranks=group.size == 1)


def bundle(values: Sequence[Any]) -> dict[str, Any]:
    """Plain data with tensors as one text and one tensor of bytes, since each array of a checkpoint is a file.

    >>> import torch
    >>> from lumen.train.rank_state import bundle, unbundle
    >>> unbundle(bundle([{"a": torch.ones(2)}, {"b": 1}]))
    [{'a': tensor([1., 1.])}, {'b': 1}]
    """
    packed = json_tree.pack(list(values))
    tensors: list[Tensor] = packed["tensors"]
    specs = [[list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for tensor in tensors]
    data = torch.cat([torch.zeros(1, dtype=torch.uint8), *map(to_bytes, tensors)])  # never empty
    return {"text": json.dumps([packed["text"], specs]), "bytes": data}


def unbundle(bundled: Mapping[str, Any]) -> list[Any]:
    """The inverse of `bundle`."""
    text, specs = json.loads(bundled["text"])
    layout = [("", str(i), tuple(shape), getattr(torch, dtype)) for i, (shape, dtype) in enumerate(specs)]
    tensors = from_bytes(layout, bundled["bytes"][1:]).get("", {})
    values: list[Any] = json_tree.unpack({"text": text, "tensors": list(tensors.values())})
    return values
