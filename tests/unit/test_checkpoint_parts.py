"""Parts of arrays as chunks of a regular grid, without processes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lumen as lm
from lumen.checkpoint import chunk_grid, shard_specs, sharded
from lumen.checkpoint.chunk_grid import Block
from lumen.checkpoint.snapshot import take_snapshot
from lumen.core.sharding import ShardSpec, Slice
from lumen.core.step import Transform
from lumen.errors import CheckpointError


def rows_of(length, starts, rest=()):
    """Boxes between these rows."""
    edges = [0, *sorted(starts), length]
    zeros = (0,) * len(rest)
    return [Slice((0, *zeros), (a, *zeros), (b - a, *rest)) for a, b in itertools.pairwise(edges) if a < b]


@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=6), st.sampled_from([(), (4,), (2, 3)]))
def test_each_box_is_made_of_whole_chunks(length, starts, rest):
    boxes = rows_of(length, [start for start in starts if start < length], rest)
    shape = (length, *rest)
    assert chunk_grid.uncovered(shape, boxes) == ""
    chunk = chunk_grid.common_chunk(shape, boxes, 10**9)
    assert chunk_grid.uncovered(shape, boxes, chunk) == ""
    positions = [position for box in boxes for position in chunk_grid.chunks(Block(box.full, box.size), chunk)]
    assert sorted(positions) == sorted(chunk_grid.chunks(chunk_grid.full_block(shape), chunk))
    assert len(positions) == chunk_grid.count(shape, chunk)
    few = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True)) - 1
    assert chunk_grid.common_chunk(shape, boxes, few) is None, "more chunks than are allowed"


@pytest.mark.parametrize(
    ("boxes", "wrong"),
    [
        (rows_of(6, [2])[:1], "2 entries of 6"),
        ([*rows_of(6, [2]), *rows_of(6, [2])], "12 entries of 6"),
        ([Slice((0,), (0,), (3,)), Slice((0,), (2,), (3,))], "twice"),
        ([Slice((0,), (0,), (3,)), Slice((0,), (4,), (3,))], "beyond"),
    ],
)
def test_parts_that_are_not_the_whole_are_refused_by_name(boxes, wrong, tmp_path):
    tree = {"a": torch.ones(6), "w": torch.ones(6)}
    snap = take_snapshot({"state": tree}, specs={1: ShardSpec((6,), tuple(boxes), owner=True)})
    with pytest.raises(CheckpointError, match=rf"the shards of 'w' do not cover its shape \(6,\) .*{wrong}"):
        sharded.plan(snap, [], tmp_path)


def test_a_copy_that_another_process_writes_is_not_taken():
    tree = {"a": torch.ones(6), "w": torch.ones(3), "n": 3, "none": None, "v": torch.ones(2)}
    spec = ShardSpec((6,), tuple(rows_of(3, [])), owner=False)
    snap = take_snapshot({"state": tree}, specs={1: spec, 3: spec._replace(owner=True)}, with_unsharded=False)
    assert {snap.records[index].path for index in snap.data} == {("v",)}
    assert [record.shape for record in snap.records] == [(6,), (6,), (), (), (6,)], "full shapes"
    assert all(index in snap.keys for index in (0, 1, 4))


class Rows(Transform):
    """The upper or lower half of what is inside."""

    shards = True

    def __init__(self, name, low, whole):
        self.name, self.low, self.whole = name, low, whole

    def shard_specs(self, state):
        return {0: ShardSpec((self.whole, 2), (Slice((0, 0), (self.low, 0), (self.whole // 2, 2)),), owner=True)}


def test_pieces_of_several_transforms_are_composed_from_the_innermost():
    step = Rows("outer", 2, 4)(Rows("inner", 4, 8)(lambda state, batch: (state, {})))
    found = shard_specs.leaf_specs(step, {"w": torch.ones(2, 2)})
    assert found == {0: ShardSpec((8, 2), (Slice((0, 0), (6, 0), (2, 2)),), owner=True)}


def test_a_checkpoint_without_parts_is_of_the_first_format(tmp_path):
    lm.checkpoint.save(tmp_path / "x", {"w": torch.ones(2)})
    assert lm.checkpoint.metadata(tmp_path / "x")["format"] == 1
