"""Going on in the middle of data of every kind: the same batches as without the interruption."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

import lumen as lm
from lumen.checkpoint import plain
from lumen.data.feed import feed
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
    each = feed(make())
    return [[values(batch) for batch in each.epoch(epoch)] for epoch in range(epochs)]


def interrupted(make, epochs, at, position):
    """The same, stopped in epoch `at` at `position` and gone on with in what could be another process."""
    torch.manual_seed(5)
    each = feed(make())
    found = [[values(batch) for batch in each.epoch(epoch)] for epoch in range(at)]
    batches = each.epoch(at)
    found.append([values(next(batches)) for _ in range(position)])
    saved, generator = each.state_dict(at, position), torch.get_rng_state()
    del batches

    torch.manual_seed(77)
    again = feed(make())
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
    with pytest.warns(InexactWarning, match=r"draws at random is not.*lm\.Loader") as caught:
        found = interrupted(make, 3, 1, 2)
    assert sum(issubclass(w.category, InexactWarning) for w in caught) == 1
    assert found == uninterrupted(make, 3)


def test_nothing_is_read_of_what_came_before():
    read = []

    class Counting(Noisy):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    each = feed(DataLoader(Counting(), batch_size=2))
    next(each.epoch(0))
    again = feed(DataLoader(Counting(), batch_size=2))
    again.load_state_dict(each.state_dict(0, 1))
    read.clear()
    next(again.epoch(0, 1))
    assert read == [2, 3]


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(), batch_size=3), lambda: iter(ROWS), Stream])
def test_what_cannot_start_in_the_middle_is_read_again_and_says_so(make):
    with pytest.warns(InexactWarning, match=r"read again and dropped.*lm\.Loader"):
        assert interrupted(make, 1, 0, 2) == uninterrupted(make, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_stateful_data_loader(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    make = lambda: stateful.StatefulDataLoader(ROWS, batch_size=3, shuffle=True, num_workers=workers)  # noqa: E731
    with pytest.warns(InexactWarning, match="exactly to the end of its epoch"):
        found = interrupted(make, 2, 1, 2)
    assert found == uninterrupted(make, 2)


def test_hugging_face_streams():
    datasets = pytest.importorskip("datasets")

    def make():
        rows = datasets.Dataset.from_dict({"x": ROWS}).to_iterable_dataset(num_shards=2)
        return rows.shuffle(seed=0, buffer_size=4).with_format("torch").batch(3)

    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        assert interrupted(make, 3, 1, 2) == uninterrupted(make, 3)
    assert uninterrupted(make, 2)[0] != uninterrupted(make, 2)[1]


def test_hugging_face_tables_are_samples_of_a_loader():
    datasets = pytest.importorskip("datasets")
    make = lambda: lm.Loader(datasets.Dataset.from_dict({"x": ROWS}).with_format("torch"), batch_size=3)  # noqa: E731
    assert interrupted(make, 2, 1, 2) == uninterrupted(make, 2)


def test_epochs_are_announced_to_samplers_that_shuffle_by_them():
    sampler = torch.utils.data.DistributedSampler(ROWS, num_replicas=1, rank=0)
    each = feed(DataLoader(ROWS, batch_size=3, sampler=sampler))
    first, second = ([values(batch) for batch in each.epoch(epoch)] for epoch in (0, 1))
    assert first != second
    assert [values(batch) for batch in each.epoch(0)] == first


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
    saved = feed(lm.Loader(torch.arange(11), batch_size=3)).state_dict(0, 1)
    with pytest.raises(BatchError, match=r"batch_size=3 \(here 4\)"):
        feed(lm.Loader(torch.arange(11), batch_size=4)).load_state_dict(saved)


@pytest.mark.parametrize("data", [3, "text", {"x": torch.ones(3)}])
def test_what_is_no_data(data):
    with pytest.raises(BatchError, match=r"lm\.Loader"):
        feed(data)


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
