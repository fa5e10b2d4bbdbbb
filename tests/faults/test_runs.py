"""Whole runs in processes of their own, and what may happen to them: after each fault, as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import lumen as lm
from tests import zygote
from tests.tiers import in_turns, pick

ROOT = Path(__file__).parents[2]
JOB = Path(__file__).with_name("job.py")
# The nightly form: LUMEN_FAULT_POINTS=100 pytest tests/faults/test_runs.py -k kill
POINTS = int(os.environ.get("LUMEN_FAULT_POINTS", pick("5", "30")))
LIMIT = 90  # seconds for one process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 + 20 * POINTS)]


def start(directory, **options):
    (directory / "started").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(JOB), str(directory), json.dumps(options)]
    return zygote.start(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """The exit code and what was said; nothing that was started stays behind."""
    try:
        _, said = process.communicate(timeout=LIMIT)
    finally:
        end_group(process)
    return process.returncode, said


def end_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(path, process):
    if not began(path, process):
        code, said = finish(process)
        pytest.fail(f"the job ended with {code} before its first step: {said[-2000:]}")


def began(path, process):
    """Whether the job makes a step: one that was killed after its last checkpoint has none left to make."""
    deadline = time.monotonic() + LIMIT
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return path.exists()


def run(directory, **options):
    return finish(start(directory, **options))


def completed(directory, **options):
    code, said = run(directory, **options)
    assert code == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    completed(directory)
    return directory


def steps_of(directory):
    return lm.Checkpointer(directory).store.steps()


def logged(directory):
    timed = ("time", "steps_per_second", "rows_per_second", "goodput", "data_wait", "slowest_rank", "slowest_ratio")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def assert_same(directory, whole):
    found, expected = (lm.checkpoint.load(d / "final") for d in (directory, whole))
    mine, theirs = lm.tree.named_tensors(found), lm.tree.named_tensors(expected)
    assert [path for path, _ in mine] == [path for path, _ in theirs]
    for (path, a), (_, b) in zip(mine, theirs, strict=True):
        assert torch.equal(a, b), path
    assert logged(directory) == logged(whole)


# ------------------------------------------------------------------------------------------- killed


@pytest.mark.filterwarnings("default:the moments are")
def test_killed_at_random_moments(tmp_path, whole):
    """Wherever the moment falls: in a step, in a save, in the deletion of an old checkpoint."""
    seed = int(os.environ.get("LUMEN_FAULT_SEED", random.SystemRandom().randrange(10**6)))
    moments = random.Random(seed)
    warnings.warn(f"the moments are those of seed {seed}", stacklevel=1)  # shown, also where it passes
    kills = 0
    while kills < POINTS:
        process = start(tmp_path, workers=2 * (kills % 2), slow=0.02)
        if began(tmp_path / "started", process):
            time.sleep(moments.uniform(0, 0.7))
        code = process.poll()
        end_group(process)
        if code == 0:  # it was through: once more from the beginning
            assert_same(tmp_path, whole)
            shutil.rmtree(tmp_path)
            continue
        assert process.returncode == -signal.SIGKILL
        kills += 1
    completed(tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(("nth", "kind"), in_turns([1, 2, 7], ["rename", "unlink"]))
def test_killed_while_it_saves_or_deletes(tmp_path, whole, kind, nth):
    """Renaming is how a checkpoint is committed, and how one begins to be deleted."""
    for extra in range(2):
        code, said = run(tmp_path, die_in=kind, nth=nth + extra)
        assert code == -signal.SIGKILL, said[-2000:]
    completed(tmp_path)
    assert_same(tmp_path, whole)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".") and path.is_dir()]


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "workers"), in_turns([signal.SIGTERM, signal.SIGINT], [0, 2]))
def test_one_signal_finishes_the_step_and_saves(tmp_path, whole, number, workers):
    process = start(tmp_path, slow=0.05, every=1000, workers=workers)
    wait_for(tmp_path / "started", process)
    time.sleep(0.3)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the workers too
    else:
        process.send_signal(number)
    code, said = finish(process)
    assert code == 75, said[-2000:]
    assert said.count("ending after this step") == 1
    assert "Traceback" not in said
    assert steps_of(tmp_path)[-1] > 1
    completed(tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path, whole, number):
    process = start(tmp_path, slow=0.5, every=1000)
    wait_for(tmp_path / "started", process)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    code, said = finish(process)
    # SIGINT: Python's KeyboardInterrupt; SIGTERM: the system's own way to end a process. To end by itself is 0 or 75.
    assert code == -number, said[-2000:]
    completed(tmp_path)
    assert_same(tmp_path, whole)


# ------------------------------------------------------------------------------------------- the disk


def test_a_full_disk_is_an_error_and_costs_no_checkpoint(tmp_path, whole):
    code, said = run(tmp_path, full_after=14)
    assert code == 1
    assert "CheckpointError" in said or "OSError" in said
    assert steps_of(tmp_path)
    completed(tmp_path)
    assert_same(tmp_path, whole)


@pytest.fixture
def small_disk(tmp_path):
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_small_tmpfs_that_is_full(small_disk, whole):
    ballast = small_disk / "ballast"
    process = start(small_disk, slow=0.05)
    wait_for(small_disk / "started", process)
    while not steps_of(small_disk) and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(b"x" * 6_000_000)
    code, said = finish(process)
    assert code == 1, said[-2000:]
    assert "No space left" in said
    ballast.unlink()
    completed(small_disk)
    assert_same(small_disk, whole)


def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    code, said = run(tmp_path)
    assert code == 1
    assert "checkpoints" in said
    assert not (tmp_path / "started").exists()


def newest(directory):
    return lm.Checkpointer(directory).latest()


def damage(path, how):
    file = max((each for each in path.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size)
    if how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "one bit"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, whole, how):
    completed(tmp_path, steps=19)
    last = newest(tmp_path)
    damage(last, how)
    with pytest.raises(lm.errors.CorruptCheckpointError, match=last.name):
        lm.checkpoint.load(last)
    completed(tmp_path)
    assert_same(tmp_path, whole)
    assert (tmp_path / "checkpoints" / f"damaged-{last.name}").is_dir()


def test_two_runs_in_one_directory_are_refused(tmp_path):
    first = start(tmp_path, slow=0.2)
    try:
        wait_for(tmp_path / "started", first)
        code, said = run(tmp_path)
        assert code == 1
        assert f"{first.pid}" in said
        assert "CheckpointLockedError" in said
    finally:
        end_group(first)
    completed(tmp_path)  # the lock ended with its process


# ------------------------------------------------------------------------------------------- data and numbers


def test_a_killed_worker_is_an_error_and_the_run_goes_on(tmp_path, whole):
    code, said = run(tmp_path, workers=2, kill_worker=17, slow=0.01)
    assert code == 1
    assert "died with exit code -9" in said or "is killed by signal: Killed" in said
    (tmp_path / "cured").touch()
    completed(tmp_path, workers=2)
    assert_same(tmp_path, whole)


def test_nan_is_skipped(tmp_path):
    completed(tmp_path, guard="skip", bad_step=20)
    final = lm.checkpoint.load(tmp_path / "final")
    assert int(final["slots"]["guard"]["skipped"]) == 1
    assert all(value.isfinite().all() for value in final["params"].values())


@pytest.mark.parametrize("mode", ["raise", "dump"])
def test_nan_ends_the_run_which_goes_on_when_it_is_cured(tmp_path, mode):
    code, said = run(tmp_path, guard=mode, bad_step=20)
    assert code == 1
    assert "NonFiniteError" in said
    assert "raised in step 21" in said
    assert said.count("Traceback") == 1
    if mode == "dump":
        assert lm.checkpoint.metadata(tmp_path / "dumps" / "step-20")["meta"]["step"] == 20
    (tmp_path / "cured").touch()
    completed(tmp_path, guard=mode, bad_step=20)
    smooth = tmp_path / "smooth"
    completed(smooth, guard=mode)
    assert_same(tmp_path, smooth)
