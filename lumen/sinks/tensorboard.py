"""A sink that writes event files for TensorBoard."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from lumen.core.arguments import checked
from lumen.errors import ValueKindError
from lumen.sinks import projector
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json, flatten
from lumen.sinks.location import Location
from lumen.sinks.media import Histogram, Image, Media, split

_numbers = itertools.count()
_INVALID = re.compile(r"[^-/\w.]")


@checked
class TensorBoard:
    """Writes to a new event file in `logdir`; `a/b` groups `b` under `a`.

    Numbers are scalars (float32); histograms, images and texts are TensorBoard's own types. The elements of an array
    are scalars, named by their indices. Characters that TensorBoard does not allow in names become `_`. Each `log` is
    flushed. The configuration is shown under HPARAMS, next to all scalars of the run, and in full as the text `config`.

    `logdir` may be a URL in an object store, such as `s3://bucket/runs/a`: files are written to a local directory, and
    uploaded in the background, at each checkpoint and by `close`.

    Event files are append-only. A resumed run starts a new file with a marker that makes TensorBoard drop the values
    of later steps.

    `embeddings` are names of params, or patterns such as "*.embedding.weight", whose rows the projector shows as
    points: those at the end of the run and, with `embed_every`, also after every `embed_every` steps, at the next
    logging point. They are written as text, which is slow for a large vocabulary.

    Raises ImportError if tensorboardX is missing, OSError if the file cannot be written, and for `embeddings`
    PatternError for a pattern without a match, ValueKindError for a param that is not a matrix, and SinkError if the
    params are sharded over processes.

    >>> import lumen as lm, tempfile, torch
    >>> sink = lm.sinks.TensorBoard(tempfile.mkdtemp())
    >>> sink.log(0, {"train/loss": 0.5, "grads": lm.sinks.Histogram(torch.randn(100))})
    >>> sink.close()
    """

    def __init__(
        self,
        logdir: str | os.PathLike[str],
        *,
        embeddings: Sequence[str] = (),
        embed_every: int | None = None,
        on_error: OnError = "raise",
        time_fn: Callable[[], float] = time.time,
    ) -> None:
        check_on_error(on_error)
        _library()  # a missing library should fail before the first step
        if isinstance(embeddings, str):
            raise ValueKindError(f"embeddings={embeddings!r} is one name; write embeddings=({embeddings!r},).")
        if embed_every is not None and embed_every < 1:
            raise ValueKindError(f"embed_every={embed_every} must be at least 1; write embed_every=1000, or None.")
        self._embeddings = tuple(embeddings)
        self._embed_every = embed_every
        self._last_embedding_check: int | None = None  # the step of the last call of take_params
        self._location = Location(logdir, "the logdir of TensorBoard", is_directory=True)
        self.url = self._location.url
        self.on_error = on_error
        self._time_fn = time_fn
        self._writer: Any = None
        self._last: int | None = None  # step
        self._restart: int | None = None  # the first step to drop
        self._config: dict[str, Any] | None = None

    @property
    def logdir(self) -> Path:
        """The directory; of a URL, the local one whose files are uploaded."""
        return self._location.path

    def config(self, values: Mapping[str, Any]) -> None:
        """Write the configuration with the next `log`."""
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one event with all values."""
        protocol = _library()
        numbers, media = split(values)
        entries = [protocol.Value(tag=_tag(name), simple_value=value) for name, value in numbers.items()]
        entries += [_media_value(name, value) for name, value in media.items()]
        writer = self._open()
        if self._config is not None:
            self._write(writer, 0, summary=protocol.Summary(value=_config_values(self._config)))
            self._config = None
        self._write(writer, int(step), summary=protocol.Summary(value=entries))
        writer.flush()
        self._last = int(step)
        self._location.changed()

    def take_params(self, step: int, params: Mapping[str, Tensor] | None, last: bool) -> None:
        """Write the params matching `embeddings` for the projector, if they are due."""
        if not self._embeddings:
            return
        selected = projector.select_params(self._embeddings, params)
        every, before = self._embed_every, self._last_embedding_check
        # At multiples, so that a resumed run writes them at the same steps as an uninterrupted one.
        due = every is not None and before is not None and step // every > before // every
        self._last_embedding_check = step
        if due or last:
            for name, value in selected.items():
                projector.write(self.logdir, step, _tag(name), value)

    def position(self) -> int | None:
        """The last logged step; -1 before the first, or None if the existing files are from an earlier run."""
        if self._last is None:
            return None if any(".tfevents." in name for name in self._existing()) else -1
        self._location.request()
        return self._last

    def _existing(self) -> list[str]:
        """The names of the files in `logdir`."""
        names, mirror = [path.name for path in self.logdir.glob("*.tfevents.*")], self._location.mirror
        return names if mirror is None else [*names, *mirror.names()]

    def rewind(self, position: int) -> None:
        """Make TensorBoard drop the values logged after the step `position`, starting with the next `log`."""
        self._close_file()
        self._last = position
        self._restart = position + 1

    def close(self) -> None:
        """Close the event file; a later `log` opens a new one. Returns when it is uploaded, if it is at a URL."""
        self._close_file()
        self._location.flush()

    def _close_file(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _open(self) -> Any:
        if self._writer is None:
            protocol = _library()
            self.logdir.mkdir(parents=True, exist_ok=True)
            # Two files created within a second would share a name, and the later would overwrite the earlier.
            suffix = f".{os.getpid()}.{next(_numbers):04d}"  # in chronological order, as TensorBoard reads them
            self._writer = protocol.EventsWriter(str(self.logdir / "events"), suffix)
            if self._restart is not None:
                marker = protocol.SessionLog(status=protocol.SessionLog.START)
                self._write(self._writer, self._restart, session_log=marker)
                self._restart = None
        return self._writer

    def _write(self, writer: Any, step: int, **fields: Any) -> None:
        writer.write_event(_library().Event(wall_time=self._time_fn(), step=step, **fields))


def _media_value(name: str, value: Media) -> Any:
    protocol = _library()
    if isinstance(value, Histogram):
        histogram = protocol.HistogramProto(
            min=value.edges[0],
            max=value.edges[-1],
            num=sum(value.counts),
            sum=value.total,
            sum_squares=value.squares,
            bucket_limit=value.edges,
            bucket=[0, *value.counts],  # a bucket has only a right limit: that of the first is the first edge
        )
        return protocol.Value(tag=_tag(name), histo=histogram)
    if isinstance(value, Image):
        height, width, channels = value.pixels.shape
        image = protocol.Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=value.png()
        )
        return protocol.Value(tag=_tag(name), image=image)
    return _text(_tag(name), value.text)


def _text(tag: str, text: str) -> Any:
    return _library().text(tag, text).value[0]


def _config_values(values: Mapping[str, Any]) -> list[Any]:
    """The configuration for HPARAMS, and as a text.

    There is deliberately no "experiment" that lists metrics: without it TensorBoard shows every scalar of the run.
    """
    protocol = _library()
    start = protocol.SessionStartInfo()
    for name, value in flatten(values).items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[name].number_value = value
        elif value is not None:
            start.hparams[name].string_value = value
    content = protocol.HParamsPluginData(session_start_info=start, version=0).SerializeToString()
    plugin = protocol.SummaryMetadata.PluginData(plugin_name="hparams", content=content)
    hparams = protocol.Value(tag="_hparams_/session_start_info", metadata=protocol.SummaryMetadata(plugin_data=plugin))
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return [hparams, _text("config", "\n".join("    " + line for line in text.splitlines()))]


def _tag(name: str) -> str:
    return _INVALID.sub("_", name).lstrip("/")


def _library() -> Any:
    """The layer below tensorboardX's SummaryWriter, whose thread loses errors and then blocks the run."""
    try:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo
        from tensorboardX.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
    except ImportError as error:
        raise ImportError(
            "TensorBoard needs tensorboardX, which is not installed: pip install 'tensorboardX>=2.6.2'"
        ) from error
    return SimpleNamespace(
        Event=Event,
        EventsWriter=event_file_writer.EventsWriter,
        HParamsPluginData=HParamsPluginData,
        HistogramProto=HistogramProto,
        SessionLog=SessionLog,
        SessionStartInfo=SessionStartInfo,
        Summary=Summary,
        SummaryMetadata=SummaryMetadata,
        Value=Summary.Value,
        text=summary.text,
    )
