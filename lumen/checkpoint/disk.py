"""Waiting until what was written is on disk."""

from __future__ import annotations

import os
from pathlib import Path


def sync(directory: Path) -> None:
    """Return when every file below `directory` is on disk."""
    for parent, _, names in os.walk(directory):
        for name in names:
            sync_file(os.path.join(parent, name))
        sync_directory(parent)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Return when the names in `directory` are on disk."""
    sync_file(directory)


def sync_file(path: str | os.PathLike[str]) -> None:
    """Return when the file is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
