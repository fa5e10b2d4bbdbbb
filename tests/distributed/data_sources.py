"""The sources of data in the table of docs/data.md: how each is built, and what the table says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import lumen as lm

N = 10  # batches of 3, 3, 3 and 1: the last one has no row for the second rank
ALL = list(range(N))


class Stream(IterableDataset):
    """Split by worker, as torch requires, but not by rank."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        info = get_worker_info()
        return iter(order if info is None else order[info.id :: info.num_workers])


def stateful(*args, **options):
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(*args, batch_size=3, **options)


def table():
    import datasets

    return datasets.Dataset.from_dict({"x": ALL}).with_format("torch")


def shard_rows(shards):
    for shard in shards:
        for row in ALL[shard::4]:
            yield {"x": row}


def stream(**shuffle):
    import datasets

    rows = datasets.IterableDataset.from_generator(shard_rows, gen_kwargs={"shards": [0, 1, 2, 3]})
    return rows.shuffle(**shuffle) if shuffle else rows


def grain_map():
    import grain

    return grain.MapDataset.source(ALL).seed(3).shuffle()


def grain_iter(num_workers=0):
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=num_workers)
    return grain_map().to_iter_dataset().batch(3).mp_prefetch(options)


def grain_loader(num_workers=0, shard=None, drop_remainder=False, records=N):
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    options = grain.sharding.ShardOptions(*(shard or (lm.rank(), lm.world_size())), drop_remainder)
    sampler = grain.samplers.IndexSampler(records, shard_options=options, shuffle=True, num_epochs=1, seed=0)
    batch = grain.transforms.Batch(3)
    return grain.DataLoader(data_source=ALL, sampler=sampler, operations=[batch], worker_count=num_workers)


ONCE, SAID, LOST, REFUSED = "once", "once, and says what may differ", "says that rows are lost", "refused by name"


class Cell(NamedTuple):
    """What the tests assert about a source, and the words for it in the table of the docs."""

    outcome: str
    words: str


CUT = Cell(ONCE, "once: each batch is sharded by rank")
SPLIT = Cell(ONCE, "once: split by rank")
PER_RANK = Cell(REFUSED, "**refused** until `per_rank`")
SHARDED = Cell(ONCE, "once, with the `ShardOptions` of this rank; else **refused**")
SAME, STATE = Cell(ONCE, "once, the same order"), Cell(ONCE, "once, by its own state")
AGAIN = Cell(SAID, "once, read again, **warns** (1)")
OWN = Cell(SAID, "once, by its own state, **warns** (2)")
BUFFER = Cell(LOST, "rows of the buffer are lost, **warns** (3)")
NEXT, SPENT = Cell(ONCE, "the next epoch"), Cell(REFUSED, "**refused**: it has one epoch")
NONE, NOTHING = Cell("", "—"), Cell(ONCE, "nothing")
RANDOM = Cell(SAID, "random draws after a resume, **warns** (4)")
BATCHES = Cell(ONCE, "which rows form a batch (5)")


@dataclass
class Source:
    """How a source is built, and its row of the table. In one process each row of an epoch is seen once."""

    make: Any
    two: Cell
    middle: Cell
    end: Cell = NEXT
    workers: Cell = NONE  # what differs with worker processes
    is_cut: bool = False  # on several processes it has the batches of one process, each cut by rank


def _source(make, two, middle, end=NEXT, workers=NONE):
    return Source(make, two, middle, end, workers, two is CUT)


SOURCES = {
    "`lm.Loader`": _source(lambda num_workers=0: lm.Loader(ALL, 3, workers=num_workers), CUT, SAME, workers=NOTHING),
    "`DataLoader`, map-style": _source(lambda **w: DataLoader(ALL, 3, shuffle=True, **w), CUT, SAME, workers=RANDOM),
    "`DataLoader`, iterable": _source(lambda **w: DataLoader(Stream(), 3, **w), PER_RANK, AGAIN, workers=NOTHING),
    "`DataLoader`, Hugging Face stream": _source(lambda **w: DataLoader(stream(), 3, **w), SPLIT, AGAIN, NEXT, NOTHING),
    "`StatefulDataLoader`, map-style": _source(lambda **w: stateful(ALL, shuffle=True, **w), CUT, SAME, NEXT, RANDOM),
    "`StatefulDataLoader`, iterable": _source(lambda **w: stateful(Stream(), **w), PER_RANK, OWN, workers=NOTHING),
    "`StatefulDataLoader`, Hugging Face stream": _source(
        lambda **w: stateful(stream(), **w), SPLIT, STATE, workers=NOTHING
    ),
    "Hugging Face map-style, in `lm.Loader`": _source(
        lambda num_workers=0: lm.Loader(table(), 3, workers=num_workers), CUT, SAME, workers=NOTHING
    ),
    "Hugging Face stream": _source(lambda: stream().batch(3), SPLIT, STATE),
    "… with a shuffle buffer": _source(lambda: stream(seed=0, buffer_size=4).batch(3), SPLIT, BUFFER),
    "`grain.MapDataset`": _source(lambda: grain_map().batch(3), CUT, SAME),
    "`grain.IterDataset`": _source(grain_iter, PER_RANK, STATE, workers=BATCHES),
    "`grain.DataLoader`": _source(grain_loader, SHARDED, STATE, workers=BATCHES),
    "a list of batches": _source(lambda: list(torch.arange(N).split(3)), PER_RANK, Cell(ONCE, "once")),
    "a generator": _source(lambda: iter(torch.arange(N).split(3)), PER_RANK, AGAIN, SPENT),
}


def markdown():
    """The table of docs/data.md."""
    head = "data", "several processes", "resumed within an epoch", "resumed at its end", "workers affect"
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, source in SOURCES.items():
        cells = [cell.words for cell in (source.two, source.middle, source.end, source.workers)]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)
