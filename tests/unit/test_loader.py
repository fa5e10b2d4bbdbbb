"""Loader: batches are a function of (seed, epoch, position), whatever the workers, the world and the past."""

import gc
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

import lumen.tree
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.data import Cursor, Loader
from lumen.data.to_device import Move
from lumen.errors import BatchError
from tests import zygote

sizes = st.integers(1, 60)
batch_sizes = st.integers(1, 70)
seeds = st.integers(-(2**63), 2**63 - 1)
epochs = st.integers(0, 2**40)


class Noisy(Dataset):
    """Samples that draw from every global generator."""

    def __init__(self, n=23):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        noise = [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
        return {"row": index, "noise": torch.tensor(noise, dtype=torch.float64)}


class Failing(Noisy):
    def __getitem__(self, index):
        if index == 5:
            raise KeyError("broken file")
        return index


class Killed(Noisy):
    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def rows(n):
    return torch.arange(n)


def same(one, other):
    leaves, others = lumen.tree.leaves(one), lumen.tree.leaves(other)
    assert lumen.tree.structure(one) == lumen.tree.structure(other)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves, others, strict=True))


# ------------------------------------------------------------------------------------------- the order


@given(n=sizes, batch_size=batch_sizes, seed=seeds, epoch=epochs, shuffle=st.booleans())
def test_nothing_is_lost_repeated_or_padded(n, batch_size, seed, epoch, shuffle):
    loader = Loader(rows(n), batch_size, seed=seed, shuffle=shuffle)
    batches = list(loader.epoch(epoch))
    assert len(batches) == len(loader)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(loader) - 1)
    found = torch.cat(batches).tolist()
    assert sorted(found) == list(range(n))
    assert shuffle or found == list(range(n))


@given(n=sizes, batch_size=batch_sizes, world_size=st.integers(1, 9), epoch=epochs)
def test_the_ranks_parts_in_order_are_the_global_batch(n, batch_size, world_size, epoch):
    columns = {"x": torch.randn(n, 2, 3), "y": np.arange(n)}
    whole = Loader(columns, batch_size, seed=1).epoch(epoch)
    parts = [Loader(columns, batch_size, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    for batch, *shares in itertools.zip_longest(whole, *(part.epoch(epoch) for part in parts)):
        cut = torch.tensor_split(batch["x"], world_size)
        assert all(torch.equal(share["x"], piece) for share, piece in zip(shares, cut, strict=True))
        assert torch.equal(torch.cat([share["y"] for share in shares]), batch["y"])


@given(n=sizes, batch_size=batch_sizes, epoch=epochs)
def test_drop_last_leaves_out_the_small_batch_alone(n, batch_size, epoch):
    if batch_size > n:
        with pytest.raises(BatchError, match=f"batch_size is {batch_size} and the data set has {n} rows"):
            Loader(rows(n), batch_size, drop_last=True)
        return
    kept = list(Loader(rows(n), batch_size).epoch(epoch))
    dropped = list(Loader(rows(n), batch_size, drop_last=True).epoch(epoch))
    assert len(dropped) == n // batch_size
    assert all(torch.equal(a, b) for a, b in zip(dropped, kept, strict=False))


@given(n=sizes, batch_size=batch_sizes, world_size=st.integers(1, 5), epoch=epochs, columns=st.booleans())
def test_padded_batches_have_one_shape_and_the_same_rows(n, batch_size, world_size, epoch, columns):
    data = {"y": torch.arange(n)} if columns else [{"y": i} for i in range(n)]
    for rank in range(world_size):
        short = list(Loader(data, batch_size, rank=rank, world_size=world_size).epoch(epoch))
        loader = Loader(data, batch_size, rank=rank, world_size=world_size, pad=True)
        padded = list(loader.epoch(epoch))
        assert len({batch["y"].shape for batch in padded} | {batch["weight"].shape for batch in padded}) == 1
        for batch, own in zip(padded, short, strict=True):
            assert batch["weight"].dtype is torch.float32
            assert torch.equal(batch["y"][batch["weight"] == 1], own["y"])
            assert int(batch["weight"].sum()) == len(own["y"])
            if len(own["y"]):  # what is repeated is of the same batch
                assert set(batch["y"].tolist()) == set(own["y"].tolist())
        if columns and len(padded) > 1:
            ((stack, count),) = loader.stacked(epoch, 0, len(loader), padded.__len__)
            assert count == len(padded)
            assert same(stack, lumen.tree.map(lambda *leaves: torch.stack(leaves), *padded))


@pytest.mark.parametrize("workers", [0, 1])
def test_padded_batches_of_other_forms(workers):
    pairs = TensorDataset(torch.arange(5), torch.arange(5) * 2)
    x, y, weight = list(Loader(pairs, 3, shuffle=False, pad=True, workers=workers))[-1]
    assert (x.tolist(), y.tolist(), weight.tolist()) == ([3, 4, 3], [6, 8, 6], [1, 1, 0])
    x, weight = list(Loader(rows(5), 3, shuffle=False, pad=True, workers=workers))[-1]
    assert (x.tolist(), weight.tolist()) == ([3, 4, 3], [1, 1, 0])


def test_padding_that_cannot_be_told_is_refused():
    with pytest.raises(BatchError, match="drop_last=True and pad=True"):
        Loader(rows(5), 3, pad=True, drop_last=True)
    with pytest.raises(BatchError, match="'weight'"):
        next(iter(Loader({"weight": torch.ones(5)}, 3, pad=True)))
    with pytest.raises(BatchError, match="a list"):
        next(iter(Loader([1, 2, 3], 3, pad=True, collate=lambda samples: samples)))


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        return torch.cat(list(Loader(rows(100), 10, seed=seed).epoch(epoch))).tolist()

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(each) for each in orders}) == 9
    assert order(2, 2) == orders[-1]


def test_world_defaults_to_the_process_group(monkeypatch):
    loader = Loader(rows(10), 10, shuffle=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert [batch.tolist() for batch in loader] == [[4, 5, 6]]


# ------------------------------------------------------------------------------------------ the cursor


@given(n=sizes, batch_size=batch_sizes, stop=st.integers(0, 40), workers=st.just(0))
def test_resumed_anywhere_a_run_is_the_uninterrupted_one(n, batch_size, stop, workers):
    def passes(loader):
        while True:
            yield from loader

    straight = list(itertools.islice(passes(Loader(rows(n), batch_size)), stop + 20))
    first = Loader(rows(n), batch_size)
    before = list(itertools.islice(passes(first), stop))
    saved = json.loads(json.dumps(first.state_dict()))
    second = Loader(rows(n), batch_size, workers=workers)
    second.load_state_dict(saved)
    after = list(itertools.islice(passes(second), 20))
    assert all(torch.equal(a, b) for a, b in zip(before + after, straight, strict=True))


@given(n=sizes, batch_size=batch_sizes, epoch=epochs)
def test_a_start_skips_what_comes_before(n, batch_size, epoch):
    loader = Loader(rows(n), batch_size)
    whole = list(loader.epoch(epoch))
    for start in range(len(loader) + 1):
        rest = list(loader.epoch(epoch, start))
        assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[start:]]
    assert loader.cursor == Cursor(0, 0)


def test_a_start_reads_nothing_before_it():
    read = []

    class Watched(Noisy):
        def __getitem__(self, index):
            read.append(index)
            return index

    loader = Loader(Watched(10**12), 4)
    batch = next(loader.epoch(3, start=10**11))
    assert read == batch.tolist()


@given(n=sizes, batch_size=batch_sizes, epoch=epochs, world_size=st.integers(1, 3), data=st.data())
def test_stacked_batches_are_the_batches(n, batch_size, epoch, world_size, data):
    """Whatever sizes are asked for: full batches stacked, a smaller last one and what is left before it by itself."""
    rank = data.draw(st.integers(0, world_size - 1))
    loader = Loader({"x": rows(n), "y": rows(n).numpy()}, batch_size, rank=rank, world_size=world_size)
    plain = list(loader.epoch(epoch))
    start = data.draw(st.integers(0, len(plain)))
    stop = data.draw(st.integers(0, len(plain) + 1))
    at = start
    for batch, count in loader.stacked(epoch, start, stop, lambda: data.draw(st.integers(1, 4))):
        single = [batch] if count == 1 else [{key: leaf[i] for key, leaf in batch.items()} for i in range(count)]
        for found, wanted in zip(single, plain[at : at + count], strict=True):
            assert torch.equal(found["x"], wanted["x"])
            assert torch.equal(found["y"], wanted["y"])
        at += count
    assert at == max(start, min(stop, len(plain)))


def test_samples_and_workers_do_not_stack():
    assert Loader(Noisy(), 2).stacked(0, 0, 9, lambda: 2) is None
    assert Loader(rows(8), 2, workers=1).stacked(0, 0, 9, lambda: 2) is None


def test_the_stream_is_the_epochs_with_their_cursors():
    loader = Loader(rows(10), 4)
    stream = list(itertools.islice(loader.stream(2, 1), 6))
    expected = [*loader.epoch(2, 1), *loader.epoch(3), *loader.epoch(4)]
    assert all(torch.equal(a, b) for (a, _), b in zip(stream, expected, strict=False))
    cursors = [cursor for _, cursor in stream]
    assert cursors == [(2, 2), (3, 0), (3, 1), (3, 2), (4, 0), (4, 1)]
    assert loader.state_dict(cursors[0])["position"] == 2
    assert torch.equal(next(loader.stream(*cursors[0]))[0], stream[1][0])
    assert loader.cursor == Cursor()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cursor_follows_what_was_handed_out(workers):
    loader = Loader(rows(10), 4, workers=workers)
    passing = iter(loader)
    found = [loader.cursor, *(loader.cursor for _ in passing)]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert torch.equal(next(iter(loader)), next(loader.epoch(1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_live_iterators_do_not_disturb_each_other(workers):
    loader = Loader(Noisy(), 4, workers=workers)
    one, other = loader.epoch(0), loader.epoch(0, start=1)
    next(one)
    for a, b in zip(one, other, strict=True):
        assert same(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed=1 \(here 0\)"),
        ({"rows": 11}, r"rows=11 \(here 10\)"),
        ({"batch_size": 5}, r"batch_size=5 \(here 4\)"),
        ({"shuffle": False, "drop_last": True}, r"shuffle=False .*, drop_last=True"),
        ({"version": 2}, r"version=2 \(here 1\)"),
        ({"position": 4}, r"position is 4; it must be in \[0, 4\)"),
        ({"epoch": -1}, "epoch is -1"),
    ],
)
def test_the_state_of_another_order_is_refused(change, message):
    loader = Loader(rows(10), 4)
    next(iter(loader))
    with pytest.raises(BatchError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    assert loader.cursor == Cursor(0, 1)
    with pytest.raises(BatchError, match="lacks epoch, position, version"):
        loader.load_state_dict({"seed": 0})


# ---------------------------------------------------------------------------------- workers and chance


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    plain, parallel = Loader(Noisy(), 4, seed=3), Loader(Noisy(), 4, seed=3, workers=workers)
    expected = list(plain.epoch(0)) + list(plain.epoch(1))
    assert all(same(a, b) for a, b in zip([*parallel, *parallel], expected, strict=True))
    for start in range(len(plain) + 1):  # the last pass was left early: what it read ahead must not show up
        assert all(same(a, b) for a, b in zip(parallel.epoch(0, start), expected[start:], strict=False))
        next(parallel.epoch(5))
    stream = itertools.islice(parallel.stream(), len(expected))
    assert all(same(a, b) for (a, _), b in zip(stream, expected, strict=True))


def new_children(others):
    """The processes that have been started since `others` were."""
    return [child for child in multiprocessing.active_children() if child not in others]


def test_workers_are_kept_from_pass_to_pass():
    others = multiprocessing.active_children()
    loader = Loader(Noisy(), 4, workers=1)
    pids = set()
    for _ in range(3):
        list(loader)
        pids |= {child.pid for child in new_children(others)}
    assert len(pids) == 1
    del loader
    assert not new_children(others)


def test_workers_read_columns_of_any_rank():
    columns = {"x": torch.randn(9, 2), "y": np.arange(9)}
    for rank in range(3):
        plain, parallel = (Loader(columns, 4, rank=rank, world_size=3, workers=w) for w in (0, 1))
        assert all(same(a, b) for a, b in zip(plain, parallel, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_left_as_they_were(workers):
    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    found = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    expected = draws()
    torch.set_rng_state(found[0])
    np.random.set_state(found[1])  # noqa: NPY002
    random.setstate(found[2])
    list(Loader(Noisy(), 4, workers=workers))
    assert draws() == expected


@pytest.mark.parametrize("drawn", [0, 1, 2])
@pytest.mark.parametrize("generator", [np.random.MT19937, np.random.PCG64])
def test_numpys_generator_is_left_with_half_a_pair_of_normal_numbers(drawn, generator):
    callers, own = np.random.get_bit_generator(), generator(5)
    np.random.set_bit_generator(own)
    try:
        np.random.standard_normal(drawn)  # noqa: NPY002
        before = np.random.get_state(legacy=False)  # noqa: NPY002
        list(Loader(Noisy(), 4))
        assert np.random.get_bit_generator() is own
        np.testing.assert_equal(np.random.get_state(legacy=False), before)  # noqa: NPY002
    finally:
        np.random.set_bit_generator(callers)


@pytest.mark.parametrize("drawn", [0, 1, 2, 700])
def test_pythons_generator_is_left_bit_for_bit(drawn):
    random.seed(3)
    for _ in range(drawn):
        random.gauss(0, 1)  # keeps every second number
    before = random.getstate()
    batches = list(Loader(Noisy(), 4))
    assert random.getstate() == before
    assert same(batches, list(Loader(Noisy(), 4)))
    assert random.getstate() == before


class Nested(Noisy):
    """Samples that are read by a loader of their own, between two draws."""

    def __init__(self, inner):
        super().__init__(4)
        self.inner = inner

    def __getitem__(self, index):
        before = np.random.rand()  # noqa: NPY002
        if self.inner:
            list(Loader(Noisy(3), 2))
        return torch.tensor([before, np.random.rand()])  # noqa: NPY002


def test_a_loader_in_a_loader_leaves_the_outer_ones_draws():
    assert same(list(Loader(Nested(inner=True), 2)), list(Loader(Nested(inner=False), 2)))


def test_flat_samples_are_collated_as_any_trees_are():
    def collated(samples):
        return next(iter(Loader(samples, len(samples), shuffle=False)))

    rows = [(torch.tensor([i, 2 * i]), np.array([i]), i, i / 2, i == 1) for i in range(3)]
    flat, deep = collated(rows), collated([{"row": row} for row in rows])["row"]
    assert type(flat) is type(deep) is tuple
    assert [leaf.dtype for leaf in flat] == [leaf.dtype for leaf in deep]
    assert same(flat, deep)
    for rows in [(1, 2), (2, 2.5), (True, 2), (1.5, 2.5), (np.arange(2), np.ones(2)), (np.float32(1), np.float32(2))]:
        assert same(collated([(row,) for row in rows])[0], default_collate(list(rows)))
        assert collated([(row,) for row in rows])[0].dtype is default_collate(list(rows)).dtype
    with pytest.raises((OverflowError, RuntimeError)):
        collated([(2**63,)])
    with pytest.raises(ValueError):  # noqa: PT011 (optree's own words)
        collated([(1, 2), (1,)])


def test_chance_differs_between_rows_batches_epochs_and_ranks():
    loaders = [Loader(Noisy(24), 6, rank=rank, world_size=2) for rank in range(2)]
    noise = [b["noise"] for loader in loaders for epoch in (0, 1) for b in loader.epoch(epoch)]
    values = torch.cat(noise).flatten()
    assert len(values.unique()) == len(values) == 2 * 24 * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_keeps_its_type_and_names_the_row(workers):
    with pytest.raises(KeyError) as caught:
        list(Loader(Failing(), 4, workers=workers))
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "broken file" in text
    assert "row 5" in text


def test_an_exception_of_a_whole_batch_names_its_rows():
    with pytest.raises(KeyError) as caught:
        list(Loader(Subset(Failing(), range(8)), 4, shuffle=False))
    assert "rows [4, 5, 6, 7]" in caught.value.__notes__[0]
    with pytest.raises(BatchError, match="stack") as caught:
        list(Loader([torch.zeros(2), torch.zeros(3)], 2, shuffle=False))
    assert "the batch of rows [0, 1]" in caught.value.__notes__[0]


# torch's handler of SIGCHLD raises wherever Python is: in a callback of the garbage collector it is only reported.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dead_worker_is_named_and_the_loader_can_be_used_again():
    loader = Loader(Killed(), 1, shuffle=False, workers=1)
    with pytest.raises(RuntimeError, match=r"worker .*\d+.* (died|killed)"):  # whoever sees it first
        list(loader)
    assert [batch.tolist() for batch in itertools.islice(loader.epoch(0), 3)] == [[0], [1], [2]]


# ----------------------------------------------------------------------------------------- the data sets


@pytree_dataclass
class Pair:
    x: object
    y: object


def test_columns_keep_their_tree():
    x, y = torch.randn(7, 3), np.arange(7, dtype=np.int32)
    index = [3, 4, 5]
    for made, expected in [
        ((x, y), (x[index], torch.from_numpy(y[index]))),
        ({"b": x, "a": (y,)}, {"b": x[index], "a": (torch.from_numpy(y[index]),)}),
        (Pair(x, y), Pair(x[index], torch.from_numpy(y[index]))),
        (x, x[index]),
        (y, torch.from_numpy(y[index])),
        (TensorDataset(x, torch.from_numpy(y)), (x[index], torch.from_numpy(y[index]))),
    ]:
        batch = list(Loader(made, 3, shuffle=False).epoch(0))[1]
        assert same(batch, expected)


def test_batches_do_not_share_memory_with_the_columns():
    x, y = torch.zeros(4), np.zeros(4)
    for batch in Loader((x, y), 4, shuffle=False):
        batch[0].add_(1)
        batch[1].add_(1)
    assert x.sum() == y.sum() == 0


def test_a_memory_map_is_read_row_by_row(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(20).reshape(10, 2))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert torch.cat(list(Loader(mapped, 3))).sort(0).values.tolist() == mapped.tolist()


def test_samples_are_trees_that_torch_collates_leaf_by_leaf():
    samples = [Pair((torch.full((2,), float(i)), i), {"w": i / 2, "s": str(i), "n": None}) for i in range(3)]
    (batch,) = Loader(samples, 3, shuffle=False)
    assert torch.equal(batch.x[0], torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))
    assert batch.x[1].tolist() == [0, 1, 2]
    assert batch.y["w"].dtype == torch.float64
    assert list(batch.y["s"]) == ["0", "1", "2"]
    assert batch.y["n"] is None


def test_columns_and_samples_give_the_same_batches():
    columns = (torch.randn(11, 2), torch.arange(11))
    samples = list(zip(*columns, strict=True))
    for rank in range(3):
        whole, single = (Loader(d, 4, rank=rank, world_size=3) for d in (columns, samples))
        assert all(same(a, b) for a, b in zip(whole, single, strict=True))


def test_collate_takes_samples_of_any_data_set():
    def lengths(samples):
        return torch.tensor([len(sample[0]) for sample in samples])

    x = torch.zeros(3, 5)
    for dataset in (TensorDataset(x), (x,), [(row,) for row in x]):
        assert [b.tolist() for b in Loader(dataset, 2, collate=lengths)] == [[5, 5], [5]]


def test_a_subclass_reads_rows_in_its_own_way():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            return self.tensors[0][index] * 2

    assert torch.cat(list(Loader(Doubled(torch.arange(5)), 2))).sort().values.tolist() == [0, 2, 4, 6, 8]


def test_batches_move_to_the_device():
    batch = next(iter(Loader({"x": torch.zeros(3), "s": np.zeros(3)}, 2, device="meta")))
    assert {leaf.device.type for leaf in lumen.tree.leaves(batch)} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_on_its_way_to_cuda_arrives_before_it_is_used():
    move, total = Move("cuda"), 0
    for number in range(50):
        torch.cuda._sleep(100_000)  # the copies run ahead of the device
        total = total + move(torch.full((1 << 16,), float(number))).sum()
    assert float(total) == (1 << 16) * sum(range(50))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loader([], 1), "without rows"),
        (lambda: Loader(torch.zeros(0, 3), 1), "without rows"),
        (lambda: Loader((), 1), "without rows"),
        (lambda: Loader(rows(3), 0), "batch_size is 0; it must be at least 1"),
        (lambda: Loader(rows(3), 2.0), "batch_size is 2.0 of type float"),
        (lambda: Loader(rows(3), True), "batch_size is True of type bool"),
        (lambda: Loader(rows(3), 1, seed=2**63), "seed is"),
        (lambda: Loader(rows(3), 1, workers=-1), "workers is -1"),
        (lambda: Loader(rows(3), 1, prefetch=0), "prefetch is 0"),
        (lambda: Loader({"x": rows(3), "y": rows(4)}, 1), "found x: 3, y: 4"),
        (lambda: Loader({"x": rows(3), "y": torch.tensor(1)}, 1), "Column y of the data set is 0-d"),
        (lambda: Loader({"x": [1, 2]}, 1), r"Column x\[0\] of the data set is a int"),
        (lambda: Loader({"x": np.array(["a", "b"])}, 1), "which torch does not have"),
        (lambda: Loader(Endless(), 1), "pass it to Runner.fit directly"),
        (lambda: Loader(iter([1]), 1), "pass it to Runner.fit directly"),
        (lambda: Loader(rows(3), 1, rank=2, world_size=2), r"rank is 2; it must be in \[0, 2\)"),
        (lambda: Loader(rows(3), 1, rank=0), "rank=0 and world_size=None; give both or neither"),
        (lambda: Loader(rows(3), 1, rank=0, world_size=0), "world_size is 0"),
        (lambda: Loader(rows(3), 1).epoch(-1), "epoch is -1"),
        (lambda: Loader(rows(3), 1).epoch(0, 4), r"position is 4; it must be in \[0, 4\)"),
        (lambda: Loader(rows(3), 1).stream(0, 0.5), "position is 0.5 of type float"),
    ],
)
def test_bad_arguments_are_named_at_once(make, message):
    with pytest.raises(BatchError, match=message):
        make()


def test_workers_start_in_silence_after_a_checkpoint_has_loaded_jax(tmp_path):
    script = """
    import warnings, torch, lumen as lm, lumen.data.adapters
    lm.checkpoint.save(PATH, {"a": torch.ones(2)})
    warnings.simplefilter("error")
    loader = lm.Loader(list(range(8)), batch_size=4, workers=1)
    assert sum(len(batch) for batch in loader) == 8
    plain = torch.utils.data.DataLoader(list(range(8)), batch_size=4, num_workers=1)
    assert sum(len(batch) for batch in lm.data.adapters.make_feed(plain).epoch(0)) == 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(plain)
    assert any("os.fork() was called" in str(w.message) for w in caught)  # the program's own forks still warn
    """
    code = textwrap.dedent(script).replace("PATH", repr(str(tmp_path / "one")))
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = zygote.run([sys.executable, "-c", code], env=environment, bare=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_workers_of_a_loader_in_a_reference_cycle_end_at_once():
    others = multiprocessing.active_children()
    loader = Loader(list(range(8)), batch_size=4, workers=2)
    list(loader.epoch(0))
    started = new_children(others)
    assert len(started) == 2
    cycle = {"loader": loader}
    cycle["itself"] = cycle
    del loader, cycle
    gc.collect()
    assert all(child.exitcode == 0 for child in started)  # terminated by torch, after five seconds, it would be -15
    assert not new_children(others)
