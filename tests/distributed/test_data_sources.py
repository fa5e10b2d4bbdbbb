"""The table of docs/data.md: each source of data gives each row once, says what it cannot keep, or is refused by name.

One process and two, a run that goes on in the middle of an epoch and at its end, in this process and with workers.
"""

from __future__ import annotations

import multiprocessing
import random
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler

import lumen as lm
from lumen.checkpoint import json_tree
from lumen.core import distributed
from lumen.data.adapters import make_feed
from lumen.errors import BatchError, InexactWarning
from lumen.parallel.ddp.ddp import ddp
from tests.distributed.data_sources import (
    ALL,
    LOST,
    NONE,
    REFUSED,
    SAID,
    SOURCES,
    SPENT,
    N,
    Stream,
    grain_iter,
    grain_loader,
    grain_map,
    markdown,
    stateful,
    stream,
)
from tests.tiers import pick

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore::lumen.InexactWarning"),
]

EPOCHS = 2
CASES = [(name, n) for name, source in SOURCES.items() for n in ((0, 2) if source.workers is not NONE else (0,))]
# Under `make test` some have no workers here, as each takes seconds to start: Grain's, which have a test of their own,
# and on two processes all but these.
SHORT = [(name, n) for name, n in CASES if n == 0 or "grain" not in name]
WITH_WORKERS = ("`lm.Loader`", "Hugging Face map-style, in `lm.Loader`")


def make(name, workers):
    return SOURCES[name].make(**{"num_workers": workers} if workers else {})


def rows(batch):
    return torch.as_tensor(np.asarray(batch["x"] if isinstance(batch, dict) else batch)).reshape(-1).tolist()


def read(data, *, epoch=0, position=0, state=None, batches=10**9, epochs=EPOCHS):
    """The rows of each epoch as `fit` would read them, and where it stopped with the state for a checkpoint."""
    each, found = make_feed(data), {}
    if state is not None:
        each.load_state_dict(json_tree.unpack(state))
    while epoch < epochs and batches:
        for batch in each.epoch(epoch, position):
            found.setdefault(epoch, []).append(rows(batch))
            position, batches = position + 1, batches - 1
            if not batches and position != each.length:
                return found, epoch, position, json_tree.pack(each.state_dict(epoch, position))
        epoch, position = epoch + 1, 0
    return found, epoch, 0, json_tree.pack(each.state_dict(epoch, 0))


def once(found):
    return {epoch: sorted(row for batch in batches for row in batch) for epoch, batches in found.items()}


def said(function, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InexactWarning)
        result = function(*args, **options)
    return result, [str(each.message) for each in caught if each.category is InexactWarning]


def test_the_table_of_the_docs_is_this_one():
    page = Path(__file__).parents[2] / "docs" / "data.md"
    assert markdown() in page.read_text(), f"{page.name} lacks this table:\n{markdown()}"


@pytest.mark.parametrize(("name", "workers"), pick(SHORT, CASES))
def test_one_process_and_a_run_that_goes_on(name, workers):
    source = SOURCES[name]
    generator = source.end is SPENT
    torch.manual_seed(1)
    whole, *_ = read(make(name, workers))
    assert once(whole) == {0: ALL} if generator else {0: ALL, 1: ALL}

    torch.manual_seed(1)
    before, *place, state = read(make(name, workers), batches=2)
    assert place == [0, 2]
    torch.manual_seed(2)
    (after, *_), words = said(
        read, make(name, workers), epoch=0, position=2, state=state, epochs=1 if generator else EPOCHS
    )
    joined = {0: before[0] + after[0], **({} if generator else {1: after[1]})}
    if source.middle.outcome == LOST:
        missing = set(ALL) - set(once(joined)[0])
        assert 0 < len(missing) <= 4
        assert "shuffle buffer of 4 rows" in words[0]
        assert once(joined)[1] == ALL, "the next epoch is whole"
    else:
        assert once(joined) == once(whole)
        assert joined[0] == whole[0], "in the same order"
        assert bool(words) == (source.middle.outcome == SAID or bool(workers and source.workers.outcome == SAID)), words

    whole_epoch, epoch, position, state = read(make(name, workers), batches=sum(len(each) > 0 for each in whole[0]))
    assert once(whole_epoch) == {0: ALL}
    later, *_ = read(make(name, workers), epoch=epoch, position=position, state=state)
    assert once(later) == ({} if source.end.outcome == REFUSED else {1: ALL}), (
        "the next epoch, whole; none of a generator"
    )


def test_workers_of_grain_go_on():
    data = make_feed(grain_iter(2))
    batches = [rows(batch) for batch in data.epoch(1)]
    assert once({1: batches}) == {1: ALL}
    state = json_tree.pack(data.state_dict(1, 2))
    (after, *_), words = said(read, grain_iter(2), epoch=1, position=2, state=state)
    assert after == {1: batches[2:]}
    assert not words


# ----------------------------------------------------------------------------------------------- two processes


def seeded(rank=0):
    """Each rank's global generators are at another place, as after dropout."""
    torch.manual_seed(10 + rank)


@contextmanager
def workers_are_forked():
    """As under torchrun; a process of the pool was itself started by a fork server, and would start workers so."""
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(method, force=True)


def read_on_two(cases):
    found = {}
    with workers_are_forked():
        for name, workers in cases:
            try:
                seeded(distributed.rank())
                whole, *_ = read(make(name, workers))
                seeded(distributed.rank())
                before, epoch, position, state = read(make(name, workers), batches=2)
                seeded(50 + distributed.rank())
                (after, *_), words = said(read, make(name, workers), epoch=epoch, position=position, state=state)
                found[name, workers] = whole, before, after, words
            except BatchError as error:
                found[name, workers] = str(error)
    return found


def test_two_processes(world2):
    cases = pick([case for case in CASES if case[1] == 0 or case[0] in WITH_WORKERS], CASES)
    first, second = world2.run(read_on_two, cases)
    for name, workers in cases:
        source, (mine, other) = SOURCES[name], (first[name, workers], second[name, workers])
        if source.two.outcome == REFUSED:
            assert "lm.data.per_rank(data)" in mine, mine
            assert "rank 1 of 2" in other
            continue
        assert not isinstance(mine, str), mine
        whole = {epoch: mine[0][epoch] + other[0][epoch] for epoch in range(EPOCHS)}
        assert once(whole) == dict.fromkeys(range(EPOCHS), ALL), (name, workers)
        gone_on = {
            0: [*mine[1][0], *mine[2].get(0, []), *other[1][0], *other[2].get(0, [])],
            1: mine[2][1] + other[2][1],
        }
        if source.middle.outcome != LOST:
            assert once(gone_on) == once(whole), (name, workers)
        assert bool(mine[3]) >= (source.middle.outcome in (SAID, LOST))
        if source.is_cut:
            seeded()
            alone, *_ = read(make(name, workers))
            parts = {epoch: [a + b for a, b in zip(mine[0][epoch], other[0][epoch], strict=True)] for epoch in alone}
            assert parts == alone, "the batches of one process, cut"


class ByHand(Sampler):
    """Draws as it goes, from Python's global generator."""

    def __len__(self):
        return N

    def __iter__(self):
        left = list(ALL)
        while left:
            yield left.pop(random.randrange(len(left)))


def odd_cases():
    """What a rank gets of data that is declared, or is not what it should be: rows, or the error's words."""
    import datasets.distributed

    rank = distributed.rank()
    cases = {
        "distributed sampler": lambda: DataLoader(ALL, batch_size=5, sampler=DistributedSampler(ALL, 2, rank)),
        "of another rank": lambda: DataLoader(ALL, batch_size=5, sampler=DistributedSampler(ALL, 4, rank)),
        "repeating": lambda: DataLoader(ALL[:9], batch_size=5, sampler=DistributedSampler(ALL[:9], 2, rank)),
        "own rows": lambda: lm.data.per_rank([torch.tensor(ALL[rank::2])]),
        "own loader": lambda: lm.data.per_rank(DataLoader(ALL[rank::2], batch_size=5)),
        "other lengths": lambda: DataLoader(ALL[: 9 + rank], batch_size=5),
        "sampler by hand": lambda: DataLoader(ALL, batch_size=3, sampler=ByHand()),
        "batches": lambda: DataLoader(torch.arange(N), batch_size=None, sampler=[[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]),
        "no batches": lambda: DataLoader(ALL, batch_size=None),
        "unlike orders": lambda: DataLoader(ALL, batch_size=3, sampler=ALL if rank else ALL[::-1]),
        "unseeded": lambda: stream(buffer_size=4).batch(3),
        "split": lambda: datasets.distributed.split_dataset_by_node(stream(), rank=rank, world_size=2).batch(3),
        "split wrongly": lambda: datasets.distributed.split_dataset_by_node(
            stream(), rank=1 - rank, world_size=2
        ).batch(3),
        "loader of one": lambda: lm.Loader(ALL[rank::2], batch_size=3, rank=0, world_size=1),
        "loader of another": lambda: lm.Loader(ALL, batch_size=3, rank=1 - rank, world_size=2),
        "grain slices": lambda: grain_map()[rank::2].batch(3),
        "grain, own slices": lambda: lm.data.per_rank(grain_map()[rank::2].to_iter_dataset().batch(3)),
        "grain, different records": lambda: type(grain_map()).source(ALL[rank:] + ALL[:rank]).batch(3),
        "grain, all in one shard": lambda: grain_loader(shard=(0, 1)),
        "grain, another shard": lambda: grain_loader(shard=(1 - rank, 2)),
        "grain, uneven shards": lambda: grain_loader(records=N - 1),
        "grain, rest dropped": lambda: grain_loader(records=N - 1, drop_remainder=True),
    }
    found = {}
    for name, data in cases.items():
        torch.manual_seed(rank)
        try:
            (batches, *_), words = said(read, data(), epochs=1)
            found[name] = sorted(row for batch in batches[0] for row in batch), words
        except BatchError as error:
            found[name] = str(error)
    return found


def test_what_is_declared_and_what_cannot_be_right(world2):
    first, second = world2.run(odd_cases)
    for name in (
        "distributed sampler",
        "own rows",
        "own loader",
        "sampler by hand",
        "batches",
        "split",
        "loader of one",
        "grain, own slices",
    ):
        assert not isinstance(first[name], str), (name, first[name])
        assert sorted(first[name][0] + second[name][0]) == ALL, name
        assert not first[name][1], name
    assert len(first["repeating"][0]) == len(second["repeating"][0]) == 5
    assert "repeats 1 rows" in first["repeating"][1][0]
    for name, words in {
        "of another rank": "rank 0 of 4",
        "other lengths": r"data sets of [9, 10] rows",
        "no batches": "batch_size=None",
        "unlike orders": "orders that begin with [[9, 8, 7], [0, 1, 2]]",
        "unseeded": "same seed on each",
        "grain slices": "(SliceMapDataset[0:10:2] of 5 / SliceMapDataset[1:10:2] of 5)",
        "grain, all in one shard": "ShardOptions(shard_index=lm.rank(), shard_count=lm.world_size())",
        "grain, uneven shards": "9 records into 2 shards",
        "grain, different records": "different records",
    }.items():
        assert words in first[name], (name, first[name])
        assert isinstance(second[name], str)
    for name in ("split wrongly", "loader of another", "grain, another shard"):
        assert "rank 0 of 2" in second[name], (name, second[name])
    assert len(first["grain, rest dropped"][0]) == len(second["grain, rest dropped"][0]) == 4


def go_on_alone_or_not():
    """Two steps of two processes: the states for a checkpoint."""
    states = {}
    for name, data in {
        "DataLoader": lambda: DataLoader(ALL, batch_size=3, shuffle=True),
        "list": lambda: lm.data.per_rank(list(torch.arange(N).split(3))),
        "grain": lambda: grain_map().batch(3),
    }.items():
        seeded(distributed.rank())
        states[name] = read(data(), batches=2)[3]
    return states


def test_another_number_of_processes(world2):
    states = world2.run(go_on_alone_or_not)[0]
    seeded()
    whole, *_ = read(DataLoader(ALL, batch_size=3, shuffle=True))
    seeded(70)
    after, *_ = read(DataLoader(ALL, batch_size=3, shuffle=True), position=2, state=states["DataLoader"], epochs=1)
    assert after[0] == whole[0][2:]
    whole, *_ = read(grain_map().batch(3))
    after, *_ = read(grain_map().batch(3), position=2, state=states["grain"], epochs=1)
    assert after[0] == whole[0][2:]
    with pytest.raises(BatchError, match="was saved by 2"):
        read(list(torch.arange(N).split(3)), position=2, state=states["list"])


# ----------------------------------------------------------------------------------------------- the law


def squared(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, batch[0])
        return lm.Mean.of((out - batch[0].sum(1, keepdim=True)).square().mean(1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def counted(state, batch):
    return {"rows": lm.Sum.of(torch.ones(len(batch[0]))), "total": lm.Sum.of(batch[0])}


def train_on_a_torch_loader():
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    state = lm.TrainState.create(torch.nn.Linear(2, 1).double(), lm.optim.adam(0.1))
    runner = lm.Runner(squared, transforms=[ddp(lm.mesh(device="cpu"))], progress=False)
    seeded(distributed.rank())
    data = DataLoader(TensorDataset(x), batch_size=3, shuffle=True)
    held_out = DataLoader(TensorDataset(x), batch_size=3)
    result = runner.fit(state, data, until=lm.Epochs(3), validate=lm.Validate(counted, held_out))
    predicted = runner.predict(lambda state, batch: batch[0], result.state, held_out)
    measured = runner.evaluate(counted, result.state, held_out)
    few = runner.overfit(state, data, batches=2, until=lm.Steps(4)).clock.rows
    numbers = {**measured, "trained": result.clock.rows, "validated": result.metrics["val/rows"], "few": few}
    refused = []
    if distributed.world_size() > 1:
        for ask in (runner.evaluate, runner.predict, runner.overfit):
            try:
                ask(*([counted] * (ask != runner.overfit)), state, [(x,)])
            except BatchError as error:
                refused.append("lm.data.per_rank(data)" in str(error))
    return {name: leaf.clone() for name, leaf in result.state.params.items()}, numbers, predicted, refused


def test_a_torch_loader_on_two_processes_trains_as_on_one(world2):
    params, numbers, rows, _ = train_on_a_torch_loader()
    assert (numbers["trained"], numbers["rows"], numbers["few"]) == (3 * N, N, 12)
    found = world2.run(train_on_a_torch_loader)
    for leaves, counts, _, refused in found:
        assert counts == pytest.approx(numbers, rel=1e-12)
        assert refused == [True] * 3
        for name, leaf in params.items():
            torch.testing.assert_close(leaves[name], leaf, rtol=1e-9, atol=1e-11)
    both = torch.cat([each[2] for each in found])
    assert len(both) == N
    assert torch.equal(both.sort(0).values, rows.sort(0).values), "each rank predicts its own rows"


# ----------------------------------------------------------------------------------------------- the run


def keep(state, batch):
    return state, {"rows": lm.Sum.of(torch.as_tensor(batch))}


def fit(data, until, directory, **options):
    state = {"at": torch.zeros(())}
    runner = lm.Runner(keep, checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=1)), progress=False)
    return runner.fit(state, data, until=until, resume="auto", **options)


@pytest.mark.parametrize("make_data", [lambda: stateful(ALL, shuffle=True), lambda: DataLoader(ALL, batch_size=3)])
def test_a_run_that_was_stopped_at_the_last_batch_of_an_epoch_goes_on(make_data, tmp_path):
    assert fit(make_data(), lm.Steps(4), tmp_path).clock.epoch == 1
    assert fit(make_data(), lm.Steps(10), tmp_path).clock.step == 10


def test_a_run_that_finds_no_batch_where_some_are_due_is_an_error(tmp_path):
    parts = torch.arange(N).split(3)
    assert fit(iter(parts), lm.Epochs(5), tmp_path / "a").reason == "the data ended after 1 epochs"
    with pytest.raises(BatchError, match="gave no batch, although it is to train until Epochs\\(5\\)"):
        fit(iter(parts), lm.Epochs(5), tmp_path / "a")
    fit(parts, lm.Steps(3), tmp_path / "b")
    with pytest.raises(BatchError, match="resumes at batch 3"):
        fit(parts[:2], lm.Steps(9), tmp_path / "b")


class Stuck(Stream):
    """Begins each later epoch where its loaded state says."""

    set_epoch = None
    at = start = 0

    def __iter__(self):
        for row in range(self.start, N):
            self.at = row + 1
            yield row

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.start = state["at"]


def test_an_epoch_that_begins_in_the_middle_is_an_error():
    before, epoch, position, state = read(stateful(Stuck()), batches=2)
    assert before == {0: [[0, 1, 2], [3, 4, 5]]}
    with pytest.raises(BatchError, match="began a new epoch at batch 2"):
        read(stateful(Stuck()), epoch=epoch, position=position, state=state, epochs=3)
