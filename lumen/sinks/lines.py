"""Text files of whole lines that a run may append to after an earlier one died in the middle of a line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

_CHUNK = 1 << 16


def open_lines(path: Path) -> TextIO:
    """Open for appending, in UTF-8; makes the directory, and cuts off a last line that was not ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8", newline="")
    try:
        os.truncate(path, _end_of_lines(path))
    except BaseException:
        file.close()
        raise
    return file


def _end_of_lines(path: Path) -> int:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _CHUNK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
