"""`Checkpointer`: when a run saves, what it keeps, and from where it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lumen.checkpoint import Store
from lumen.errors import CheckpointError, CorruptCheckpointError
from lumen.train.clock import Every
from lumen.train.sink_group import Positions

Best = tuple[str, Literal["min", "max"]]


class Checkpointer:
    """Saves a run in `directory/checkpoints`, so that it can go on after anything.

    A checkpoint holds all that the rest of the run depends on: the state with its slots, the random generators, the
    place in the data, the clock, half-merged metrics, and the memory of callbacks. Saving blocks the run for a copy to
    host memory; the rest happens beside it. The Runner saves also at the end, when a signal ends the run, and, where
    the state is whole, when an exception does.

    Args:
        directory: the run's directory; made where it is missing. Only one run at a time may write to it.
        every: how often to save.
        keep: how many of the newest to keep; None keeps all.
        best: a metric and whether it is to be small or large, `("val/loss", "min")`: the `keep_best` best are kept
            besides, and a validation that makes one of them is saved even when nothing else is due. A name that the run
            does not publish is a `StepError`, before the first step or at the first validation.
        keep_best: how many.
        keep_every: keep each checkpoint whose step is divisible by this.
        frozen: whether parameters that are not trained are saved too. Without them the checkpoints of a fine-tuning are
            as small as what it trains; the run then goes on only beside the same ones, which is checked. Elsewhere
            read such a checkpoint into a state that has them: `lm.checkpoint.restore(path, state, strict=False)`.

    >>> import lumen as lm, tempfile
    >>> checkpoint = lm.Checkpointer(tempfile.mkdtemp(), every=lm.Every(steps=500), keep=3, best=("val/loss", "min"))
    >>> checkpoint.latest() is None
    True
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: Every | None = None,
        keep: int | None = 1,
        best: Best | None = None,
        keep_best: int = 1,
        keep_every: int | None = None,
        frozen: bool = True,
    ) -> None:
        self.directory = Path(directory)
        self.frozen = frozen
        self.every = every or Every(epochs=1)
        self.metric = best
        self.store = Store(
            self.directory / "checkpoints", keep=keep, best=best, keep_best=keep_best, keep_every=keep_every
        )

    @property
    def interrupted(self) -> Path:
        """A file that is there while a run that a signal has ended waits to be started again.

        It is written once the run's last checkpoint is whole, and removed where a run begins. A job script goes by it:
        exit code 75 says the same, but torchrun makes 1 of it.
        """
        return self.directory / "interrupted.json"

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        step = self.store.latest()
        return None if step is None else self.store.path(step)

    def best(self) -> Path | None:
        """The best one by the metric."""
        step = self.store.best()
        return None if step is None else self.store.path(step)

    def begin(self, resume: str | os.PathLike[str], positions: Positions) -> Positions:
        """Note where the sinks are as a run begins; gives where they were, if this one takes the place of another.

        That is one that died before its first checkpoint: what it logged is not to stay beside what is logged now.
        """
        note = self.directory / "begun.json"
        if resume == "auto" and note.exists():
            found: Positions = json.loads(note.read_text())["sinks"]
            return found
        beside = note.with_suffix(".new")
        try:
            beside.write_text(json.dumps({"sinks": positions}))
            beside.replace(note)
        except OSError as error:
            raise CheckpointError(f"{note} cannot be written: {error.strerror}.") from error
        return positions

    def mark_interrupted(self, reason: str, step: int) -> None:
        """Write `interrupted`."""
        beside = self.interrupted.with_suffix(".new")
        beside.write_text(json.dumps({"reason": reason, "step": step}))
        beside.replace(self.interrupted)

    def wants(self, fresh: Mapping[str, float]) -> bool:
        """Whether these numbers make a checkpoint that is among the best."""
        return self.metric is not None and self.metric[0] in fresh and self.store.would_keep(fresh)


def candidates(checkpointer: Checkpointer | None, resume: str | os.PathLike[str]) -> Iterator[tuple[Path, bool]]:
    """Checkpoints to go on from, the first choice first, and whether another may be taken where it is damaged.

    Raises `CheckpointError` where `resume` asks for what is not there, or "never" would mix two runs.
    """
    if resume == "auto":
        if checkpointer is None:
            raise CheckpointError(
                'resume="auto" needs to know where the checkpoints are: write'
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
                ' mix with them. To go on from there, fit(…, resume="auto"); to start over, choose another directory'
                " or remove that one."
            )
        return
    path = Path(resume)
    other = Store(path / "checkpoints") if (path / "checkpoints").is_dir() else None
    newest = None if other is None else other.latest()
    yield (path if other is None or newest is None else other.path(newest)), False


def _last(store: Store) -> int | None:
    return max([*store.steps(), *store.damaged()], default=None)


def first_whole(
    paths: Iterator[tuple[Path, bool]],
    read: Callable[[Path], Any],
    quarantine: Callable[[Path, Path, CorruptCheckpointError], None],
) -> Any:
    """What `read` gives for the first checkpoint that is not damaged, None where there is none at all.

    Of damaged ones before it, `quarantine` is told, with the one that is whole, and what was wrong; where all are
    damaged, the first one's error is raised.
    """
    damaged: list[tuple[Path, CorruptCheckpointError]] = []
    try:
        for path, optional in list(paths):
            try:
                found = read(path)
            except CorruptCheckpointError as error:
                if not optional:
                    raise
                damaged.append((path, error))
                continue
            for each, why in damaged:
                quarantine(each, path, why)
            return found
        if damaged:
            raise damaged[0][1]
        return None
    finally:
        damaged.clear()  # a traceback has this frame, and would keep the run alive
