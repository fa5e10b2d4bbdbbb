"""Event files for TensorBoard."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lumen.sinks.base import scalars

_numbers = itertools.count()


class TensorBoard:
    """Writes scalars to an event file of its own in `logdir`; `a/b` groups `b` under `a`.

    Each `log` is flushed. The entries of an array are scalars, named by their indices. Values become float32.

    Raises ImportError where tensorboardX is missing, and OSError where the file cannot be written.

    >>> import lumen as lm, tempfile
    >>> sink = lm.sinks.TensorBoard(tempfile.mkdtemp())
    >>> sink.log(0, {"train/loss": 0.5})
    >>> sink.close()
    """

    def __init__(self, logdir: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        _library()  # that it is missing should show before the first step
        self.logdir = Path(logdir)
        self._clock = clock
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one event that holds all values."""
        files, summary, protocol = _library()
        found = [summary.scalar(name, value).value[0] for name, value in scalars(values).items()]
        event = protocol.Event(wall_time=self._clock(), step=int(step))
        event.summary.value.extend(found)
        if self._writer is None:
            self.logdir.mkdir(parents=True, exist_ok=True)
            # Two files of one second would have the same name, and the later would empty the earlier.
            suffix = f".{os.getpid()}.{next(_numbers)}"
            self._writer = files.EventsWriter(str(self.logdir / "events"), suffix)
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file; a later `log` begins another one."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()


def _library() -> tuple[Any, Any, Any]:
    """What lies under tensorboardX's SummaryWriter, whose thread loses errors and then blocks the run."""
    try:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2
    except ImportError as error:
        raise ImportError(
            "TensorBoard needs tensorboardX, which is not installed: pip install 'tensorboardX>=2.6.2'"
        ) from error
    return event_file_writer, summary, event_pb2
