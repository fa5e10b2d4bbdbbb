"""Where a sink writes: a local path, or the local copy of a URL, which is uploaded in the background."""

from __future__ import annotations

import os
from pathlib import Path

from lumen.core.mirror import Mirror
from lumen.core.urls import path_or_url


class Location:
    """The path of a sink's file or directory; of a URL, that of its local copy.

    The copy is made when `path` is first read: a file is downloaded, if the store has it; a directory begins empty.
    `argument` is what a message calls the path or URL. Raises `PathError` as `path_or_url` does.

    >>> location = Location("runs/metrics.jsonl", "the path of JSONL")
    >>> location.url, location.path.name
    (None, 'metrics.jsonl')
    """

    def __init__(self, location: str | os.PathLike[str], argument: str, *, is_directory: bool = False) -> None:
        parsed = path_or_url(location, argument)
        self.url = parsed if isinstance(parsed, str) else None
        self._path = parsed if isinstance(parsed, Path) else None
        self._is_directory = is_directory
        self.mirror: Mirror | None = None  # of a URL, from the first use on

    @property
    def path(self) -> Path:
        """The local path."""
        if self._path is None:
            assert self.url is not None
            directory, name = (self.url, "") if self._is_directory else self.url.rsplit("/", 1)
            mirror = Mirror(directory)
            if name:
                mirror.pull(name)
            self.mirror, self._path = mirror, mirror.directory / name
        return self._path

    def changed(self) -> None:
        """Upload what has changed, if the last upload is a while ago."""
        if self.mirror is not None:
            self.mirror.changed()

    def request(self) -> None:
        """Upload what has changed, in the background."""
        if self.mirror is not None:
            self.mirror.request()

    def flush(self) -> None:
        """Upload what has changed; raises `ObjectStoreError` if that fails."""
        if self.mirror is not None:
            self.mirror.flush()
