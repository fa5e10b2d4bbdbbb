"""`Checkpointer`: when a run saves, which checkpoints it keeps, and which one it resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lumen.checkpoint import Store
from lumen.core.arguments import checked
from lumen.core.urls import join, path_or_url
from lumen.errors import CheckpointError, CorruptCheckpointError, StepError
from lumen.train.clock import Every
from lumen.train.run_directory import RunDirectory
from lumen.train.sink_group import Positions

_BEGUN = "begun.json"
_INTERRUPTED = "interrupted.json"


@checked
class Checkpointer:
    """Saves a run in `directory/checkpoints`, so that it can resume after any interruption.

    A checkpoint holds everything that the remaining steps depend on: the state with its slots, the random generators,
    the position in the data, the clock, metrics that are not logged yet, and the state of callbacks. Saving blocks the
    run while the state is copied to host memory; a thread writes it to disk. The Runner also saves at the end of a run,
    when a signal ends it, and when an exception does, if the state is consistent.

    Args:
        directory: the run's directory, created if it is missing, or a URL in an object store (`s3://bucket/runs/a`,
            `gs://bucket/runs/a`). Only one run at a time may write to it.
        every: how often to save.
        keep: how many of the newest to keep; None keeps all.
        monitor: the name of a metric, such as "val/loss". The `keep_best` checkpoints with the best values are kept
            too, and a validation that reaches one of them is saved even when no save is due. A name that the run does
            not publish is a `StepError`, before the first step or at the first validation.
        mode: whether smaller ("min") or larger ("max") is better.
        keep_best: how many of the best to keep.
        keep_every: keep each checkpoint whose step is divisible by this.
        frozen: whether to save parameters that are not trained. Without them the checkpoints of a fine-tuning run are
            as small as what it trains. Such a run resumes only with the same frozen parameters, which is checked. To
            read the checkpoint elsewhere, restore it into a state that has them:
            `lm.checkpoint.restore(path, state, strict=False)`.
        staging: of a URL, the local directory from which checkpoints are uploaded (`~/.cache/lumen/uploads`).

    Raises:
        PathError: a URL of another kind, or one whose package (s3fs, gcsfs) is not installed.

    >>> import lumen as lm, tempfile
    >>> checkpoint = lm.Checkpointer(tempfile.mkdtemp(), every=lm.Every(steps=500), monitor="val/loss", mode="min")
    >>> checkpoint.latest() is None
    True
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: Every | None = None,
        keep: int | None = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
        keep_every: int | None = None,
        frozen: bool = True,
        staging: str | os.PathLike[str] | None = None,
    ) -> None:
        if every is not None and not isinstance(every, Every):
            raise StepError(f"Checkpointer(every={every!r}): write every=lm.Every(steps=1000), epochs=1 or minutes=10.")
        self.directory: Path | str = path_or_url(directory, "the directory of a Checkpointer")
        self._files = RunDirectory(self.directory)
        self.keep = keep
        self.frozen = frozen
        self.every = every or Every(epochs=1)
        self.monitor = monitor
        self.mode = mode
        self.store = Store(
            join(self.directory, "checkpoints"),
            keep=keep,
            monitor=monitor,
            mode=mode,
            keep_best=keep_best,
            keep_every=keep_every,
            staging=staging,
        )

    @property
    def interrupted(self) -> Path | str:
        """A file, or the URL of an object, that exists while a run that a signal ended waits to be started again.

        It is written after the run's last checkpoint, and removed when a run begins. A job script can test for it: exit
        code 75 says the same, but torchrun replaces it by 1.
        """
        return self._files.path(_INTERRUPTED)

    def clear_interrupted(self) -> None:
        """Remove `interrupted`."""
        self._files.remove(_INTERRUPTED)

    def latest(self) -> Path | str | None:
        """The newest complete checkpoint, as a path, or a URL as text."""
        step = self.store.latest()
        return None if step is None else self.store.path(step)

    def best(self) -> Path | str | None:
        """The best one by `monitor`."""
        step = self.store.best()
        return None if step is None else self.store.path(step)

    def begin(self, resume: str | os.PathLike[str], positions: Positions) -> Positions:
        """Record the positions of the sinks as a run begins; returns those that they are to be rewound to.

        They differ if this run replaces one that died before its first checkpoint: what that run logged is removed.
        """
        try:
            if resume == "auto" and (begun := self._files.read(_BEGUN)) is not None:
                recorded: Positions = json.loads(begun)["sinks"]
                return recorded
            self._files.write(_BEGUN, json.dumps({"sinks": positions}))
        except OSError as error:
            raise CheckpointError(
                f"{self._files.path(_BEGUN)} cannot be written: {error.strerror or error}."
            ) from error
        return positions

    def mark_interrupted(self, reason: str, step: int) -> None:
        """Write `interrupted`."""
        self._files.write(_INTERRUPTED, json.dumps({"reason": reason, "step": step}))

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be among the best."""
        return self.monitor is not None and self.monitor in metrics and self.store.would_keep(metrics)


def candidates(checkpointer: Checkpointer | None, resume: str | os.PathLike[str]) -> Iterator[tuple[Path | str, bool]]:
    """The checkpoints to resume from, the first choice first, and whether to try the next one if it is damaged.

    Raises `CheckpointError` for a checkpoint that does not exist, and if "never" would mix two runs.
    """
    if resume == "auto":
        if checkpointer is None:
            raise CheckpointError(
                'resume="auto" needs the directory of the checkpoints: write'
                ' lm.Runner(step, checkpoint=lm.Checkpointer("runs/a"))'
            )
        store = checkpointer.store
        for step in sorted({*store.steps(), *store.damaged()}, reverse=True):
            yield store.path(step), True
        return
    if resume == "never":
        if checkpointer is not None and (last := _last(checkpointer.store)) is not None:
            raise CheckpointError(
                f"{checkpointer.directory} holds the checkpoints of a run, up to step {last}, and a new run would"
                ' mix with them. To resume that run, write fit(…, resume="auto"); to start over, choose another'
                " directory or remove that one."
            )
        return
    yield _of_run(path_or_url(resume, "resume")), False


def _of_run(location: Path | str) -> Path | str:
    """The newest checkpoint of the run at `location`; if no run is there, `location` itself."""
    checkpoints = join(location, "checkpoints")
    if isinstance(checkpoints, Path) and not checkpoints.is_dir():
        return location
    store = Store(checkpoints)
    newest = store.latest()
    return location if newest is None else store.path(newest)


def _last(store: Store) -> int | None:
    return max([*store.steps(), *store.damaged()], default=None)


def first_undamaged(
    paths: Iterator[tuple[Path | str, bool]],
    read: Callable[[Path | str], Any],
    quarantine: Callable[[Path | str, Path | str, CorruptCheckpointError], None],
) -> Any:
    """What `read` returns for the first checkpoint that is not damaged; None if there is no checkpoint.

    It passes each damaged one before it to `quarantine`, with the one that was read and the error. If all are damaged,
    it raises the first error.
    """
    damaged: list[tuple[Path | str, CorruptCheckpointError]] = []
    try:
        for path, optional in list(paths):
            try:
                checkpoint = read(path)
            except CorruptCheckpointError as error:
                if not optional:
                    raise
                damaged.append((path, error))
                continue
            for damaged_path, damage in damaged:
                quarantine(damaged_path, path, damage)
            return checkpoint
        if damaged:
            raise damaged[0][1]
        return None
    finally:
        damaged.clear()  # a traceback has this frame, and would keep the run alive
