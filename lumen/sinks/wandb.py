"""Weights & Biases."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json
from lumen.sinks.extras import load, require
from lumen.sinks.media import Histogram, Image, Media, split


class WandB:
    """Logs to a run of Weights & Biases, which begins at the first `log`; needs `pip install 'lumen-torch[wandb]'`.

    Numbers, histograms, images and texts are written as W&B's own. The configuration is the run's. `project`, `dir`
    (made where it is not there), `mode` ("online", "offline", "disabled"), `id` and all else are arguments of
    `wandb.init`; a run that the script has begun itself is not touched. The attribute `run` is W&B's, while it is open.

    Give an `id` for a run that may be resumed. W&B cannot take rows back, and passes over rows whose step is below
    its newest; a resumed Lumen run logs the same numbers again, so that what W&B has stays right. The run is written
    by a process of W&B's own: errors of its disk or network are in its log, and not raised.

    Raises ImportError where wandb is missing, OSError where `dir` cannot be, and what `wandb.init` raises.

    >>> import lumen as lm
    >>> sink = lm.sinks.WandB("my-project", dir="runs", mode="offline", id="first")  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002 (W&B's name, as the next)
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
        self._dir = None if dir is None else Path(dir)
        self._arguments = {"project": project, "mode": mode, "reinit": "create_new", **kwargs}
        self._config: dict[str, Any] | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """Make `values` the run's configuration, with the next `log`."""
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step; those of several calls at one step become one row."""
        numbers, media = split(values)
        run = self._opened()
        if self._config is not None:
            run.config.update(self._config, allow_val_change=True)
            self._config = None
        run.log({**numbers, **{name: _native(value) for name, value in media.items()}}, step=int(step))

    def close(self) -> None:
        """Finish the run; a later `log` resumes it."""
        if self.run is not None:
            run, self.run = self.run, None
            run.finish()

    def _opened(self) -> Any:
        if self.run is None:
            if self._dir is not None:
                self._dir.mkdir(parents=True, exist_ok=True)  # W&B would write elsewhere instead
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
