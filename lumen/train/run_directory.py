"""The small files of a run beside its checkpoints, in a directory or an object store."""

from __future__ import annotations

from pathlib import Path

from lumen.core.object_store import ObjectStore
from lumen.core.urls import join


class RunDirectory:
    """The files in `location`, a path or a URL, each of which appears all at once."""

    def __init__(self, location: Path | str) -> None:
        self.location = location

    def read(self, name: str) -> str | None:
        """The text of a file; None if there is none."""
        if isinstance(self.location, str):
            content = ObjectStore(self.location).read(name)
            return None if content is None else content.decode()
        path = self.location / name
        return path.read_text() if path.exists() else None

    def write(self, name: str, text: str) -> None:
        """Write a file; raises OSError if that fails."""
        if isinstance(self.location, str):
            ObjectStore(self.location).write(name, text.encode())
            return
        path = self.location / name
        temporary = path.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(path)

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        if isinstance(self.location, str):
            ObjectStore(self.location).delete(name)
        else:
            (self.location / name).unlink(missing_ok=True)

    def path(self, name: str) -> Path | str:
        """The path or URL of a file."""
        return join(self.location, name)
