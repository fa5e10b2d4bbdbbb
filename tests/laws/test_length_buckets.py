"""Batches by tokens: each row once an epoch, none over the budget, and the same on any number of ranks."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

import lumen as lm
from lumen.data import length_buckets
from lumen.errors import BatchError

some_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=80)
budgets = st.integers(40, 400)
bounds = st.none() | st.integers(1, 9)
seeds = st.integers(-(2**63), 2**63 - 1)
epochs = st.integers(0, 2**40)


def loader(lengths, tokens, **options):
    return lm.Loader(torch.arange(len(lengths)), tokens=tokens, lengths=lengths, **options)


def rows(batches):
    return [batch.tolist() for batch in batches]


@settings(max_examples=50)
@given(lengths=some_lengths, tokens=budgets, most=bounds, seed=seeds, epoch=epochs, shuffle=st.booleans())
def test_each_row_is_in_one_batch_within_the_budget(lengths, tokens, most, seed, epoch, shuffle):
    data = loader(lengths, tokens, batch_size=most, seed=seed, shuffle=shuffle)
    batches = rows(data.epoch(epoch))
    assert len(batches) == len(data)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= (most or len(lengths))
        assert len(batch) * max(lengths[row] for row in batch) <= tokens
    if not shuffle:
        in_order = [lengths[row] for row in itertools.chain(*batches)]
        assert in_order == sorted(lengths, reverse=True)


@settings(max_examples=30)
@given(lengths=some_lengths, tokens=budgets, epoch=epochs, world_size=st.integers(1, 5), start=st.integers(0, 30))
def test_ranks_and_resumed_runs_have_the_batches_of_one_process(lengths, tokens, epoch, world_size, start):
    batches = rows(loader(lengths, tokens, seed=3).epoch(epoch))
    start = min(start, len(batches))
    ranks = [loader(lengths, tokens, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    shards = [rows(each.epoch(epoch, start)) for each in ranks]
    assert [list(itertools.chain(*parts)) for parts in zip(*shards, strict=True)] == batches[start:]
    for parts in zip(*shards, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=50)
@given(lengths=some_lengths, tokens=budgets, most=bounds)
def test_hardly_more_batches_than_the_sorted_rows_fill_one_after_another(lengths, tokens, most):
    """No row of a bucket could be in a batch of a tenth more rows, and a bucket has one batch that is not full."""
    remaining, greedy = sorted(lengths, reverse=True), 0
    while remaining:
        remaining = remaining[min(max(1, tokens // max(1, remaining[0])), most or len(lengths)) :]
        greedy += 1
    number = len(loader(lengths, tokens, batch_size=most))
    assert greedy <= number <= 1.1 * greedy + len(set(lengths))


def test_little_padding_and_new_batches_in_each_epoch():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(180) - 0.5, 1.0, 20_000), 2, 1024).astype(int)
    data = loader(lengths, 16_384)
    found = [rows(data.epoch(epoch)) for epoch in (0, 1)]
    places = sum(len(batch) * lengths[batch].max() for batch in found[0])
    assert lengths.sum() / places >= 0.93, "places that are not padding"
    assert lengths.sum() / (len(data) * 16_384) >= 0.9, "of the budget"
    together = [{frozenset(batch) for batch in epoch} for epoch in found]
    assert len(together[0] & together[1]) < len(data) / 20, "most rows meet others"
    by_length = [int(lengths[batch].max()) for batch in found[0]]
    assert by_length != sorted(by_length, reverse=True)


@settings(max_examples=20)
@given(lengths=some_lengths, tokens=budgets, epoch=epochs)
def test_large_sets_have_the_same_order(lengths, tokens, epoch):
    with pytest.MonkeyPatch.context() as patch:
        expected = rows(loader(lengths, tokens).epoch(epoch))
        patch.setattr(length_buckets, "_CACHED", 0)
        assert rows(loader(lengths, tokens).epoch(epoch)) == expected


class Texts(list):
    """Rows of tokens, and how many were read."""

    read = 0

    def __getitem__(self, row):
        self.read += 1
        return super().__getitem__(row)


@pytest.mark.parametrize("workers", [0, 2])
def test_padded_texts_are_read_when_they_are_due(workers):
    lengths = torch.arange(1, 40)
    texts = Texts(torch.full((int(n),), int(n)) for n in lengths)
    options = {"tokens": 100, "lengths": lengths, "collate": lambda rows: pad_sequence(rows, batch_first=True)}
    data = lm.Loader(texts, workers=workers, **options)
    last = [*data.epoch(4, len(data) - 1)]
    assert texts.read == (0 if workers else len(last[0]))
    batches = [*data.epoch(4)]
    assert torch.equal(batches[-1], last[0])
    assert max(batch.numel() for batch in batches) <= 100
    assert sorted(int(row[0]) for batch in batches for row in batch) == lengths.tolist()


def test_the_state_of_other_lengths_is_refused():
    data = loader([3, 4, 5], 5)
    next(iter(data))
    saved = data.state_dict()
    again = loader([3, 4, 5], 5)
    again.load_state_dict(saved)
    assert again.cursor == data.cursor == (0, 1)
    for other, message in [
        (loader([5, 4, 3], 5), "lengths="),
        (loader([3, 4, 5], 6), r"tokens=5 \(here 6\)"),
        (lm.Loader(torch.arange(3), 1), r"tokens=5 \(here None\)"),
    ]:
        with pytest.raises(BatchError, match=message):
            other.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [1, 2, 3]}, "lengths= without tokens=; write lm.Loader(data, tokens="),
        ({"tokens": 9}, "tokens= without lengths="),
        ({}, "lm.Loader(data, batch_size=64), or a number of tokens"),
        ({"tokens": 9, "lengths": [1, 2]}, "lengths has the shape (2,) and int64; it is one number for each of the 3"),
        ({"tokens": 9, "lengths": [[1, 2, 3]]}, "lengths has the shape (1, 3)"),
        ({"tokens": 9, "lengths": ["a", "b", "c"]}, "one number for each of the 3 rows"),
        ({"tokens": 9, "lengths": torch.ones(3)}, "lengths are float32; they must be integers"),
        ({"tokens": 9, "lengths": [1, -2, 3]}, "lengths[1] is -2; a length is at least 0"),
        ({"tokens": 9, "lengths": [1, 12, 11]}, "2 rows are longer than a batch may be: row 1 has 12 tokens"),
        ({"tokens": 9, "lengths": [1, 12, 11]}, "Write tokens=12 or more"),
        ({"tokens": 0, "lengths": [1, 2, 3]}, "tokens is 0; it must be at least 1"),
        ({"tokens": 9, "lengths": [1, 2, 3], "batch_size": 0}, "batch_size is 0"),
        ({"tokens": 9, "lengths": [1, 2, 3], "pad": True}, "tokens= and pad=True"),
        ({"tokens": 9, "lengths": [1, 2, 3], "drop_last": True}, "tokens= and drop_last=True"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(BatchError, match=re.escape(message)):
        lm.Loader(torch.arange(3), **options)
