"""A sink that logs to Weights & Biases."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from typing import Any

from lumen.core.arguments import checked
from lumen.core.urls import local_path
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json
from lumen.sinks.extras import load, require
from lumen.sinks.media import Histogram, Image, Media, split


@checked
class WandB:
    """Logs to a Weights & Biases run, which starts at the first `log`; needs the extra `[wandb]`.

    Numbers, histograms, images and texts become W&B's own types, and the configuration that of the run. `project`,
    `dir` (created if missing), `mode` ("online", "offline", "disabled"), `id` and all other arguments are those of
    `wandb.init`; a run that the script started itself is not affected. The attribute `run` is W&B's run while open.

    Pass an `id` for a run that may be resumed. W&B cannot delete rows, and ignores rows whose step is below its
    newest; a resumed Lumen run logs the same numbers again, so W&B's values stay correct. A separate W&B process
    writes the run: its disk and network errors appear in its log, and are not raised.

    Raises ImportError if wandb is missing, OSError if `dir` cannot be created, and the errors of `wandb.init`.

    >>> import lumen as lm
    >>> sink = lm.sinks.WandB("my-project", dir="runs", mode="offline", id="first")  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002 (named as in wandb.init)
        mode: str | None = None,
        id: str | None = None,  # noqa: A002
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        check_on_error(on_error)
        self.on_error = on_error
        require("wandb", "WandB")
        self.id = id
        self.run: Any = None
        self._dir = None if dir is None else local_path(dir, "the dir of WandB")
        self._arguments = {"project": project, "mode": mode, "reinit": "create_new", **kwargs}
        self._config: dict[str, Any] | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """Set `values` as the run's configuration with the next `log`."""
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step; several calls at the same step become one row."""
        numbers, media = split(values)
        run = self._open()
        if self._config is not None:
            run.config.update(self._config, allow_val_change=True)
            self._config = None
        run.log({**numbers, **{name: _native(value) for name, value in media.items()}}, step=int(step))

    def close(self) -> None:
        """Finish the run; a later `log` resumes it."""
        if self.run is not None:
            run, self.run = self.run, None
            run.finish()

    def _open(self) -> Any:
        if self.run is None:
            if self._dir is not None:
                self._dir.mkdir(parents=True, exist_ok=True)  # otherwise W&B would write elsewhere
            resume = {"id": self.id, "resume": "allow"} if self.id else {}
            self.run = load("wandb").init(dir=self._dir, **{**resume, **self._arguments})
            self.id = self.run.id
        return self.run


def _native(value: Media) -> Any:
    wandb = load("wandb")
    if isinstance(value, Histogram):
        return wandb.Histogram(np_histogram=(value.counts, value.edges))
    if isinstance(value, Image):
        pixels = value.pixels
        return wandb.Image(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return wandb.Html(f"<pre>{html.escape(value.text)}</pre>", inject=False)
