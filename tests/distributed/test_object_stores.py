"""Checkpoints of several processes in an object store: no process reads a file that another wrote to its disk."""

from __future__ import annotations

import os

import pytest
import torch

import lumen as lm
from lumen.checkpoint import Store, sharded
from lumen.core import distributed, object_store
from lumen.errors import CheckpointError
from tests.distributed import models
from tests.distributed.test_sharded_checkpoint import assert_same, bits, step_under, trained, whole
from tests.object_stores import SharedFileSystem, installed

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

URL = "memory://bucket/run"


class OwnDisk:
    """Each rank has its own disk for staging; the objects are in a directory that all share."""

    def __init__(self, root):
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("LUMEN_TEST_OBJECTS", str(root / "objects"))
        self.disk = root / f"disk-{distributed.rank()}"
        self.disk.mkdir(exist_ok=True)
        self.patch.setenv("XDG_CACHE_HOME", str(self.disk))
        self.patch.setattr("tempfile.tempdir", str(self.disk))
        self.patch.setattr(object_store, "DELAYS", ())
        self.files = installed(SharedFileSystem)

    def __enter__(self):
        self.files.__enter__()
        return self

    def __exit__(self, *error):
        self.files.__exit__(*error)
        self.patch.undo()


def save_and_restore(root):
    """The state that was saved, and what all read of it: of one checkpoint, and of a store's, in fragments."""
    with OwnDisk(root) as machine:
        step, state = trained("fsdp3", steps=1)
        lm.checkpoint.save(URL, state, step=step)
        machine.patch.setattr(sharded, "_MAX_CHUNKS_PER_BOX", 0)
        like = step.init(models.make_state("deep", torch.float32))
        with Store(f"{URL}-store").open(step) as store:
            store.save(2, state)
            store.wait()
            again = store.restore(2, like)
        found = lm.checkpoint.restore(URL, like, step=step)
        left = [name for _, _, names in os.walk(machine.disk) for name in names if name != ".lumen-lock"]
        return whole(step, state), whole(step, found), whole(step, again), left


def test_saved_by_two_it_is_restored_by_two_and_by_one(world2, tmp_path, monkeypatch):
    results = world2.run(save_and_restore, tmp_path)
    wanted = results[0][0]
    for saved, found, again, left in results:
        for state in (saved, found, again):
            assert_same(state, wanted)
        assert left == [], "staging is empty after an upload"
    monkeypatch.setenv("LUMEN_TEST_OBJECTS", str(tmp_path / "objects"))
    with installed(SharedFileSystem):
        alone = lm.compose(*models.transforms(["ema", "donate"]))(models.step)
        like = alone.init(models.make_state("deep", torch.float32))
        assert_same(bits(lm.checkpoint.restore(URL, like)), wanted)
        assert Store(f"{URL}-store").steps() == [2]
    assert not [path for path in tmp_path.rglob("pieces/*") if path.is_file()], "fragments are deleted"


def save_with_outage(root):
    """Rank 1 cannot upload: all raise its error, nothing is listed, and each rank has kept its share."""
    with OwnDisk(root) as machine:
        step = step_under("fsdp3")
        state = step.init(models.make_state("deep", torch.float32))

        def refuse(self, *args, **kwargs):
            raise PermissionError("403 Forbidden")

        if distributed.rank() == 1:
            machine.patch.setattr(SharedFileSystem, "put_file", refuse)
        with pytest.raises(CheckpointError, match="403 Forbidden.*the shards of rank 1 are in") as info:
            lm.checkpoint.save(f"{URL}-outage", state, step=step)
        kept = {name for _, _, names in os.walk(machine.disk) for name in names}
        return str(info.value), kept


def test_if_one_process_cannot_upload_nothing_appears(world2, tmp_path):
    (first, kept_by_first), (second, kept_by_second) = world2.run(save_with_outage, tmp_path)
    assert "rank 1" in first
    assert "rank 1" in second
    assert "metadata" in kept_by_first
    assert kept_by_second
    assert not list((tmp_path / "objects").rglob("meta/metadata"))
