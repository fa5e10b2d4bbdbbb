"""Going on in the middle of data of every kind: the same batches as without the interruption."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

import lumen as lm
from lumen.checkpoint import json_tree as plain
from lumen.data.adapters import make_feed
from lumen.errors import BatchError, InexactWarning

ROWS = list(range(11))


class Noisy:
    """Draws from torch's global generator for each row, as augmentations do."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return torch.tensor([float(index), torch.rand(()).item()])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def values(batch):
    return batch["x"].tolist() if isinstance(batch, dict) else torch.as_tensor(batch).tolist()


def uninterrupted(make, epochs):
    torch.manual_seed(5)
    each = make_feed(make())
    return [[values(batch) for batch in each.epoch(epoch)] for epoch in range(epochs)]


def interrupted(make, epochs, at, position):
    """The same, stopped in epoch `at` at `position` and gone on with in what could be another process."""
    torch.manual_seed(5)
    each = make_feed(make())
    found = [[values(batch) for batch in each.epoch(epoch)] for epoch in range(at)]
    batches = each.epoch(at)
    found.append([values(next(batches)) for _ in range(position)])
    saved, generator = each.state_dict(at, position), torch.get_rng_state()
    del batches

    torch.manual_seed(77)
    again = make_feed(make())
    again.load_state_dict(saved)
    torch.set_rng_state(generator)
    found[-1] += [values(batch) for batch in again.epoch(at, position)]
    return found + [[values(batch) for batch in again.epoch(epoch)] for epoch in range(at + 1, epochs)]


def generator():
    return torch.Generator().manual_seed(3)


EXACT = {
    "Loader": lambda: lm.Loader(torch.arange(11), batch_size=3, seed=1),
    "Loader, workers": lambda: lm.Loader(ROWS, batch_size=3, seed=1, workers=2),
    "list": lambda: [torch.tensor([i]) for i in ROWS],
    "DataLoader": lambda: DataLoader(ROWS, batch_size=3),
    "shuffled": lambda: DataLoader(ROWS, batch_size=3, shuffle=True),
    "own generator": lambda: DataLoader(ROWS, batch_size=3, shuffle=True, generator=generator()),
    "drawing rows": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "drop_last": lambda: DataLoader(ROWS, batch_size=3, shuffle=True, drop_last=True),
    "batch sampler": lambda: DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 3, drop_last=False)),
    "unbatched": lambda: DataLoader(ROWS, batch_size=None, shuffle=True),
}


@pytest.mark.parametrize("position", [1, 2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_goes_on_exactly(name, position):
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)  # nothing to confess
        assert interrupted(EXACT[name], 3, 1, position) == uninterrupted(EXACT[name], 3)


def test_goes_on_at_the_very_end_of_an_epoch():
    make = EXACT["shuffled"]
    assert interrupted(make, 3, 1, 4) == uninterrupted(make, 3)


def test_workers_of_a_torch_loader_keep_the_order_and_say_what_they_cannot_keep():
    make = lambda: DataLoader(ROWS, batch_size=3, shuffle=True, num_workers=2)  # noqa: E731
    with pytest.warns(InexactWarning, match=r"data set's random numbers are not.*lm\.Loader") as caught:
        found = interrupted(make, 3, 1, 2)
    assert sum(issubclass(w.category, InexactWarning) for w in caught) == 1
    assert found == uninterrupted(make, 3)


def test_nothing_is_read_of_what_came_before():
    read = []

    class Counting(Noisy):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    each = make_feed(DataLoader(Counting(), batch_size=2))
    next(each.epoch(0))
    again = make_feed(DataLoader(Counting(), batch_size=2))
    again.load_state_dict(each.state_dict(0, 1))
    read.clear()
    next(again.epoch(0, 1))
    assert read == [2, 3]


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(), batch_size=3), lambda: iter(ROWS), Stream])
def test_what_cannot_start_in_the_middle_is_read_again_and_says_so(make):
    with pytest.warns(InexactWarning, match=r"read again and dropped.*lm\.Loader"):
        assert interrupted(make, 1, 0, 2) == uninterrupted(make, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_stateful_data_loader(workers, own):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        options = {"generator": generator()} if own else {}
        return stateful.StatefulDataLoader(ROWS, batch_size=3, shuffle=True, num_workers=workers, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if workers else "error", InexactWarning)
        assert interrupted(make, 3, 1, 2) == uninterrupted(make, 3), "later epochs too"


def hugging_face_stream(*, shuffled=True, **shuffle):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": ROWS}).to_iterable_dataset(num_shards=2)
    return (rows.shuffle(**shuffle) if shuffled else rows).with_format("torch").batch(3)


def test_hugging_face_streams():
    make = lambda: hugging_face_stream(seed=0, buffer_size=4)  # noqa: E731
    plain = lambda: hugging_face_stream(shuffled=False)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        assert interrupted(plain, 3, 1, 2) == uninterrupted(plain, 3)
    assert uninterrupted(make, 2)[0] != uninterrupted(make, 2)[1]


def test_a_place_before_what_was_read_ahead_is_read_again():
    make = lambda: hugging_face_stream(shuffled=False)  # noqa: E731
    each = make_feed(make())
    batches = each.epoch(0)
    found = [values(next(batches)) for _ in range(3)]  # as a step that unrolls reads them
    saved = each.state_dict(0, 2)
    again = make_feed(make())
    again.load_state_dict(saved)
    with pytest.warns(InexactWarning, match="read again"):
        rest = [values(batch) for batch in again.epoch(0, 2)]
    assert [found[:2] + rest] == uninterrupted(make, 1)


def test_a_shuffle_buffer_says_that_its_rows_are_lost():
    make = lambda: hugging_face_stream(seed=0, buffer_size=4)  # noqa: E731
    with pytest.warns(InexactWarning, match="shuffle buffer of 4 rows"):
        found = interrupted(make, 3, 1, 2)
    assert found[2] == uninterrupted(make, 3)[2]


def test_a_stream_that_is_shuffled_without_a_seed_cannot_go_on():
    with pytest.raises(BatchError, match=r"shuffled in another order.*seed=0"):
        interrupted(lambda: hugging_face_stream(buffer_size=4), 2, 1, 2)


def test_workers_that_live_on_draw_no_seed_in_later_epochs():
    make = lambda: DataLoader(ROWS, batch_size=3, shuffle=True, num_workers=1, persistent_workers=True)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InexactWarning)
        found = interrupted(make, 3, 1, 2)
    assert found[:2] == uninterrupted(make, 2)


def shuffled_by_hand(draws):
    class ByHand(torch.utils.data.Sampler):
        def __len__(self):
            return len(ROWS)

        def __iter__(self):
            yield from draws(list(ROWS))

    return DataLoader(ROWS, batch_size=3, sampler=ByHand())


def at_once(rows):
    random.shuffle(rows)
    return np.random.permutation(rows)  # noqa: NPY002


def test_samplers_of_other_kinds_go_on_with_all_generators_and_say_so():
    make = lambda: shuffled_by_hand(at_once)  # noqa: E731
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    wanted = uninterrupted(make, 2)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with pytest.warns(InexactWarning, match="sampler is not one of torch's"):
        found = interrupted(make, 2, 1, 2)
    assert found == wanted


def test_hugging_face_tables_are_samples_of_a_loader():
    datasets = pytest.importorskip("datasets")
    make = lambda: lm.Loader(datasets.Dataset.from_dict({"x": ROWS}).with_format("torch"), batch_size=3)  # noqa: E731
    assert interrupted(make, 2, 1, 2) == uninterrupted(make, 2)


def test_epochs_are_announced_to_samplers_that_shuffle_by_them():
    sampler = torch.utils.data.DistributedSampler(ROWS, num_replicas=1, rank=0)
    each = make_feed(DataLoader(ROWS, batch_size=3, sampler=sampler))
    first, second = ([values(batch) for batch in each.epoch(epoch)] for epoch in (0, 1))
    assert first != second
    assert [values(batch) for batch in each.epoch(0)] == first


class ByEpoch(IterableDataset):
    """One row: the epoch that it was told."""

    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield self.epoch

    def __len__(self):
        return 1


class Rows(torch.utils.data.Dataset):
    """The epoch that it was told, in its row."""

    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.tensor([self.epoch])


def told(each):
    epochs = [[values(batch) for batch in each.epoch(epoch)] for epoch in (0, 1, 5)]
    return [batches[0] for batches in epochs]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_reach_data_sets_in_loaders_and_their_workers(workers, persistent):
    options = {"num_workers": workers, "persistent_workers": persistent and bool(workers)}
    assert told(make_feed(DataLoader(ByEpoch(), batch_size=1, **options))) == [[0], [1], [5]]
    nested = torch.utils.data.Subset(torch.utils.data.ConcatDataset([Rows(), Rows()]), [1])
    assert told(make_feed(DataLoader(nested, batch_size=1, **options))) == [[[0]], [[1]], [[5]]]


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_reach_the_data_set_of_a_loader(workers):
    assert told(make_feed(lm.Loader(torch.utils.data.Subset(Rows(), [0]), batch_size=1, workers=workers))) == [
        [[0]],
        [[1]],
        [[5]],
    ]


def test_epochs_reach_samplers_in_batch_samplers():
    sampler = torch.utils.data.DistributedSampler(ROWS, num_replicas=1, rank=0)
    each = make_feed(DataLoader(ROWS, batch_sampler=BatchSampler(sampler, 3, drop_last=False)))
    first, second = ([values(batch) for batch in each.epoch(epoch)] for epoch in (0, 1))
    assert first != second


def test_state_without_a_plain_form_is_left_out_and_says_so_once():
    class Opaque:
        def __iter__(self):
            return iter(ROWS)

        def state_dict(self):
            return {"reader": object()}

        def load_state_dict(self, state):
            raise AssertionError("nothing was saved")

    with pytest.warns(InexactWarning) as caught:
        assert interrupted(Opaque, 1, 0, 3) == uninterrupted(Opaque, 1)
    assert sorted("no plain form" in str(w.message) for w in caught) == [False, True]


def test_another_order_is_refused():
    saved = make_feed(lm.Loader(torch.arange(11), batch_size=3)).state_dict(0, 1)
    with pytest.raises(BatchError, match=r"batch_size=3 \(here 4\)"):
        make_feed(lm.Loader(torch.arange(11), batch_size=4)).load_state_dict(saved)


@pytest.mark.parametrize("data", [3, "text", {"x": torch.ones(3)}])
def test_what_is_no_data(data):
    with pytest.raises(BatchError, match=r"lm\.Loader"):
        make_feed(data)


def test_plain_data_survives_packing():
    value = {
        "a": [1, 2.5, float("inf"), None, True, "é"],
        3: (b"\x00\xff", torch.arange(3, dtype=torch.uint8)),
        "n": {"x": np.arange(2.0), "y": np.float32(1.5)},
        "empty": [(), {}, []],
    }
    packed = plain.pack(value)
    assert all(isinstance(t, torch.Tensor) for t in packed["tensors"])
    found = plain.unpack(packed)
    assert found["a"] == value["a"]
    assert found[3][0] == value[3][0]
    assert torch.equal(found[3][1], value[3][1])
    assert (found["n"]["x"] == value["n"]["x"]).all()
    assert found["empty"] == value["empty"]
    with pytest.raises(TypeError, match=r"\['a'\]\[1\] is a set"):
        plain.pack({"a": [1, {2}]})
