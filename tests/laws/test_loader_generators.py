"""Loader without workers: a data set's draws follow from seed, epoch and position; the program's are left alone."""

import copy
import itertools
import pickle  # noqa: TID251 (others may pickle NumPy's generator)
import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import get_bit_generator, set_bit_generator

from lumen.data import Loader, Mixture
from lumen.data.mt19937 import MT19937

N, BATCH = 9, 4
DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "normal": lambda: np.random.standard_normal(),  # noqa: NPY002
    "python": lambda: random.random(),
    "gauss": lambda: random.gauss(0, 1),
    "seed": lambda: np.random.seed(7) or np.random.rand(),  # noqa: NPY002
    "generator": lambda: float(np.random.Generator(get_bit_generator()).random()),
    "nothing": lambda: 0.0,
}
names = st.lists(st.sampled_from(list(DRAWS)), max_size=6)


class Drawing:
    """Samples that draw what is asked of each of `rows`, and fail at `broken`."""

    def __init__(self, draws, rows=range(N), broken=None):
        self.draws, self.rows, self.broken = draws, rows, broken

    def __len__(self):
        return N

    def __getitem__(self, index):
        values = [DRAWS[name]() if index in self.rows else 0.0 for name in self.draws]
        if index == self.broken:
            raise KeyError(index)
        return torch.tensor([index, *values, *[0.0] * (6 - len(values))], dtype=torch.float64)


def states():
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    words = numpy.pop("state")
    return torch.get_rng_state().tolist(), random.getstate(), {**numpy, **words, "key": words["key"].tolist()}


def restart(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def draw(kinds):
    return [DRAWS[kind]() for kind in kinds]


def equal(batches, others):
    return len(batches) == len(others) and all(map(torch.equal, batches, others))


@settings(max_examples=25)
@given(names, st.lists(names, min_size=3, max_size=3), st.sets(st.integers(0, N - 1)), st.integers(0, 2**32 - 1))
def test_data_set_and_program_draw_as_if_the_other_were_not_there(of_data, between, rows, seed):
    loader = Loader(Drawing(of_data, rows), BATCH, seed=3)
    restart(seed)
    alone = [(draw(kinds), states()) for kinds in between]
    restart(seed)
    epoch, batches, together = loader.epoch(5), [], []
    for kinds in between:
        batches.append(next(epoch))
        together.append((draw(kinds), states()))
    assert together == alone
    assert equal(batches, [next(loader.epoch(5, start)) for start in (0, 1, 2)])


@settings(max_examples=10)
@given(names, names, st.booleans())
def test_loaders_that_take_turns_draw_as_each_alone(one, other, mixture):
    def loaders():
        sets = [Drawing(one), Drawing(other, range(0, N, 2))]
        if mixture:
            sets[1] = Mixture({"a": sets[0], "b": sets[1]}, weights={"a": 1, "b": 2})
        return [Loader(data, BATCH, seed=seed) for seed, data in enumerate(sets)]

    alone = [list(loader) for loader in loaders()]
    restart(1)
    before = states()
    turns = list(itertools.zip_longest(*loaders()))
    assert states() == before
    for i, batches in enumerate(alone):
        assert equal([turn[i] for turn in turns if turn[i] is not None], batches)


@settings(max_examples=10)
@given(names, names, st.integers(0, N - 1))
def test_a_sample_that_fails_leaves_the_programs_generators(of_data, before, broken):
    draw(before)
    found = states()
    loader = Loader(Drawing(of_data, broken=broken), BATCH, shuffle=False)
    with pytest.raises(KeyError):
        list(loader)
    assert states() == found


def test_a_thread_beside_reads_complete_states_and_its_own_generators_are_its_own():
    loader, stop, problems = Loader(Drawing(["numpy", "torch", "gauss"]), 1), threading.Event(), []
    expected = list(loader.epoch(0))

    def beside():
        own = np.random.default_rng(0), torch.Generator().manual_seed(0), random.Random(0)
        values = [np.random.default_rng(0).random(), torch.rand(1, generator=torch.Generator().manual_seed(0)).item()]
        if [own[0].random(), torch.rand(1, generator=own[1]).item(), own[2].random()] != [
            *values,
            random.Random(0).random(),
        ]:
            problems.append("own generators")
        while not stop.is_set():
            state = np.random.get_state()  # noqa: NPY002
            if len(state) != 5 or len(state[1]) != 624:
                problems.append(state)

    thread = threading.Thread(target=beside)
    thread.start()
    found = [list(loader.epoch(0)) for _ in range(5)]
    stop.set()
    thread.join()
    assert not problems
    assert all(equal(batches, expected) for batches in found)


# ------------------------------------------------------------------------------ NumPy's generator, replaced by an equal


@pytest.fixture
def own_generator():
    """A new generator behind NumPy's functions, to which nothing else refers."""
    before = get_bit_generator()
    set_bit_generator(np.random.MT19937(5))
    yield
    set_bit_generator(before)


def read():
    list(Loader(Drawing(["numpy"]), BATCH))


def test_a_generator_that_others_share_stays(own_generator):
    shared = np.random.Generator(get_bit_generator())
    read()
    assert get_bit_generator() is shared.bit_generator
    expected = np.random.Generator(np.random.MT19937(5)).random(4)
    assert [shared.random(), np.random.rand(), shared.random(), np.random.rand()] == list(expected)  # noqa: NPY002


def test_the_generator_in_its_place_is_numpys_in_all_that_it_does(own_generator):
    plain = np.random.MT19937(5)
    read()
    placed = get_bit_generator()
    assert type(placed) is MT19937
    np.testing.assert_equal(placed.state, plain.state)
    assert [child.random_raw() for child in placed.spawn(2)] == [child.random_raw() for child in plain.spawn(2)]
    for copied in (copy.deepcopy(placed), pickle.loads(pickle.dumps(placed))):
        assert type(copied) is np.random.MT19937
        np.testing.assert_equal(copied.state, plain.state)
    assert placed.jumped().random_raw() == plain.jumped().random_raw()
    legacy = np.random.get_state()  # noqa: NPY002
    first = np.random.rand(3).tolist()  # noqa: NPY002
    np.random.set_state(legacy)  # noqa: NPY002
    read()
    assert np.random.rand(3).tolist() == first == np.random.RandomState(plain).rand(3).tolist()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    read()
    assert np.random.rand() == np.random.RandomState(3).rand()  # noqa: NPY002
    with pytest.raises(ValueError, match="MT19937"):
        placed.state = np.random.PCG64(0).state
