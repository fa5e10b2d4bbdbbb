"""`ProcessGroupContext`: what a run does together with its other processes; alone, it does nothing.

Whatever branches the loop is decided by all alike. Most of it is, as all see the same numbers; what one process alone
knows (a signal, the time, whether a checkpoint is among the best) is told to the others: at a *meeting* between two
steps, or where all come together anyway.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from lumen import tree
from lumen.checkpoint import json_tree, rng
from lumen.core import distributed
from lumen.core.metrics import GlobalMean, as_value, is_value, merge_metrics
from lumen.core.step import Transform, device_of
from lumen.errors import BatchError, InexactWarning, MetricError, WorldError
from lumen.parallel.comm.init import check_launcher, launched
from lumen.parallel.comm.rank_monitor import RankMonitor
from lumen.train.metric_buffer import Entry, adopted, parts, rebuilt

Layout = list[tuple[str, str, tuple[int, ...], torch.dtype]]

_runs = itertools.count()  # the same in each process, as all make the same runs


class ProcessGroupContext:
    """The processes of one run, as this one sees them: `first` does what is done once."""

    def __init__(self, state: Any) -> None:
        self.rank, self.size = distributed.rank(), distributed.world_size()
        self.first = self.rank == 0
        self._device = device_of(state)
        self._watch: RankMonitor | None = None
        self._layouts: dict[str, Layout] = {}
        self._told = False

    def __enter__(self) -> Self:
        """Watch over the others from here on."""
        if self.size > 1:
            store = PrefixStore(f"lumen/{next(_runs)}", dist.distributed_c10d._get_default_store())
            self._watch = RankMonitor(store, self.rank, self.size)
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self.failed(error, "outside of its steps")
        finally:
            if self._watch is not None:
                self._watch.close()

    # ---------------------------------------------------------------------------------------- between steps

    def begins(self, step: int) -> None:
        """This process is about to make the step after `step`."""
        if self._watch is not None:
            self._watch.working = step + 1

    def ends(self) -> None:
        """It has made it."""
        if self._watch is not None:
            self._watch.working = 0

    def should_sync(self, step: int) -> bool:
        """Whether all meet now, after `step`."""
        return self._watch is not None and self._watch.should_sync(step)

    def call(self) -> None:
        """Ask for a meeting soon."""
        if self._watch is not None:
            self._watch.call()

    def end_epoch(self, epoch: int, step: int) -> None:
        """Raise `BatchError` unless the data of all ended after `step`."""
        if self._watch is not None:
            self._watch.agree("epoch", epoch, step)

    def wait(self) -> None:
        """Until all are here, however long that takes."""
        if self._watch is not None:
            self._watch.agree("wait", 0)

    def failed(self, error: BaseException, where: str) -> BaseException:
        """Tell the others of `error`; gives what is to be raised: another's error where that is behind this one."""
        if self._watch is None or self._told:
            return error
        self._told = True
        behind = self._watch.explain(error)
        if behind is not None:
            return behind
        self._watch.fail(f"{where}: {type(error).__name__}: {error}")
        return error

    # ---------------------------------------------------------------------------------------- together

    def broadcast_object(self, value: Any) -> Any:
        """What the first process has, which is plain data."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._device)
        return box[0]

    def counted(self, seconds: float, counts: Sequence[int]) -> tuple[float, list[int]]:
        """The seconds of the first process, and the sums of what each has counted in its rows, in one exchange.

        Of processes that are handed the same rows one counts.
        """
        mine = [
            seconds if self.first else 0.0,
            *(counts if self.rank % distributed.tp_degree() == 0 else [0] * len(counts)),
        ]
        box = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(box)
        found = box.tolist()
        return found[0], [int(each) for each in found[1:]]

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def any_rank_value(self, value: str) -> str:
        """The value of the lowest rank that has one; almost always none has, which costs one number."""
        if self.size == 1:
            return value
        flag = torch.tensor([bool(value)], dtype=torch.int32, device=self._device)
        dist.all_reduce(flag)
        return next(filter(None, self.all_gather_object(value)), "") if int(flag) else ""

    def any(self, value: bool) -> bool:
        """Whether it is so for some process."""
        return bool(self.any_rank_value("yes" if value else ""))

    def assert_same_on_all_ranks(self, length: int | None) -> None:
        """Raise `BatchError` where the processes know that their epochs have different numbers of batches."""
        lengths = self.all_gather_object(length)
        if len({each for each in lengths if each is not None}) > 1:
            raise BatchError(
                f"ranks have different numbers of batches in an epoch: {lengths}. Each must have the same, as every"
                " step is made by all: give lm.Loader the whole data set (it cuts each batch by rank), or limit="
                f"{min(each for each in lengths if each is not None)}."
            )

    # ---------------------------------------------------------------------------------------- checkpoints

    def gathered(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """For a checkpoint that the first process writes: what each has of its own."""
        if self.size == 1:
            return dict(mine)
        found: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(dict(mine), found, dst=0)
        if found is None:
            return {}
        alike = {"copies": distributed.tp_degree()} if distributed.tp_degree() > 1 else {}
        return {**found[0], **alike, "ranks": bundle(found[1:])}

    def own(self, extra: Mapping[str, Any], processes: int) -> tuple[Mapping[str, Any], list[Any]]:
        """Of what `gathered` gave in a run of `processes`, this process's part, and the meters it goes on from.

        Where the number of processes has changed, random generators are seeded anew from those of the first, and
        metrics that were not logged yet are all taken over by the first process, weighed as in the run before.
        """
        others = unbundled(extra["ranks"]) if "ranks" in extra else []
        every: list[Mapping[str, Any]] = [extra, *others]
        copies = extra.get("copies", 1)
        if processes == self.size and copies == distributed.tp_degree():
            mine = every[self.rank]
            return mine, [mine.get("meter", {})]
        if self.first:
            warnings.warn(
                f"this run goes on with {self.size} processes, and had {processes}: the order of the data stays that of"
                " an lm.Loader, while random numbers such as dropout's are drawn anew. With lm.seeded they follow"
                " from the step.",
                InexactWarning,
                stacklevel=2,
            )
        meters = [each.get("meter", {}) for each in every[::copies]] if self.first else []
        return {**extra, "rng": None}, adopted(meters, distributed.rows()[1])

    def restore_random(self, own: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Put back this process's random generators, or seed them from the first process's."""
        if own["rng"] is not None:
            rng.restore(own["rng"])
            return
        text = extra["rng"]["torch"].numpy().tobytes() + "{}/{}".format(*distributed.rows()).encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8])
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 (it is the one that user code draws from)

    # ---------------------------------------------------------------------------------------- metrics

    def merged(self, place: str, metrics: Any, finish: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """The numbers that `finish` makes of the metrics of all; None is a process that has none.

        Of processes that are handed the same rows the first counts, and of a `GlobalMean`, which all hold.
        Parts travel as bytes in one all-gather and are merged by each process in the same order, so that all have
        the same numbers to the bit. Where the parts of a `place` are not all of the form that they had before, they
        travel as objects.
        """
        if self.size == 1:
            return {} if metrics is None else finish(metrics)
        metrics = None if metrics is None else tree.map(as_value, metrics, is_leaf=is_value)
        entries = self._entries(place, None if metrics is None else parts(metrics))
        holders = [rank for rank, entry in enumerate(entries) if entry is not None]
        if not holders:
            return {}
        numbers: dict[str, float] = {}
        if metrics is not None:
            _check_names(entries)
            counted = [rebuilt(entries[rank], metrics) for rank in holders if rank % distributed.tp_degree() == 0]
            # The first process comes last: it is the one whose Last counts.
            numbers = finish(merge_metrics([*map(_without_shared, reversed(counted[1:])), counted[0]]))
        if len(holders) < self.size:  # who has none cannot know what they mean
            numbers = self.all_gather_object(numbers)[holders[0]]
        return numbers

    def _entries(self, place: str, mine: Entry | None) -> list[Any]:
        layout = self._layouts.get(place)
        if layout is not None:
            found = self._bytes(layout, mine)
            if found is not None:
                return found
        entries = self.all_gather_object(None if mine is None else _on_host(mine))
        layouts = [None if entry is None else layout_of(entry) for entry in entries]
        if layouts[0] is not None and all(each == layouts[0] for each in layouts):
            self._layouts[place] = layouts[0]
        else:
            self._layouts.pop(place, None)
        return entries

    def _bytes(self, layout: Layout, mine: Entry | None) -> list[Any] | None:
        """The entries of all, or None where one is of another form: its first byte says so."""
        sizes = [prod(shape) * dtype.itemsize for _, _, shape, dtype in layout]
        flat = torch.zeros(1 + sum(sizes), dtype=torch.uint8, device=self._device)
        if mine is not None and layout_of(mine) == layout:
            pieces = [_as_bytes(mine[name][key]).to(self._device) for name, key, _, _ in layout]
            flat[1:] = torch.cat(pieces) if pieces else flat[1:]
        else:
            flat[0] = 1
        rows = list(torch.empty(self.size, len(flat), dtype=torch.uint8, device=self._device))
        dist.all_gather(rows, flat)
        if any(torch.stack([row[0] for row in rows]).tolist()):
            return None
        return [_entry(layout, row[1:].split(sizes)) for row in rows]


def check_world(transforms: Sequence[Transform]) -> None:
    """Raise `WorldError` where torchrun started several processes that would all make the same run, each by itself.

    It can be told only once the transforms have joined the processes.
    """
    if distributed.world_size() > 1:
        if not any(transform.level in ("parallel", "tensor") for transform in transforms) and distributed.rank() == 0:
            warnings.warn(
                f"{distributed.world_size()} processes make this run, and no transform joins what they learn: each"
                " trains on its own rows, and the first one's state is saved. Write lm.Runner(step,"
                " transforms=[lm.ddp()]).",
                InexactWarning,
                stacklevel=3,
            )
        return
    _check_joined()


def join_world(transforms: Sequence[Transform]) -> None:
    """Have parallel transforms join the processes, as `init` does; raise `WorldError` where several stay alone."""
    for transform in transforms:
        if transform.level in ("parallel", "tensor"):
            getattr(transform, "mesh", None)  # made, and with it the world, as it is first asked for
    if distributed.world_size() == 1:
        _check_joined()


def _check_joined() -> None:
    check_launcher()
    if launched() and not distributed.is_distributed() and _asked_for() > 1:
        raise WorldError(
            f"this process is one of {_asked_for()} that were started together, and nothing joins them: each would make"
            " the whole run by itself. Write lm.Runner(step, transforms=[lm.ddp()]), or start one process."
        )


def _asked_for() -> int:
    return int(os.environ["WORLD_SIZE"])


# ----------------------------------------------------------------------------------------------- plain bytes


def bundle(values: Sequence[Any]) -> dict[str, Any]:
    """Plain data with tensors in it as one text and one tensor of bytes: each array of a checkpoint is a file.

    >>> import torch
    >>> from lumen.train.distributed import bundle, unbundled
    >>> unbundled(bundle([{"a": torch.ones(2)}, {"b": 1}]))
    [{'a': tensor([1., 1.])}, {'b': 1}]
    """
    packed = json_tree.pack(list(values))
    tensors: list[Tensor] = packed["tensors"]
    kinds = [[list(each.shape), str(each.dtype).removeprefix("torch.")] for each in tensors]
    data = torch.cat([torch.zeros(1, dtype=torch.uint8), *map(_as_bytes, tensors)])  # never empty
    return {"text": json.dumps([packed["text"], kinds]), "bytes": data}


def unbundled(bundled: Mapping[str, Any]) -> list[Any]:
    """What `bundle` was given."""
    text, kinds = json.loads(bundled["text"])
    layout = [("", str(i), tuple(shape), getattr(torch, dtype)) for i, (shape, dtype) in enumerate(kinds)]
    sizes = [prod(shape) * dtype.itemsize for _, _, shape, dtype in layout]
    entry = _entry(layout, bundled["bytes"][1:].split(sizes)).get("", {})
    found: list[Any] = json_tree.unpack({"text": text, "tensors": list(entry.values())})
    return found


def layout_of(entry: Entry) -> Layout:
    """The form of an entry."""
    return [(name, key, tuple(t.shape), t.dtype) for name, held in entry.items() for key, t in held.items()]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _entry(layout: Layout, pieces: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
    entry: dict[str, dict[str, Tensor]] = {}
    for (name, key, shape, dtype), piece in zip(layout, pieces, strict=True):
        entry.setdefault(name, {})[key] = piece.clone().view(dtype).reshape(shape)  # a copy begins where a dtype may
    return entry


def _on_host(entry: Entry) -> dict[str, dict[str, Tensor]]:
    return {name: {key: t.detach().cpu() for key, t in held.items()} for name, held in entry.items()}


def _without_shared(metrics: Any) -> Any:
    """The metrics of one process without what all hold, which another one gives."""

    def own(value: Any) -> Any:
        return tree.map(torch.zeros_like, value) if isinstance(value, GlobalMean) else value

    return tree.map(own, metrics, is_leaf=is_value)


def _check_names(entries: Sequence[Any]) -> None:
    named = {rank: set(entry) for rank, entry in enumerate(entries) if entry is not None}
    first = next(iter(named))
    for rank, names in named.items():
        if names != named[first]:
            raise MetricError(
                f"ranks return different metrics: {sorted(names ^ named[first])} on rank {rank} or rank {first} alone."
                " Return the same names everywhere, and a value without weight where there is nothing to count."
            )
