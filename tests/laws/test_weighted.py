"""Weighted draws: a pure function of (seed, epoch, draw) on any number of ranks, as often as the weights say."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm
from lumen.data.permutation import uniform
from lumen.errors import BatchError

weights = st.lists(st.just(0) | st.floats(1e-3, 1e3), min_size=1, max_size=40).filter(any)
seeds = st.integers(-(2**63), 2**63 - 1)
epochs = st.integers(0, 2**40)


def loader(weights, batch_size, **options):
    return lm.Loader(torch.arange(len(weights)), batch_size, weights=weights, **options)


def rows(batches):
    return [batch.tolist() for batch in batches]


@settings(max_examples=30)
@given(weights=weights, batch_size=st.integers(1, 9), world_size=st.integers(1, 4), seed=seeds, epoch=epochs)
def test_ranks_and_resumed_runs_have_the_draws_of_one_process(weights, batch_size, world_size, seed, epoch):
    batches = rows(loader(weights, batch_size, seed=seed).epoch(epoch))
    assert sum(map(len, batches)) == len(weights)
    assert all(weights[row] > 0 for row in itertools.chain(*batches))
    start = len(batches) // 2
    ranks = [loader(weights, batch_size, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    shards = [rows(each.epoch(epoch, start)) for each in ranks]
    assert [list(itertools.chain(*parts)) for parts in zip(*shards, strict=True)] == batches[start:]
    assert rows(loader(weights, 1, seed=seed).epoch(epoch)) == [[row] for row in itertools.chain(*batches)]
    twice = [2 * weight for weight in weights]
    assert rows(loader(twice, batch_size, seed=seed).epoch(epoch)) == batches, "their sum does not matter"


def chi_square(counts, shares):
    expected = shares * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_rows_are_drawn_in_proportion():
    """The seeds are fixed; 99.99% of chi-square values with 9 degrees of freedom are below 33.7."""
    shares = torch.tensor([1.0, 2, 3, 4, 5, 5, 10, 20, 20, 30]) / 100
    for seed in range(3):
        data = loader(shares.repeat(2000), 1000, seed=seed)
        drawn = [torch.cat([*data.epoch(epoch)]) for epoch in (0, 1)]
        assert not torch.equal(*drawn)
        for draws in drawn:
            assert chi_square((draws % 10).bincount(minlength=10).double(), shares.double()) < 33.7
        both = torch.stack([draws % 2 for draws in drawn])  # the same place of two epochs
        odd = float(shares[1::2].sum())
        pairs = (2 * both[0] + both[1]).bincount(minlength=4).double()
        joint = torch.tensor([(1 - odd) ** 2, odd * (1 - odd), odd * (1 - odd), odd**2], dtype=torch.float64)
        assert chi_square(pairs, joint) < 21.2  # 99.99% with 3 degrees of freedom


@settings(max_examples=30)
@given(seed=seeds, epoch=epochs, start=st.integers(0, 2**50), count=st.integers(0, 20))
def test_random_numbers_do_not_depend_on_where_reading_begins(seed, epoch, start, count):
    numbers = uniform(seed, epoch, start, start + count)
    assert ((numbers >= 0) & (numbers < 1)).all()
    for i, number in enumerate(numbers):
        assert uniform(seed, epoch, start + i, start + i + 1)[0] == number


def test_a_point_at_the_end_of_the_line_is_of_the_last_row_with_a_weight(monkeypatch):
    monkeypatch.setattr("lumen.data.permutation.uniform", lambda *_: np.ones(3))
    assert rows(loader([1, 2, 0], 3)) == [[1, 1, 1]]


def test_balanced_classes_are_drawn_equally_often():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    weights = lm.data.balanced(labels)
    assert weights.dtype is torch.float64
    per_class = torch.zeros(3, dtype=torch.float64).index_add_(0, labels, weights)
    assert per_class.tolist() == pytest.approx([1000 / 3] * 3)
    drawn = torch.cat([*loader(weights, 100).epoch(0)])
    assert chi_square(labels[drawn].bincount().double(), torch.full((3,), 1 / 3, dtype=torch.float64)) < 18.4
    assert lm.data.balanced(["cat", "dog", "cat"]).tolist() == pytest.approx([0.75, 1.5, 0.75])
    assert lm.data.balanced(np.array([True, False])).tolist() == [1, 1]


def test_the_last_batch_is_left_out_or_padded():
    assert [len(batch) for batch in loader([1] * 5, 2, drop_last=True)] == [2, 2]
    *_, (x, weight) = loader([1] * 5, 2, pad=True)
    assert (len(x), weight.tolist()) == (2, [1, 0])


def test_the_state_of_other_weights_is_refused():
    data = loader([1, 2, 3], 1)
    next(iter(data))
    with pytest.raises(BatchError, match="weights="):
        loader([1, 3, 2], 1).load_state_dict(data.state_dict())
    with pytest.raises(BatchError, match=r"weights=\d+ \(here None\)"):
        lm.Loader(torch.arange(3), 1).load_state_dict(data.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loader([0.0, 0.0], 1), "the weights sum to 0.0, which must be above 0"),
        (lambda: loader([1.0, -1.0], 1), "weights[1] is -1.0, and 1 are"),
        (lambda: loader([float("nan"), 1.0], 1), "weights[0] is nan"),
        (lambda: loader([float("inf"), 1.0], 1), "weights[0] is inf"),
        (lambda: loader([1e308, 1e308], 1), "the weights sum to inf"),
        (lambda: lm.Loader(torch.arange(2), 1, weights=[1, 1, 1]), "one number for each of the 2 rows"),
        (lambda: lm.Loader(torch.arange(2), 1, weights=["a", "b"]), "one number for each of the 2 rows"),
        (lambda: loader([1, 1], None), "lm.Loader(data, batch_size=64)"),
        (lambda: loader([1, 1], 1, shuffle=False), "weights= and shuffle=False"),
        (lambda: loader([1, 1], None, tokens=3, lengths=[1, 1]), "tokens= and weights="),
        (lambda: lm.data.balanced([]), "shape (0,)"),
        (lambda: lm.data.balanced([[0, 1], [1, 0]]), "y.argmax(1)"),
        (lambda: lm.data.balanced([0.5, 1.5]), "float64"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(BatchError, match=re.escape(message)):
        make()


def test_draws_cross_blocks():
    data = loader(np.arange(1, 20_001), 5000, seed=4)
    batches = torch.cat([*data.epoch(1)])
    single = lm.Loader(torch.arange(20_000), 1, seed=4, weights=np.arange(1, 20_001))
    assert all(next(single.epoch(1, start)) == batches[start] for start in (0, 8191, 8192, 16_384, 19_999))
