"""The order of a data set: a bijection, uniform, and the same for ever."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lumen.data import permutation, permute
from lumen.errors import BatchError

sizes = st.integers(1, 400) | st.sampled_from([1, 2, 3, 255, 256, 257, 8191, 8192, 8193, 10_000])
seeds = st.integers(-(2**63), 2**63 - 1)
epochs = st.integers(0, 2**63 - 1)


@given(n=sizes, seed=seeds, epoch=epochs)
@example(n=1, seed=0, epoch=0)
@example(n=2, seed=-1, epoch=2**63 - 1)
def test_bijection(n, seed, epoch):
    assert sorted(permute(n, seed, epoch, np.arange(n)).tolist()) == list(range(n))


@pytest.mark.parametrize("n", range(1, 130))
def test_bijection_of_every_small_set(n):
    assert sorted(permute(n, 3, 5, np.arange(n)).tolist()) == list(range(n))


@given(n=st.integers(1, 2**63 - 1), seed=seeds, epoch=epochs, data=st.data())
def test_huge_sets_cost_their_positions_alone(n, seed, epoch, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), max_size=50, unique=True))
    found = permute(n, seed, epoch, positions)
    assert len(set(found.tolist())) == len(positions)
    assert all(0 <= row < n for row in found.tolist())


@given(n=sizes, seed=seeds, epoch=epochs, data=st.data())
def test_each_position_is_computed_alone(n, seed, epoch, data):
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=12)), np.int64)
    whole = permute(n, seed, epoch, np.arange(n))
    assert permute(n, seed, epoch, positions).tolist() == whole[positions].tolist()
    assert permute(n, seed, epoch, positions[:, None]).shape == (len(positions), 1)
    assert all(permute(n, seed, epoch, p) == whole[p] for p in positions[:2])


@given(n=st.integers(1, 30_000), seed=seeds, epoch=epochs, data=st.data())
def test_rows_are_a_slice_of_the_order(n, seed, epoch, data):
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    assert np.array_equal(
        permutation.rows(n, seed, epoch, start, stop), permute(n, seed, epoch, np.arange(start, stop))
    )
    assert np.array_equal(permutation.rows(n, None, epoch, start, stop), np.arange(start, stop))


@given(seed=seeds, epoch=st.integers(0, 2**62))
def test_seeds_and_epochs_give_other_orders(seed, epoch):
    orders = [permute(500, seed, epoch, np.arange(500)), permute(500, seed, epoch + 1, np.arange(500))]
    orders.append(permute(500, seed ^ 1, epoch, np.arange(500)))
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 15  # 1 is expected


def test_the_numbers_never_change():
    # A checkpoint's cursor means these; see `loader.VERSION`.
    assert permute(10, 0, 0, np.arange(10)).tolist() == [0, 2, 8, 7, 5, 9, 1, 4, 6, 3]
    assert permute(2**40 + 7, -3, 11, [0, 1, 2**40 + 6]).tolist() == [239753270118, 13359567881, 1137951380]
    assert permutation.hash64(1, -2, 3) == 12056474070484764355


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_permutation_is_as_likely(n):
    draws = max(1000, 10 * math.factorial(n))
    counts = dict.fromkeys(itertools.permutations(range(n)), 0)
    for seed in range(draws):
        counts[tuple(permute(n, seed, seed % 3, np.arange(n)).tolist())] += 1
    assert is_uniform(np.array(list(counts.values())))


@pytest.mark.parametrize("n", [7, 64, 1797])
def test_rows_are_uniform_over_positions_and_neighbours_independent(n):
    orders = np.stack([permute(n, seed, 0, np.arange(n)) for seed in range(2000)])
    blocks = orders * min(n, 16) // n
    for position in (0, 1, n // 2, n - 1):
        weights = np.bincount(np.arange(n) * min(n, 16) // n)
        assert is_uniform(np.bincount(blocks[:, position], minlength=len(weights)), weights)
    steps = (orders[:, 1:] - orders[:, :-1]) % n  # uniform over 1 … n-1
    assert is_uniform(np.bincount(steps[:, n // 2 - 1] - 1, minlength=n - 1))
    fixed = (orders == np.arange(n)).sum(axis=1)  # a Poisson law with mean 1
    assert abs(fixed.mean() - 1) < 0.1
    assert abs(fixed.var() - 1) < 0.15


def is_uniform(counts, weights=None):
    """Pearson's test at about five standard deviations: the seeds are fixed, so it cannot flicker."""
    weights = np.ones(len(counts)) if weights is None else weights
    expected = counts.sum() * weights / weights.sum()
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, [0]), "n is 0; it must be in"),
        ((2.0, 0, 0, [0]), "n is 2.0 of type float"),
        ((True, 0, 0, [0]), "n is True of type bool"),
        ((2, 2**63, 0, [0]), "seed is"),
        ((2, 0, -1, [0]), "epoch is -1"),
        ((2, 0, 0, [0, 2]), r"positions are in \[0, 2\]; allowed is \[0, 2\)"),
        ((2, 0, 0, [-1]), "positions are in"),
        ((2, 0, 0, [0.5]), "positions are float64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(BatchError, match=message):
        permute(*arguments)
