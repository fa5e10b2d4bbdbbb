"""A sink that logs to Aim."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from lumen.core.arguments import checked
from lumen.core.urls import local_path
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json
from lumen.sinks.extras import load, require
from lumen.sinks.media import Histogram, Image, Media, split

_SERVER = "aim://"
_LIST_AGE = 0.6  # seconds: the list of runs that Aim looks into may be half a second old


@checked
class Aim:
    """Logs to a run in an Aim repository, which starts at the first `log`; needs the extra `[aim]`.

    `repo` is a directory, in which Aim creates `.aim` if it is missing, or a server, `aim://host:port`; the default is
    Aim's own. Numbers, histograms, images and texts become Aim's own types, and the configuration the run's params.
    `experiment`, `run_hash` and all other arguments are those of `aim.Run`. The attribute `run` is Aim's run while
    open.

    Pass `run_hash` to resume a run; the attribute `run_hash` is that of the new run once it has started. Values that a
    resumed run logs again replace those of the same step. A run that was killed on another machine stays locked:
    pass `force_resume=True` as well, once nothing writes to it.

    Raises ImportError if aim is missing, OSError if the directory cannot be created, and the errors of `aim.Run`.

    >>> import lumen as lm
    >>> sink = lm.sinks.Aim("runs", experiment="digits")  # doctest: +SKIP
    """

    def __init__(
        self,
        repo: str | os.PathLike[str] | None = None,
        *,
        experiment: str | None = None,
        run_hash: str | None = None,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        check_on_error(on_error)
        require("aim", "Aim")
        is_local = repo is not None and not str(repo).startswith(_SERVER)
        self._directory = local_path(repo, "the repo of Aim") if repo is not None and is_local else None
        self.repo = None if repo is None else os.fspath(repo)
        self.run_hash = run_hash
        self.on_error = on_error
        self.run: Any = None
        self._arguments = {"experiment": experiment, **kwargs}
        self._config: dict[str, Any] | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """Set `values` as the run's params with the next `log`."""
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step."""
        numbers, media = split(values)
        run = self._open()
        if self._config is not None:
            for key, value in self._config.items():
                run[key] = value
            self._config = None
        for name, number in numbers.items():
            run.track(float(number), name=name, step=int(step))
        for name, value in media.items():
            run.track(_native(value), name=name, step=int(step))

    def close(self) -> None:
        """Finish the run; a later `log` resumes it."""
        if self.run is not None:
            run, self.run = self.run, None
            run.close()

    def _open(self) -> Any:
        if self.run is None:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            self.run = self._start()
            self.run_hash = self.run.hash
        return self.run

    def _start(self) -> Any:
        aim = load("aim")
        try:
            return aim.Run(self.run_hash, repo=self.repo, **self._arguments)
        except load("aim.sdk.errors").MissingRunError:
            time.sleep(_LIST_AGE)  # it may have begun since
            return aim.Run(self.run_hash, repo=self.repo, **self._arguments)


def _native(value: Media) -> Any:
    aim = load("aim")
    if isinstance(value, Histogram):
        return aim.Distribution(hist=value.counts, bin_range=(value.edges[0], value.edges[-1]))
    if isinstance(value, Image):
        pixels = value.pixels
        image = load("PIL.Image").fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return aim.Image(image, format="png")
    return aim.Text(value.text)
