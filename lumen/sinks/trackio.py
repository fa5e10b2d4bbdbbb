"""A sink that logs to Trackio."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any

from lumen.core.arguments import checked
from lumen.errors import SinkError
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json
from lumen.sinks.extras import load, require
from lumen.sinks.media import Histogram, Image, Media, split

# Trackio renames these, and names that begin with two underscores.
_RESERVED = ("project", "run", "timestamp", "step", "time", "metrics")


@checked
class Trackio:
    """Logs to a Trackio run, which starts at the first `log`; needs the extra `[trackio]`.

    Trackio writes to a database on this machine: `PROJECT.db` in the directory of the environment variable
    `TRACKIO_DIR`, which it reads when it is imported. Numbers, histograms, images and texts become Trackio's own types
    (a text is Markdown), and the configuration that of the run. `project`, `name` and all other arguments, such as
    `space_id` for a Space of Hugging Face, are those of `trackio.init`; a run that the script started itself is not
    affected. The attribute `run` is Trackio's run while open.

    Pass a `name` for a run that may be resumed. Trackio cannot delete numbers: those that a resumed run logs again
    appear twice, with equal values. A thread of Trackio's writes the rows, twice a second and in `close`: its errors
    are warnings (UserWarning), and are not raised.

    Raises ImportError if trackio is missing, SinkError for a name that Trackio reserves, and the errors of
    `trackio.init`.

    >>> import lumen as lm
    >>> sink = lm.sinks.Trackio("digits", name="first")  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str,
        *,
        name: str | None = None,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        check_on_error(on_error)
        require("trackio", "Trackio")
        self.project = project
        self.name = name
        self.on_error = on_error
        self.run: Any = None
        self._arguments = {"resume": "allow", "embed": False, **kwargs}
        self._config: dict[str, Any] | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """Set `values` as the run's configuration with the next `log`."""
        self.close()  # Trackio takes a configuration only when a run starts
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step."""
        _check_names(values)
        numbers, media = split(values)
        row = {**numbers, **{name: _native(value) for name, value in media.items()}}
        self._open().log(row, step=int(step))

    def close(self) -> None:
        """Write what is pending and finish the run; a later `log` resumes it."""
        if self.run is not None:
            run, self.run = self.run, None
            run.finish()

    def _open(self) -> Any:
        if self.run is None:
            arguments = {"name": self.name, "config": self._config, **self._arguments}
            # In a context of its own: trackio.init finishes the run that is current in the caller's.
            self.run = contextvars.Context().run(load("trackio").init, self.project, **arguments)
            self.name = self.run.name
        return self.run


def _check_names(values: Mapping[str, Any]) -> None:
    reserved = [name for name in values if name in _RESERVED or name.startswith("__")]
    if reserved:
        raise SinkError(f"A value is named {reserved[0]!r}, which Trackio reserves: rename it.")


def _native(value: Media) -> Any:
    trackio = load("trackio")
    if isinstance(value, Histogram):
        return trackio.Histogram(np_histogram=(value.counts, value.edges))
    if isinstance(value, Image):
        pixels = value.pixels
        return trackio.Image(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return trackio.Markdown(value.text)
