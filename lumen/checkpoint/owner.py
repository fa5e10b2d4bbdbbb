"""Who writes to a URL: the run that opened it last.

An object store has no locks that end with a process. So a run writes its name to an object when it opens the URL, and
looks whether that is still there before each checkpoint appears. Of two runs at the same URL the second goes on, and
the first ends at its next save.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import uuid

from lumen.checkpoint.lock import FILE
from lumen.core.object_store import ObjectStore
from lumen.errors import CheckpointLockedError


class Owner:
    """This process as the owner of a URL, from its construction on; `run` is a new random name."""

    def __init__(self, objects: ObjectStore) -> None:
        self.run = uuid.uuid4().hex
        self._url = objects.url
        since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        content = {"run": self.run, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
        self._content = json.dumps(content).encode()
        objects.write(FILE, self._content)
        self._objects = ObjectStore(objects.url)

    @staticmethod
    def read(objects: ObjectStore) -> str | None:
        """The name of the run that owns the URL; None if there is none."""
        run = _fields(objects.read(FILE)).get("run")
        return None if run is None else str(run)

    def check(self) -> None:
        """Raise `CheckpointLockedError` if another run has opened the URL; own it again if its objects were deleted."""
        content = self._objects.read(FILE)
        if content is None:
            self._objects.write(FILE, self._content)
        elif content != self._content:
            fields = _fields(content)
            raise CheckpointLockedError(
                f"{self._url} was taken over by process {fields.get('pid')} on {fields.get('host')} (run"
                f" {fields.get('run')}), since {fields.get('since')}: this run ({self.run}) writes no more checkpoints"
                " there. End that run, or use another URL for this one."
            )


def _fields(content: bytes | None) -> dict[str, object]:
    try:
        fields = json.loads(content or b"{}")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
