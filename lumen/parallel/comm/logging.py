"""Python's `logging` in a world of several ranks: records name their rank, and rank 0 alone logs to the terminal."""

from __future__ import annotations

import logging
import os
import sys

from lumen.core import distributed
from lumen.core.arguments import checked_first
from lumen.core.urls import local_path
from lumen.errors import HyperparameterError

_FORM = "%(asctime)s {who}%(name)s %(levelname)s: %(message)s"
_OURS = "lumen"  # the name of the handlers that a call installs


class _Stderr:
    """The current `sys.stderr` at each write: notebooks and tests replace it."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


@checked_first
def setup_logging(directory: str | os.PathLike[str] | None = None, level: int | str = logging.INFO) -> None:
    """Send `logging` records and warnings to stderr: on rank 0 from `level` up.

    Other ranks write their warnings and errors there, prefixed with `[rank n]`. With `directory`, each rank also writes
    all records from `level` up to `directory/rank-n.log`. Call it after `lm.mesh()` has joined the ranks. A second call
    replaces the handlers of the first.

    >>> import lumen as lm, logging, pathlib, tempfile
    >>> lm.parallel.setup_logging(directory := tempfile.mkdtemp())
    >>> logging.getLogger("train").info("begins")
    >>> (pathlib.Path(directory) / "rank-0.log").read_text().endswith("[rank 0] train INFO: begins\\n")
    True
    """
    names = logging.getLevelNamesMapping()
    if isinstance(level, str) and level not in names:
        raise HyperparameterError(f"level={level!r} is unknown; give one of {', '.join(names)}, or a number.")
    location = None if directory is None else local_path(directory, "the directory of setup_logging")
    rank = distributed.rank()
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.name == _OURS]:
        root.removeHandler(handler)
        handler.close()
    terminal = logging.StreamHandler(_Stderr())
    terminal.setFormatter(logging.Formatter(_FORM.format(who=f"[rank {rank}] " if rank else "")))
    terminal.setLevel(logging.WARNING if rank else level)
    handlers: list[logging.Handler] = [terminal]
    if location is not None:
        location.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(location / f"rank-{rank}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter(_FORM.format(who=f"[rank {rank}] ")))
        file.setLevel(level)
        handlers.append(file)
    for handler in handlers:
        handler.name = _OURS
        root.addHandler(handler)
    root.setLevel(min(handler.level for handler in handlers))
    logging.captureWarnings(True)
