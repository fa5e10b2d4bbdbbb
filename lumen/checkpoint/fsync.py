"""Waiting until written files are on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_MAX_THREADS = 8  # a file system that gets several requests at a time can serve them together


def sync(directory: Path, synced: Collection[str] = ()) -> None:
    """Return when every file below `directory` is on disk; skips those already `synced`, by their relative paths."""
    paths = []
    for inside, names in _directories(directory):
        paths += [f"{directory}/{inside}{name}" for name in names if f"{inside}{name}" not in synced]
        paths.append(f"{directory}/{inside}")
    sync_files(paths)


def relative_files(directory: Path) -> Iterator[str]:
    """The files below `directory`, by their paths relative to it, with `/`."""
    for inside, names in _directories(directory):
        yield from (f"{inside}{name}" for name in names)


def _directories(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Each directory at or below `directory`, as the beginning of its files' relative paths, and their names."""
    root = os.fspath(directory)
    for parent, _, names in os.walk(root):
        inside = parent[len(root) :].replace(os.sep, "/").lstrip("/")
        yield f"{inside}/" if inside else "", names


def sync_files(paths: Sequence[str | os.PathLike[str]], done: Callable[[], object] = lambda: None) -> None:
    """Return when these files are on disk; calls `done` after each, in the thread that synced it."""

    def sync_share(first: int) -> None:  # a task for each file would cost more than the system call
        for path in paths[first::_MAX_THREADS]:
            sync_file(path)
            done()

    with ThreadPoolExecutor(_MAX_THREADS) as pool:
        list(pool.map(sync_share, range(min(len(paths), _MAX_THREADS))))


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Return when the entries of `directory` are on disk."""
    sync_file(directory)


def sync_file(path: str | os.PathLike[str]) -> None:
    """Return when the file is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
