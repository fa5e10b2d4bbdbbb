"""Waiting until what was written is on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_AT_ONCE = 8  # a file system that is asked for several files at a time brings them to disk together


def sync(directory: Path, known: Collection[str] = ()) -> None:
    """Return when every file below `directory` is on disk; those `known` to be, by their names in it, are left out."""
    paths: list[str] = []
    for parent, _, names in os.walk(directory):
        inside = Path(parent).relative_to(directory)
        paths += [os.path.join(parent, name) for name in names if (inside / name).as_posix() not in known]
        paths.append(parent)
    sync_files(paths)


def sync_files(paths: Sequence[str | os.PathLike[str]], done: Callable[[], object] = lambda: None) -> None:
    """Return when these are on disk; calls `done` after each."""
    with ThreadPoolExecutor(_AT_ONCE) as others:
        for _ in others.map(sync_file, paths):
            done()


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
