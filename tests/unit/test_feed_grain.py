"""Grain's pipelines as data: epochs by their number, any place to go on from, the rows of one rank, and refusals."""

from __future__ import annotations

import gc
import itertools
import threading
import time

import numpy as np
import pytest
import torch

import lumen as lm
from lumen.data import grain as grains
from lumen.data.adapters import make_feed
from lumen.errors import BatchError, InexactWarning
from tests.tiers import pick

grain = pytest.importorskip("grain")
N = 10


class Noise(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return noisy(element, rng)


def noisy(x, rng):
    return x + 100 * int(rng.integers(1, 9))


def rows():
    return grain.MapDataset.source(list(range(N))).seed(3).shuffle().random_map(noisy)


def windows():
    shuffled = rows().to_iter_dataset().pipe(grain.experimental.WindowShuffleIterDataset, window_size=4, seed=1)
    return shuffled.random_map(noisy, seed=2).batch(3)


def loader(epochs=1, sampler=None, batch=3, **shards):
    options = grain.sharding.ShardOptions(**shards) if shards else grain.sharding.NoSharding()
    if sampler is None:
        sampler = grain.samplers.IndexSampler(N, shard_options=options, shuffle=True, num_epochs=epochs, seed=0)
    operations = [Noise(), grain.transforms.Batch(batch)]
    return grain.DataLoader(data_source=list(range(N)), sampler=sampler, operations=operations, shard_options=options)


def elastic():
    return grain.experimental.ElasticIterator(rows(), 3, grain.sharding.NoSharding())


PIPELINES = {
    "map": lambda: rows().batch(3),
    "map, some left out": lambda: rows().batch(3).filter(lambda batch: batch.sum() % 2 == 0),
    "iter": lambda: rows().to_iter_dataset().batch(3),
    "iter, mixed": lambda: grain.IterDataset.mix({"a": rows().to_iter_dataset(), "b": rows().to_iter_dataset()}).batch(
        3
    ),
    "iter, interleaved": lambda: grain.experimental.InterleaveIterDataset(
        [rows().to_iter_dataset(), rows().to_iter_dataset()], cycle_length=2
    ).batch(3),
    "windows": windows,
    "elastic": elastic,
    "loader": loader,
    "loader of two epochs": lambda: loader(2),
    "loader in order": lambda: loader(sampler=grain.samplers.SequentialSampler(N, seed=0)),
}


def lists(batches):
    return [np.asarray(batch).tolist() for batch in batches]


def joined(parts):
    return list(itertools.chain.from_iterable(parts))


@pytest.mark.parametrize("name", PIPELINES)
def test_epochs_differ_and_go_on_from_any_place(name):
    data = make_feed(PIPELINES[name]())
    epochs = [lists(data.epoch(number)) for number in range(2)]
    assert epochs[0] != epochs[1]
    assert lists(data.epoch(0)) == epochs[0]
    places = [(number, position) for number in range(2) for position in range(1, len(epochs[number]) + 1)]
    for number, position in pick([places[0], places[-2], places[-1]], places):
        data = make_feed(PIPELINES[name]())
        batches = data.epoch(number)
        before = lists(next(batches) for _ in range(position))
        state = data.state_dict(number, position)
        data = make_feed(PIPELINES[name]())
        data.load_state_dict(state)
        assert before + lists(data.epoch(number, position)) == epochs[number]


def test_an_epoch_is_the_one_that_grain_has():
    endless = [int(x) for _, x in zip(range(3 * N), rows().repeat(), strict=False)]
    for data in (rows().batch(5), rows().to_iter_dataset().batch(5)):
        for number in range(3):
            assert joined(lists(make_feed(data).epoch(number))) == endless[number * N :][:N]
    assert joined(lists(make_feed(loader(batch=5)).epoch(number)) for number in range(2)) == lists(
        loader(epochs=2, batch=5)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: rows().batch(3),
        lambda: rows().batch(3, batch_fn=lambda values: {"x": np.stack(values), "n": len(values)}),
        lambda: rows().map(lambda x: {"x": np.full(2, x)}).batch(3).map(lambda batch: batch["x"] * 2.0),
    ],
)
def test_the_rows_of_all_ranks_are_the_batch(make):
    def values(batch):
        return (batch["x"] if isinstance(batch, dict) else batch).tolist()

    for number in range(2):
        whole = [values(batch) for batch in grains.open_iterator(make(), number)]
        parts = [[values(batch) for batch in grains.open_iterator(make(), number, (rank, 2))] for rank in range(2)]
        assert [first + second for first, second in zip(*parts, strict=True)] == whole
        assert [len(batch) for batch in parts[1]] == [1, 1, 1, 0]


def test_a_rank_reads_its_own_rows_alone():
    read = []
    data = grain.MapDataset.range(N).map(lambda x: (read.append(x), x)[1]).batch(4)
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grains.open_iterator(data, 0, (1, 2))._map_parent
    assert lists(dataset.to_iter_dataset(reading)) == [[2, 3], [6, 7], [9]]
    assert read == [2, 3, 6, 7, 9]


def test_what_cannot_be_right_is_refused():
    with pytest.raises(BatchError, match="is an iterator of Grain"):
        make_feed(iter(rows().batch(3)))
    with pytest.raises(BatchError, match="is an iterator of Grain"):
        make_feed(iter(loader()))
    windowed = grain.experimental.WindowShuffleMapDataset(grain.MapDataset.range(N), window_size=4, seed=0)
    assert len(set(windowed)) < N, "the fault that is refused"
    with pytest.raises(BatchError, match="window_size=4 over 10 rows"):
        make_feed(windowed.batch(3))
    make_feed(grain.experimental.WindowShuffleMapDataset(grain.MapDataset.range(N), window_size=5, seed=0))
    uneven = {"shard_index": 0, "shard_count": 3}
    assert len(np.concatenate(list(loader(**uneven)))) == 3, "four rows are its share, and three of them come"
    assert "10 records into 3 shards" in grains.flaw(loader(**uneven))
    assert not grains.flaw(loader(**uneven, drop_remainder=True))


def test_workers_need_flags_that_were_parsed(monkeypatch):
    data = rows().to_iter_dataset().batch(3).mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    monkeypatch.setattr(grains, "_flags_are_parsed", lambda: False)
    with pytest.raises(BatchError, match="mark_as_parsed"):
        make_feed(data)
    monkeypatch.setattr(grains, "_flags_are_parsed", lambda: True)
    make_feed(data)


def test_another_pipeline_cannot_go_on():
    data = make_feed(rows().batch(3))
    next(data.epoch(0))
    state = data.state_dict(0, 1)
    for other, words in (
        (rows().batch(4), "BatchMapDataset of 3, and that of the checkpoint had BatchMapDataset of 4"),
        (grain.MapDataset.range(N).shuffle(seed=1).batch(3), "ShuffleMapDataset"),
        (grain.MapDataset.source(list(range(N))).seed(4).shuffle().random_map(noisy).batch(3), "seed 4"),
        (rows().batch(3).to_iter_dataset(), "PrefetchIterDataset"),
    ):
        with pytest.raises(BatchError, match=words):
            make_feed(other).load_state_dict(state)


class Odd(grain.IterDataset):
    """One whose iterator has a state without a plain form."""

    def __iter__(self):
        return OddIterator()


class OddIterator(grain.DatasetIterator):
    def __init__(self):
        super().__init__()
        self._count = 0

    def __next__(self):
        if self._count == 4:
            raise StopIteration
        self._count += 1
        return np.full(2, self._count)

    def get_state(self):
        return {"count": {self._count}}

    def set_state(self, state):
        raise NotImplementedError


def test_a_state_without_a_plain_form_is_left_out_and_the_batches_are_read_again():
    data = make_feed(Odd())
    batches = data.epoch(0)
    before = [next(batches), next(batches)]
    with pytest.warns(InexactWarning, match="is not in the checkpoint: its state.* is a set"):
        state = data.state_dict(0, 2)
    data = make_feed(Odd())
    data.load_state_dict(state)
    with pytest.warns(InexactWarning, match="read again and dropped"):
        assert lists(before) + lists(data.epoch(0, 2)) == [[1, 1], [2, 2], [3, 3], [4, 4]]


class Plain:
    """A sampler that knows no epochs."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        if index >= N:
            raise IndexError(index)
        return grain.RecordMetadata(index=index, record_key=N - 1 - index, rng=np.random.default_rng(index))


class Rotating(Plain):
    epoch = 0

    def set_epoch(self, number):
        self.epoch = number

    def __getitem__(self, index):
        rng = super().__getitem__(index).rng
        return grain.RecordMetadata(index=index, record_key=(index + self.epoch) % N, rng=rng)


def test_samplers_of_other_kinds_are_told_the_epoch_or_it_is_said():
    data = make_feed(loader(sampler=Rotating()))
    assert lists(data.epoch(0)) != lists(data.epoch(1))
    data = make_feed(loader(sampler=Plain()))
    first = lists(data.epoch(0))
    with pytest.warns(InexactWarning, match="a Plain, has no set_epoch"):
        assert lists(data.epoch(1)) == first


@pytest.mark.parametrize("name", ["map", "loader"])
def test_a_run_goes_on(name, tmp_path):
    def fit(directory, steps, seen):
        runner = lm.Runner(step_of(seen), checkpoint=lm.Checkpointer(directory), progress=False)
        return runner.fit({"at": torch.zeros(())}, PIPELINES[name](), until=lm.Steps(steps), resume="auto")

    def step_of(seen):
        def step(state, batch):
            seen.append(batch.tolist())
            return state, {}

        return step

    whole, seen = [], []
    assert fit(tmp_path / "whole", 11, whole).clock.epoch == 2
    for steps in (2, 4, 7, 11):  # in the middle of an epoch, and at its end
        fit(tmp_path / "stopped", steps, seen)
    assert seen == whole


def prefetch_threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}


def test_the_threads_of_a_run_that_stopped_end_without_the_garbage_collector():
    of_others = prefetch_threads()  # of iterators that earlier tests left to the garbage collector
    gc.disable()
    try:
        runner = lm.Runner(lambda state, batch: (state, {}), progress=False)
        for data in (rows().batch(3), loader()):
            runner.fit({"at": torch.zeros(())}, data, until=lm.Steps(2))
        deadline = time.monotonic() + 120
        while left := prefetch_threads() - of_others:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
    finally:
        gc.enable()


def test_an_endless_data_set_has_one_epoch():
    data = make_feed(rows().repeat().batch(3))
    assert data.length is None
    assert [len(batch) for batch, _ in zip(data.epoch(0), range(20), strict=False)] == [3] * 20
