"""`Store`: the checkpoints of one run, written in the background while it goes on."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from lumen.checkpoint import _load, _orbax, _restore, _save, header, json_tree, shard_specs
from lumen.checkpoint.coordinator import TIMEOUT, SaveCoordinator, SaveSession
from lumen.checkpoint.fsync import sync_directory
from lumen.checkpoint.lock import Lock
from lumen.checkpoint.retention import Retention
from lumen.checkpoint.snapshot import HostMemory, Snapshot, snapshot
from lumen.core import distributed
from lumen.core.step import StepFn
from lumen.errors import CheckpointError, CheckpointExistsError, CheckpointNotFoundError, InexactWarning

_REPLACED = re.compile(rf"\.([0-9]+){re.escape(_save.REPLACED)}")
_STEP = re.compile(r"0|[1-9][0-9]*")
_LEFT = re.compile(rf"\.[0-9]+(\.[0-9]+)?({re.escape(_save.TEMPORARY)}|{re.escape(_save.DELETED)})(\..*)?")


class Store:
    """The checkpoints in `directory`, each in a directory named by its step.

    `save` returns when the tree has been copied to the memory of the host; a thread writes it to disk from there. The
    copy keeps its memory from one save to the next.

    The newest `keep` are kept (None: all); besides, with `best=("val/loss", "min")` or "max", the best `keep_best` by
    that metric (a tie goes to the later, NaN is never best, one saved without the metric does not count), and each
    step that `keep_every` divides. An old one is deleted when the new one is on disk.

    To save, a store must be open: `with lm.checkpoint.Store("runs/a") as store`. Reading needs no opening, and works
    beside a run that writes.

    Where a step's transforms spread its state over processes, all open the store with that step, and save together:
    `with lm.checkpoint.Store("runs/a").open(step) as store`. Each writes the parts that it holds, the first one all
    the rest, which alone locks the directory and deletes what is not kept. A process from which nothing is heard for
    `timeout` seconds counts as hung.

    >>> import lumen as lm, torch, tempfile
    >>> with lm.checkpoint.Store(tempfile.mkdtemp(), keep=2) as store:
    ...     for step in range(5):
    ...         store.save(step, {"weight": torch.full((2,), float(step))})
    ...     store.wait()
    ...     store.steps(), store.restore(store.latest(), {"weight": torch.zeros(2)})
    ([3, 4], {'weight': tensor([4., 4.])})
    """

    blocked: float  # seconds that saves have blocked so far

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 1,
        best: tuple[str, str] | None = None,
        keep_best: int = 1,
        keep_every: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.directory = Path(directory)
        self.blocked = 0.0
        self._retention = Retention(keep, best, keep_best, keep_every)
        self._memory = HostMemory()
        self._lock: Lock | None = None
        self._owner = 0  # the process that opened it
        self._timeout = timeout
        self._step: StepFn | None = None  # whose states it holds
        self._meeting: SaveCoordinator | None = None  # with the other processes
        self._first = True  # of all processes
        self._job = _Job()
        self._metrics: dict[int, dict[str, float]] = {}  # of the checkpoints that were looked at

    def __repr__(self) -> str:
        return f"lm.checkpoint.Store({str(self.directory)!r})"

    # ------------------------------------------------------------------------------------------- writing

    def open(self, step: StepFn | None = None) -> Self:
        """Make the directory, lock it, remove what a run that died has left, and load Orbax.

        With `step`, the states to be saved are that step's, and all processes open the store together.

        Raises `CheckpointLockedError` where another run has it, and `CheckpointError` where it cannot be written to.
        """
        if self._is_open:
            raise CheckpointError(f"{self!r} is open already.")
        together = step is not None and distributed.world_size() > 1
        self._first = not together or distributed.rank() == 0
        if self._first:
            self._lock = self._locked()
        self._step = step
        self._meeting = SaveCoordinator(self._timeout) if together else None
        self._owner = os.getpid()
        return self

    def _locked(self) -> Lock:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.directory)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"checkpoints cannot be written to {self.directory}: {error.strerror}. Give a directory that this user"
                " may write to."
            ) from error
        try:
            self._tidy()
            _orbax.load()
        except BaseException:
            lock.release()
            raise
        return lock

    @property
    def _is_open(self) -> bool:
        return self._lock is not None or self._meeting is not None

    def close(self) -> None:
        """Wait for the save being written, unlock the directory, give the memory back; raises what the save raised."""
        if not self._is_open:
            return
        try:
            self.wait()
        finally:
            if not self._job.running():  # interrupted while waiting: the writer still needs both
                if self._lock is not None:
                    self._lock.release()
                self._lock = self._meeting = None
                self._memory.release()

    def __enter__(self) -> Self:
        return self if self._is_open else self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        if self._meeting is not None:
            self._meeting.hurry()
        try:
            self.close()
        except CheckpointError as failed:  # the first error is the one to see
            error.add_note(f"besides, {failed}")

    def save(
        self,
        step: int,
        tree: Any,
        *,
        extra: Any = None,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `tree` as the checkpoint of `step`; returns when it is copied.

        It waits for an earlier save that is still being written, and raises what that one failed with. A step that
        was saved before is replaced. `extra` is a second tree, and `meta` any JSON: see `lm.checkpoint.save`;
        `metrics` are numbers or 0-d tensors, for `best`.
        """
        began = time.perf_counter()
        try:
            self._check_open()
            talk = None if self._meeting is None else self._meeting.next()
            with nullcontext() if talk is None else talk.failing_together(), _own_errors(self.directory):
                self.wait()
                self._make_ready(step)
                numbers = _numbers(metrics or {})
                fields = {"meta": header.check_json(dict(meta or {}), "meta"), "metrics": _json(numbers)}
                taken = self._snapshot(tree, extra)
                self._job.start(partial(self._write, step, taken, fields, numbers, talk), f"step {step}")
        finally:
            self.blocked += time.perf_counter() - began

    def _make_ready(self, step: int) -> None:
        """See that the checkpoint of `step` can be written, and that the directory is still this store's."""
        if type(step) is not int or step < 0:
            raise CheckpointError(f"a step is an int from 0 up, got {step!r}.")
        if not self._first:
            return
        self._keep_lock()
        path = self.path(step)
        if not os.path.lexists(path) or step in self.steps():
            return
        if not _load.lost_header(path):
            raise CheckpointExistsError(f"{path} is there, and is no checkpoint: move it away.")
        new = self.quarantine(path)
        warnings.warn(
            f"the checkpoint {path} has lost its header; it is now {new.name}, and step {step} is saved anew.",
            InexactWarning,
            stacklevel=4,
        )

    def _keep_lock(self) -> None:
        """Take the lock again where somebody has deleted the directory under the run; another may have it by now."""
        assert self._lock is not None
        if self._lock.holds(self.directory):
            return
        self._lock.release()
        self._lock = self._locked()
        self._metrics.clear()
        warnings.warn(
            f"{self.directory} was deleted, or moved away, under the run, and with it the checkpoints that it held. It"
            " is made again, and what is saved from now on is there.",
            InexactWarning,
            stacklevel=5,
        )

    def _snapshot(self, tree: Any, extra: Any) -> Snapshot:
        shard_specs.check(self._step, tree, f"with {self!r}.open(step) as store: store.save(...)")
        items = {"state": shard_specs.strip_sharding(self._step, tree), "extra": {} if extra is None else extra}
        return snapshot(items, self._memory, shard_specs.shard_specs(self._step, tree), whole=self._first)

    def quarantine(self, path: Path) -> Path:
        """Rename a checkpoint of this store that is damaged, so that it is none of its steps; returns the new path."""
        self._check_open()
        self.wait()
        count = 0
        while os.path.lexists(new := path.with_name(f"damaged-{path.name}" + (f"-{count}" if count else ""))):
            count += 1
        with _own_errors(self.directory):
            os.rename(path, new)
            sync_directory(self.directory)
        self._metrics.pop(int(path.name), None)
        return new

    def check(self) -> None:
        """Raise `CheckpointError` if a save has failed in the background; an error is raised once."""
        error = self._job.failure()
        if error is not None:
            raise CheckpointError(
                f"saving {self._job.what} to {self.directory} failed: {error}. Complete checkpoints there:"
                f" {self.steps() or 'none'}."
            ) from error

    def wait(self) -> None:
        """Return when what was saved is on disk; raises `CheckpointError` if it failed."""
        if self._owner == os.getpid():  # a forked child has the object, not the thread
            self._job.join()
            self.check()

    def _check_open(self) -> None:
        if not self._is_open:
            raise CheckpointError(f"{self!r} is not open. Write: with {self!r} as store: store.save(...)")
        if self._owner != os.getpid():
            raise CheckpointError(f"{self!r} was opened in process {self._owner}, which alone can save to it.")

    def _tidy(self) -> None:
        """Remove what a run that died has left, and put back what it was about to replace."""
        for path in list(self.directory.iterdir()):
            found = _REPLACED.fullmatch(path.name)
            if found and not os.path.lexists(self.path(int(found[1]))):
                os.rename(path, self.path(int(found[1])))
            elif found or _LEFT.fullmatch(path.name):
                _remove(path)

    def _write(
        self, step: int, taken: Snapshot, fields: dict[str, Any], metrics: dict[str, float], talk: SaveSession | None
    ) -> None:
        if talk is None:
            self._write_first(step, taken, fields, metrics)
            return
        with talk.failing_together():
            if self._first:
                self._write_first(step, taken, fields, metrics, talk)
                talk.finish()
            else:
                _save.write_shard(talk, taken)

    def _write_first(
        self,
        step: int,
        taken: Snapshot,
        fields: dict[str, Any],
        metrics: dict[str, float],
        talk: SaveSession | None = None,
    ) -> None:
        temporary = self.directory / f".{step}{_save.TEMPORARY}"
        _save.write(self.path(step), temporary, taken, fields, replace=True, talk=talk)
        self._metrics[step] = metrics
        saved = self._saved()
        for old in sorted(saved.keys() - self._retention.kept(saved) - {step}):
            try:
                _save.delete(self.path(old))
            except OSError as error:
                raise CheckpointError(f"it is on disk, but step {old} could not be deleted: {error}") from error
            self._metrics.pop(old, None)

    # ------------------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return [step for step in self._named() if (self.path(step) / header.FILE).is_file()]

    def _named(self) -> list[int]:
        """The steps that something in the directory is named by."""
        try:
            with (
                _own_errors(self.directory, passing=(FileNotFoundError, NotADirectoryError)),
                os.scandir(self.directory) as entries,
            ):
                names = [each.name for each in entries if _STEP.fullmatch(each.name) and not each.is_symlink()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(map(int, names))

    def damaged(self) -> list[int]:
        """The steps whose checkpoint has lost its header, ascending: they are none of `steps`.

        >>> import lumen as lm, tempfile
        >>> lm.checkpoint.Store(tempfile.mkdtemp()).damaged()
        []
        """
        return [step for step in self._named() if _load.lost_header(self.path(step))]

    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The best step by the metric of `best=`, or None where there is no metric or no checkpoint that has it."""
        return next(iter(self._retention.ranked(self._saved())), None)

    def would_keep(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be among the best; what is being written counts too."""
        self.wait()
        return self._retention.takes(self._saved(), metrics)

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.directory / str(step)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that the checkpoint of `step` was saved with."""
        return dict(self._saved().get(step, {}))

    def metadata(self, step: int) -> dict[str, Any]:
        """See `lm.checkpoint.metadata`."""
        return _load.metadata(self._existing(step))

    def load(self, step: int, *, item: str = "state", under: str = "") -> Any:
        """See `lm.checkpoint.load`."""
        return _load.load(self._existing(step), item=item, under=under)

    def restore(
        self,
        step: int,
        like: Any,
        *,
        strict: bool = True,
        cast: bool = False,
        rename: _restore.Rename | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """See `lm.checkpoint.restore`; the `step` is that with which the store was opened."""
        path = self._existing(step)
        return _restore.restore(path, like, strict=strict, cast=cast, rename=rename, device=device, step=self._step)

    def _existing(self, step: int) -> Path:
        steps = self.steps()
        if step not in steps:
            raise CheckpointNotFoundError(
                f"{self.directory} has no checkpoint of step {step}; it has {steps or 'none'}."
            )
        return self.path(step)

    def _saved(self) -> dict[int, dict[str, float]]:
        """The metrics of each checkpoint."""
        found = {}
        for step in self.steps():
            if step not in self._metrics:
                # One that is damaged, or deleted just now, has no metrics, and is nobody's best.
                with contextlib.suppress(CheckpointError):
                    self._metrics[step] = _from_json(_load.read_header(self.path(step)).fields.get("metrics"))
            found[step] = self._metrics.get(step, {})
        return found


@contextmanager
def _own_errors(directory: Path, passing: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """An error of the disk as a `CheckpointError`, so that a run can tell it from those of its data and sinks."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (CheckpointError, *passing)):
            raise
        raise CheckpointError(f"the checkpoints in {directory} cannot be reached: {error}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# ----------------------------------------------------------------------------------------------- metrics


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"metrics must be numbers: {error}. Write: metrics=lm.compute_metrics(metrics), or float(value) for each."
        ) from error


def _json(numbers: dict[str, float]) -> dict[str, float | str]:
    return {name: json_tree.number(value) for name, value in numbers.items()}


def _from_json(metrics: Any) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, AttributeError):
        return {}


# -------------------------------------------------------------------------------------------- background


class _Job:
    """One function at a time, in a thread; what it raises is kept.

    It waits for an event, not for the thread: an interrupted `Thread.join` takes the thread for ended (Python 3.11).
    """

    def __init__(self) -> None:
        self.what = ""
        self._process = 0
        self._done = threading.Event()
        self._done.set()
        self._error: BaseException | None = None

    def start(self, run: Callable[[], None], what: str) -> None:
        self.what = what
        self._process = os.getpid()
        self._error = None
        self._done = threading.Event()
        thread = threading.Thread(target=self._run, args=(run,), name=f"lumen checkpoint {what}", daemon=False)
        _unfinished.add(self)
        _wait_at_exit()
        thread.start()

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def running(self) -> bool:
        """Whether it is at work: in a forked child it never is."""
        return self._process == os.getpid() and not self._done.is_set()

    def join(self) -> None:
        if self.running():
            self._done.wait()

    def failure(self) -> BaseException | None:
        """What it raised, once."""
        if self.running():
            return None
        _unfinished.discard(self)
        error, self._error = self._error, None
        return error


_unfinished: weakref.WeakSet[_Job] = weakref.WeakSet()
_registered: set[int] = set()


def _wait_at_exit() -> None:
    """Let a process that ends finish its save.

    Python waits for the thread too, but before that, and long before `atexit`, it forbids new work in thread pools,
    which Orbax uses. What is registered here runs in reverse order, thus before what `concurrent.futures` registered.
    """
    if os.getpid() not in _registered:
        _registered.add(os.getpid())
        threading._register_atexit(_finish, os.getpid())  # type: ignore[attr-defined]


def _finish(process: int) -> None:
    if process == os.getpid():
        for job in list(_unfinished):
            job.join()
            error = job.failure()
            if error is not None:
                _report(job.what, error)


def _report(what: str, error: BaseException) -> None:
    """Say that a save failed when nobody is left to catch it."""
    threading.excepthook(
        threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread()))
    )
