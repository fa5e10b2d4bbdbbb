"""WebDataset's pipelines as data: what they give at each epoch, after a resume, on ranks, and of damaged shards."""

from __future__ import annotations

import gc
import io
import tarfile
import warnings

import numpy as np
import pytest
from torch.utils.data import DataLoader

import lumen as lm
from lumen.core import distributed
from lumen.data.adapters import make_feed
from lumen.errors import BatchError, InexactWarning

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of files that it leaves open

wds = pytest.importorskip("webdataset")
N, SHARDS = 10, 4


@pytest.fixture(autouse=True)
def _open_files():
    """They are in reference cycles, which are collected while the warning is ignored."""
    yield
    gc.collect()


@pytest.fixture
def shards(tmp_path):
    """Tar files of the rows 0, 4, 8; 1, 5, 9; 2, 6; 3, 7."""
    paths = [tmp_path / f"{shard}.tar" for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for row in range(shard, N, SHARDS):
                member = tarfile.TarInfo(f"{row:04d}.cls")
                member.size = len(str(row))
                tar.addfile(member, io.BytesIO(str(row).encode()))
    return [str(path) for path in paths]


def pipeline(shards, **options):
    rows = wds.WebDataset(shards, **{"shardshuffle": False, **options}).decode().to_tuple("cls")
    return rows.map(lambda row: {"x": row[0]})


def read(feed, epoch, position=0):
    return [np.asarray(batch["x"]).tolist() for batch in feed.epoch(epoch, position)]


def joined(batches):
    return sorted(row for batch in batches for row in batch)


def test_a_run_that_goes_on_reads_again_and_says_so(shards):
    make = lambda: make_feed(pipeline(shards, shardshuffle=SHARDS, seed=3).batched(3))  # noqa: E731
    feed = make()
    whole = read(feed, 0)
    assert joined(whole) == list(range(N))
    assert read(feed, 1) == whole, "a seed fixes the order of each pass"
    again = make()
    again.load_state_dict(feed.state_dict(0, 2))
    with pytest.warns(InexactWarning, match="read again and dropped"):
        assert read(again, 0, 2) == whole[2:]


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_deterministic_shuffles_begin_each_epoch_by_its_number(shards, options):
    def make():
        data = pipeline(shards, shardshuffle=SHARDS, detshuffle=True, seed=3)
        return make_feed(DataLoader(data, batch_size=3, **options))

    feed = make()
    epochs = [read(feed, number) for number in range(2)]
    assert epochs[0] != epochs[1]
    assert read(feed, 0) == epochs[0]
    again = make()
    again.load_state_dict(feed.state_dict(1, 2))
    with pytest.warns(InexactWarning, match="read again and dropped"):
        assert read(again, 1, 2) == epochs[1][2:]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_is_on_one_rank(shards, workers, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    rows = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        data = DataLoader(pipeline(shards, nodesplitter=wds.split_by_node), batch_size=3, num_workers=workers)
        with pytest.raises(BatchError, match=r"lm\.data\.per_rank\(data\)"):
            make_feed(data)
        rows += read(make_feed(lm.data.per_rank(data)), 0)
    assert joined(rows) == list(range(N))


def test_shards_that_are_missing_or_cut_within_a_row_are_errors(shards):
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        read(make_feed(pipeline([*shards, "none.tar"]).batched(3)), 0)
    with open(shards[1], "r+b") as file:
        file.truncate(700)
    with pytest.raises(tarfile.ReadError, match=r"1\.tar"):
        read(make_feed(pipeline(shards).batched(3)), 0)


def test_a_shard_that_is_cut_between_rows_just_ends(shards):
    """Tar has no count of its members, and Python's tarfile takes the end of the file for that of the archive."""
    with open(shards[1], "r+b") as file:
        file.truncate(1024)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        assert joined(read(make_feed(pipeline(shards).batched(3)), 0)) == [0, 1, 2, 3, 4, 6, 7, 8]
