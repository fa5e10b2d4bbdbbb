"""Mixtures: the share of each set in any beginning of the order, each row of a set as often as its others."""

import itertools
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import lumen as lm
from lumen.data.adapters import make_feed
from lumen.data.proportions import MAX_PERIOD, counts, schedule
from lumen.errors import BatchError

weights = st.lists(st.integers(1, 30), min_size=1, max_size=6)
sizes = st.lists(st.integers(1, 12), min_size=6, max_size=6)
seeds = st.integers(-(2**63), 2**63 - 1)


def mixture(weights, sizes, **options):
    """Rows are (set, row)."""
    sets = {str(i): [(i, row) for row in range(size)] for i, (_, size) in enumerate(zip(weights, sizes, strict=False))}
    return lm.data.Mixture(sets, weights={name: weights[int(name)] for name in sets}, **options)


def draws(data, epochs):
    for epoch in range(epochs):
        data.set_epoch(epoch)
        yield from [data[i] for i in range(len(data))]


def pairs(batch):
    return list(zip(*(leaf.tolist() for leaf in batch), strict=True))


@settings(max_examples=30)
@given(weights=weights, sizes=sizes, seed=seeds, strategy=st.sampled_from(["first_exhausted", "all_exhausted"]))
def test_each_set_has_its_share_of_every_beginning_and_its_rows_take_turns(weights, sizes, seed, strategy):
    data = mixture(weights, sizes, seed=seed, stopping_strategy=strategy)
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    assert list(data.proportions.values()) == [float(share) for share in shares]
    drawn, rows = [0] * len(weights), Counter()
    for i, (number, row) in enumerate(draws(data, 2), 1):
        drawn[number] += 1
        rows[number, row] += 1
        assert all(abs(count - share * i) < 1 for count, share in zip(drawn, shares, strict=True))
        if i == len(data):  # of the first epoch
            done = [count >= size for count, size in zip(drawn, sizes, strict=False)]
            assert any(done) if strategy == "first_exhausted" else all(done)
            assert drawn[number] == sizes[number], "its last row ends the epoch"
    for number, count in enumerate(drawn):
        each = [rows[number, row] for row in range(sizes[number])]
        assert sum(each) == count
        assert max(each) - min(each) <= 1


@settings(max_examples=15)
@given(exact=st.lists(st.floats(0.01, 1), min_size=2, max_size=8))
def test_shares_without_a_common_denominator_are_rounded(exact):
    found = counts({str(i): weight for i, weight in enumerate(exact)})
    period = sum(found)
    assert period <= MAX_PERIOD
    assert all(abs(c / period - x / sum(exact)) < 1 / MAX_PERIOD for c, x in zip(found, exact, strict=True))


def test_a_long_period_keeps_the_shares_too():
    found = counts({"a": 3**-0.5, "b": 0.2345678, "c": 0.01, "d": 2 / 7})
    slots = schedule(found)
    assert len(slots) == MAX_PERIOD
    beginnings = np.arange(1, MAX_PERIOD + 1)
    for number, count in enumerate(found):
        lags = np.cumsum(slots == number) * MAX_PERIOD - count * beginnings
        assert np.abs(lags).max() < MAX_PERIOD


@settings(max_examples=25)
@given(
    weights=weights, sizes=sizes, batch_size=st.integers(1, 5), world_size=st.integers(1, 4), epoch=st.integers(0, 9)
)
def test_ranks_and_resumed_runs_have_the_rows_of_one_process(weights, sizes, batch_size, world_size, epoch):
    data = mixture(weights, sizes, seed=1)
    data.set_epoch(epoch)
    expected = [data[i] for i in range(len(data))]
    loader = lm.Loader(mixture(weights, sizes, seed=1), batch_size, seed=5)  # keeps the order of the mixture
    batches = [pairs(batch) for batch in loader.epoch(epoch)]
    assert list(itertools.chain(*batches)) == expected
    start = len(batches) // 2
    ranks = [lm.Loader(data, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    shards = [[pairs(batch) for batch in each.epoch(epoch, start)] for each in ranks]
    assert [list(itertools.chain(*parts)) for parts in zip(*shards, strict=True)] == batches[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torch_loader_and_workers_read_the_same(workers):
    data = mixture([3, 1], [8, 8], seed=2)
    feed = make_feed(DataLoader(data, batch_size=3, num_workers=workers))
    loader = lm.Loader(data, 3, workers=workers)
    for epoch in (0, 1):
        assert [pairs(batch) for batch in feed.epoch(epoch)] == [pairs(batch) for batch in loader.epoch(epoch)]


def test_sets_are_told_their_own_passes():
    documents = [[10 * i, 10 * i + 1, 10 * i + 2][: 2 + i % 2] for i in range(12)]
    packed = lm.data.Packed(documents, 4, seed=3)
    data = lm.data.Mixture({"packed": packed, "other": [{}] * 99}, weights={"packed": 3, "other": 1})
    loader = lm.Loader(data, 1, collate=lambda rows: rows)
    read = [row["tokens"].tolist() for epoch in range(3) for (row,) in loader.epoch(epoch) if row]
    for number in range(len(read) // len(packed)):
        packed.set_epoch(number)
        expected = [packed[i]["tokens"].tolist() for i in range(len(packed))]
        assert sorted(read[number * len(packed) : (number + 1) * len(packed)]) == sorted(expected)


def test_rows_say_which_set_they_are_of():
    sets = {"a": {"x": torch.zeros(3)}, "b": {"x": torch.ones(3)}}  # columns
    data = lm.data.Mixture(sets, weights={"b": 2, "a": 1}, source="set")
    for batch in lm.Loader(data, 2):
        assert torch.equal(batch["x"].long(), batch["set"])
    with pytest.raises(BatchError, match="a dict that has 'x'"):
        lm.data.Mixture(sets, weights={"a": 1, "b": 1}, source="x")[0]
    with pytest.raises(BatchError, match="a row of 'a' is a int"):
        lm.data.Mixture({"a": [1]}, weights={"a": 1}, source="set")[0]


def test_the_state_of_another_mixture_is_refused():
    state = lm.Loader(mixture([1, 2], [5, 5]), 2).state_dict()
    lm.Loader(mixture([2, 4], [5, 5]), 2).load_state_dict(state)
    for other in (mixture([1, 2], [5, 5], seed=1), mixture([1, 2], [5, 5], shuffle=False)):
        with pytest.raises(BatchError, match="mixture="):
            lm.Loader(other, 2).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lm.data.Mixture({}, weights={}), "each set has one weight"),
        (lambda: lm.data.Mixture({"a": [1]}, weights={"b": 1}), "the sets ['a'] and the weights of ['b']"),
        (lambda: lm.data.Mixture({"a": []}, weights={"a": 1}), "set 'a' has no rows"),
        (lambda: lm.data.Mixture({"a": iter([1])}, weights={"a": 1}), "set 'a' is a list_iterator"),
        (lambda: mixture([0, 1], [1, 1]), "the weight of '0' is 0; a weight is a number above 0"),
        (lambda: mixture([-1, 1], [1, 1]), "the weight of '0' is -1"),
        (lambda: mixture([float("nan"), 1], [1, 1]), "the weight of '0' is nan"),
        (lambda: mixture([1e-9, 1], [1, 1]), "is less than 1/65536 of the sum"),
        (lambda: mixture([1], [1], stopping_strategy="first"), '"first_exhausted" or "all_exhausted"'),
        (lambda: mixture([1], [1], seed=2**63), "seed is"),
        (lambda: mixture([1], [1]).set_epoch(-1), "epoch is -1"),
        (lambda: lm.Loader(mixture([1], [1]), 1, weights=[1]), "which decides how often each row comes"),
        (lambda: lm.Loader(mixture([1], [1]), tokens=1, lengths=[1]), "which decides how often each row comes"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(BatchError, match=re.escape(message)):
        make()


@settings(max_examples=8)
@given(weights=weights, sizes=sizes, seed=seeds, epoch=st.integers(0, 2**40), data=st.data())
def test_rows_read_together_are_the_rows(weights, sizes, seed, epoch, data):
    """In any order, over the ends of passes, in the epochs of any run."""
    each, together = (mixture(weights, sizes, seed=seed, stopping_strategy="all_exhausted") for _ in range(2))
    each.set_epoch(epoch)
    together.set_epoch(epoch)
    indices = data.draw(st.lists(st.integers(-len(each), len(each) - 1), max_size=20))
    assert together.__getitems__(indices) == [each[i] for i in indices]
    start = data.draw(st.integers(0, len(each) - 1))
    assert together.__getitems__(list(range(start, len(each)))) == [each[i] for i in range(start, len(each))]
    with pytest.raises(IndexError):
        together.__getitems__([0, len(each)])


def test_a_batch_crosses_blocks_of_the_order():
    data = mixture([1, 2], [9000, 9000])
    for start in (8000, 8191, 8192):
        indices = list(range(start, start + 300))
        assert data.__getitems__(indices) == [data[i] for i in indices]


def test_a_row_that_fails_is_named_with_its_set():
    sets = {"good": [1, 2, 3], "bad": Broken()}
    data = lm.data.Mixture(sets, weights={"good": 1, "bad": 1}, shuffle=False)
    with pytest.raises(KeyError) as caught:
        next(iter(lm.Loader(data, 4)))
    notes = " ".join(caught.value.__notes__)
    assert "row 1" in notes
    assert "'bad' of a Mixture" in notes


class Broken:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise KeyError("broken file")
        return index
