"""Checkpoints in an object store that fails, or whose writer dies: complete or invisible, and nothing local is lost."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading

import pytest
import torch

import lumen as lm
from lumen.checkpoint import Store, _save
from lumen.core import object_store
from lumen.errors import CheckpointError, CheckpointLockedError, CorruptCheckpointError, InexactWarning
from tests.object_stores import FaultyFileSystem, installed
from tests.tiers import pick

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def at_once(monkeypatch, tmp_path):
    """Retries without delays, and staging in a directory of the test."""
    monkeypatch.setattr(object_store, "DELAYS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def faulty():
    with installed(FaultyFileSystem) as files:
        yield files


class Killed(BaseException):
    """The writer is no more."""


def value_of(number):
    return {"weight": torch.full((3, 2), float(number)), "number": number}


def assert_whole(store, step, numbers):
    found = store.restore(step, value_of(0))
    assert found["number"] in numbers
    assert torch.equal(found["weight"], value_of(found["number"])["weight"])


def names(files):
    return sorted(name.removeprefix("/bucket/run/") for name in files.store)


def dies_at(count):
    """Every operation from this one on raises: the process that would do it is gone."""
    lock, left = threading.Lock(), [count]

    def before(operation):
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

    return before


@pytest.fixture
def written_once(monkeypatch, tmp_path):
    """Equal trees are written to the local disk once, and copied from then on."""
    write, cache = _save.write, {}

    def cached(final, temporary, snap, fields, **kwargs):
        key = repr([(record.path, record.value) for record in snap.records])
        if key not in cache:
            write(final, temporary, snap, fields, **kwargs)
            cache[key] = shutil.copytree(final, tmp_path / f"written-{len(cache)}")
        else:
            shutil.copytree(cache[key], final, dirs_exist_ok=True)

    monkeypatch.setattr(_save, "write", cached)


def save_and_replace(staging):
    with Store(URL, staging=staging) as store:
        store.save(2, value_of(2))
        store.save(2, value_of(22))
        store.wait()


def test_killed_at_any_operation_a_checkpoint_is_complete_or_invisible(faulty, written_once, tmp_path):
    """At each operation of an open, a save, the deletion of the last checkpoint, and a replacement."""
    with Store(URL, staging=tmp_path / "first") as store:
        store.save(1, value_of(1))
    start = dict(faulty.store)
    operations = []
    faulty.fail(operations.append)
    save_and_replace(tmp_path / "undisturbed")
    # Of a series of equal operations, such as uploads side by side, the first, the second and the last.
    moments = [i for i, kind in enumerate(operations) if operations[i - 1 : i + 2] != [kind] * 3]
    assert len(moments) > 20
    seen = set()
    for count in [*pick(moments, range(len(operations))), len(operations)]:
        faulty.store = dict(start)
        faulty.fail(dies_at(count))
        staging = tmp_path / str(count)
        with contextlib.suppress(Killed, CheckpointError):
            save_and_replace(staging)
        faulty.heal()
        reader = Store(URL)
        steps = reader.steps()
        assert steps, f"killed at operation {count}, nothing is left"
        for step in steps:
            assert_whole(reader, step, {1: (1,), 2: (2, 22)}[step])
        seen.add((tuple(steps), reader.restore(steps[-1], value_of(0))["number"]))
        # On an empty disk, or with the staging directory that the dead run left.
        with Store(URL, staging=staging if count % 2 else tmp_path / "empty") as again:
            found = again.steps()
            assert found[-1] >= steps[-1]
            assert_whole(again, found[-1], (1, 2, 22))
        entries = {name.partition("/")[0] for name in names(faulty)} - {".lumen-lock"}
        assert len(entries) == len(found), "what the dead run left behind is removed"
    assert seen == {((1,), 1), ((1, 2), 2), ((2,), 2), ((2,), 22)}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_operations_that_fail_now_and_then_are_tried_again(faulty, monkeypatch, moment):
    failed, total = set(), [0]

    def fails_twice_of_three(operation):
        for number in range(2):
            if (operation, number) not in failed:
                failed.add((operation, number))
                total[0] += 1
                raise ConnectionError("reset by peer")
        failed.difference_update({(operation, 0), (operation, 1)})

    faulty.fail(**{moment: fails_twice_of_three})
    # One operation of a kind at a time, so that none fails more often than it is tried.
    monkeypatch.setattr("lumen.core.object_store._MAX_THREADS", 1)
    with Store(URL) as store:
        store.save(1, value_of(1))
        store.save(2, value_of(2))
        store.wait()
        assert store.steps() == [2]
        assert_whole(store, 2, (2,))
    assert total[0] > 20


def refuse(operation):
    raise PermissionError("403 Forbidden")


def test_an_outage_is_raised_at_the_next_save_and_nothing_is_lost(faulty):
    store = Store(URL).open()
    store.save(1, value_of(1))
    store.wait()
    faulty.fail(refuse)
    store.save(2, value_of(2))  # returns
    store._writer._queue.join()
    with pytest.raises(CheckpointError, match=r"403 Forbidden.*Nothing is lost: the checkpoint is in /") as info:
        store.save(3, value_of(3))
    kept = str(info.value).partition("the checkpoint is in ")[2].partition(". Complete")[0]
    assert lm.checkpoint.load(kept)["number"] == 2
    assert "tried 4 times" in str(info.value)
    store.close()
    faulty.heal()
    assert Store(URL).steps() == [1]
    with Store(URL) as store:  # the next run of this machine uploads it first
        assert store.steps() == [1, 2]
        assert_whole(store, 2, (2,))


@pytest.fixture
def outage(faulty):
    """Until the event is set, uploads do not end; then they fail if `faulty.denies`."""
    over, faulty.denies = threading.Event(), False

    def unanswered(operation):
        if operation in ("put_file", "pipe_file"):
            over.wait()
            if faulty.denies:
                refuse(operation)

    faulty.fail(unanswered)
    yield over
    over.set()


def test_during_an_outage_training_goes_on_for_one_save_more(faulty, outage):
    outage.set()
    store = Store(URL, keep=2, monitor="loss").open()
    outage.clear()
    for step in (1, 2):
        store.save(step, value_of(step), metrics={"loss": step})  # returns
    assert store.would_keep({"loss": 0.5})
    assert not store.would_keep({"loss": 1.5}), "the metrics of what waits count"
    assert store.steps() == []
    third = threading.Thread(target=store.save, args=(3, value_of(3)))
    third.start()
    third.join(0.2)
    assert third.is_alive(), "two checkpoints at most wait on the local disk"
    outage.set()
    third.join()
    store.close()
    assert Store(URL).steps() == [1, 2, 3]
    for step in (1, 2, 3):
        assert_whole(Store(URL), step, (step,))


def test_after_an_outage_both_checkpoints_are_kept_and_named(faulty, outage, tmp_path):
    outage.set()
    store = Store(URL, keep=None, staging=tmp_path / "staging").open()
    outage.clear()
    for step in (10, 9):
        store.save(step, value_of(step))
    faulty.denies = True
    outage.set()
    message = (
        r"saving step 10 to .* failed: .*403 Forbidden.*is in (\S+)\. Saving step 9 failed: it was not uploaded after"
        r" the failure of step 10\. Nothing is lost: the checkpoint is in (\S+)\. Complete checkpoints there: none"
    )
    with pytest.raises(CheckpointError, match=message) as info:
        store.wait()
    kept = re.search(message, str(info.value)).groups()
    assert [lm.checkpoint.load(path)["number"] for path in kept] == [10, 9]
    store.wait()  # said once
    faulty.denies = False
    store.save(11, value_of(11))  # tries again
    store.close()
    with Store(URL, staging=tmp_path / "staging") as again:
        assert again.steps()[-1] == 11


def test_what_an_earlier_run_left_is_not_uploaded_over_the_checkpoints_of_a_later_one(faulty, tmp_path):
    store = Store(URL, staging=tmp_path / "here").open()
    faulty.fail(refuse)
    store.save(5, value_of(5))
    with pytest.raises(CheckpointError, match="Nothing is lost"):
        store.close()
    faulty.heal()
    with Store(URL, staging=tmp_path / "elsewhere") as other:
        other.save(3, value_of(3))
    with Store(URL, staging=tmp_path / "here") as again:
        assert again.steps() == [3]
    assert list((tmp_path / "here").rglob("5/meta/metadata"))


def test_an_outage_when_the_store_is_opened_is_an_error_before_training(faulty):
    faulty.fail(refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written to memory://bucket/run: .*403 Forbidden"):
        Store(URL).open()


def test_an_outage_while_reading_is_no_damage(faulty):
    with Store(URL) as store:
        store.save(1, value_of(1))

    def unreadable(operation):
        if operation in ("cat_file", "get_file"):
            raise TimeoutError("no answer")

    faulty.fail(unreadable)
    with pytest.raises(CheckpointError, match="could not be read: .*no answer") as info:
        Store(URL).load(1)
    assert not isinstance(info.value, CorruptCheckpointError)


def test_a_damaged_or_missing_object_is_named(faulty):
    lm.checkpoint.save(URL, value_of(1))
    data = next(name for name in faulty.store if "weight" in name and "/c/" in name)
    content = faulty().cat_file(data)
    faulty().pipe_file(data, bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CorruptCheckpointError, match=r"memory://bucket/run/state/weight/c.*'weight'.*checksum"):
        lm.checkpoint.load(URL)
    del faulty.store[data]
    with pytest.raises(CorruptCheckpointError, match="does not exist"):
        lm.checkpoint.load(URL)


def test_two_runs_at_one_url(faulty, tmp_path):
    """The second takes over; the first is refused its next checkpoint, by name."""
    first = Store(URL, staging=tmp_path / "first").open()
    first.save(1, value_of(1))
    first.wait()
    with Store(URL, staging=tmp_path / "second", keep=2) as second:
        first.save(2, value_of(2))
        first._writer._queue.join()
        with pytest.raises(CheckpointLockedError, match=r"taken over by process \d+ on .* \(run \w+\), since 20\d\d-"):
            first.save(3, value_of(3))
        first.close()
        second.save(4, value_of(4))
        second.wait()
        assert second.steps() == [1, 4]
    with (
        Store(URL, staging=tmp_path / "second"),
        pytest.raises(CheckpointLockedError, match="memory://bucket/run is in use"),
    ):
        Store(URL, staging=tmp_path / "second").open()  # on one machine a lock keeps the other out


def test_objects_that_are_deleted_during_the_run_come_back_with_the_next_save(faulty):
    with Store(URL) as store:
        store.save(1, value_of(1))
        store.wait()
        faulty.store.clear()
        store.save(2, value_of(2))
        store.wait()
    assert Store(URL).steps() == [2]


def test_a_damaged_checkpoint_is_set_aside(faulty):
    with Store(URL, keep=3) as store:
        for step in (1, 2):
            store.save(step, value_of(step))
        store.wait()
        assert store.quarantine(store.path(2)) == f"{URL}/damaged-2"
        assert store.steps() == [1]
    assert lm.checkpoint.load(f"{URL}/damaged-2")["number"] == 2


def test_a_damaged_checkpoint_is_set_aside_by_a_run_which_resumes_from_the_one_before(faulty):
    def step(state, batch):
        return {"total": state["total"] + batch.sum()}, {"loss": batch.sum()}

    def run(until):
        runner = lm.Runner(step, checkpoint=lm.Checkpointer(URL, every=lm.Every(steps=1), keep=2), progress=False)
        start = {"total": torch.zeros(())}
        return runner.fit(start, [torch.ones(1)] * 4, until=until, resume="auto")

    run(lm.Steps(2))
    header = next(name for name in faulty.store if name.endswith("/2/meta/metadata"))
    faulty().pipe_file(header, b"{}")
    with pytest.warns(InexactWarning, match="the checkpoint 2 is damaged.*resumes from 1"):
        assert run(lm.Steps(3)).state["total"] == 3
