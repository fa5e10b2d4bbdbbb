"""Python's `logging` in a world of several processes: who said it, and the first process alone on the terminal."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from lumen.core import distributed

_FORM = "%(asctime)s {who}%(name)s %(levelname)s: %(message)s"
_OURS = "lumen"  # the name of the handlers that an earlier call has installed


class _Stderr:
    """Whatever is stderr when something is written: notebooks and tests change it."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def setup_logging(directory: str | os.PathLike[str] | None = None, level: int | str = logging.INFO) -> None:
    """Have `logging`, and warnings, of this process on stderr, from the first process at `level` and up.

    Other processes tell their warnings and errors there, behind `[rank n]`. With `directory`, each process also writes
    everything from `level` up to `directory/rank-n.log`. Call it once `lm.mesh()` has joined the processes; calling it
    again replaces what an earlier call has set up.

    >>> import lumen as lm, logging, tempfile
    >>> lm.parallel.setup_logging(directory := tempfile.mkdtemp())
    >>> logging.getLogger("train").info("begins")
    >>> (Path(directory) / "rank-0.log").read_text().endswith("[rank 0] train INFO: begins\\n")
    True
    """
    rank = distributed.rank()
    root = logging.getLogger()
    for handler in [each for each in root.handlers if each.name == _OURS]:
        root.removeHandler(handler)
        handler.close()
    terminal = logging.StreamHandler(_Stderr())
    terminal.setFormatter(logging.Formatter(_FORM.format(who=f"[rank {rank}] " if rank else "")))
    terminal.setLevel(logging.WARNING if rank else level)
    handlers: list[logging.Handler] = [terminal]
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(Path(directory) / f"rank-{rank}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter(_FORM.format(who=f"[rank {rank}] ")))
        file.setLevel(level)
        handlers.append(file)
    for handler in handlers:
        handler.name = _OURS
        root.addHandler(handler)
    root.setLevel(min(handler.level for handler in handlers))
    logging.captureWarnings(True)
