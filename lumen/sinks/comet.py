"""A sink that logs to Comet."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

from lumen.core.arguments import checked
from lumen.core.urls import local_path
from lumen.errors import SinkError
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json, flatten
from lumen.sinks.extras import load, require
from lumen.sinks.media import Histogram, Image, Media, split


@checked
class Comet:
    """Logs to a Comet experiment, which starts at the first `log`; needs the extra `[comet]`.

    Numbers are metrics, images and texts Comet's own types, and the configuration parameters with dotted names. A
    histogram is counted again in Comet's bins, whose width is a tenth of their distance from zero. `project`,
    `workspace` and `experiment_key` are those of `comet_ml.start`, and all other arguments those of
    `comet_ml.ExperimentConfig`; what Comet logs by itself from other libraries is off, because it would be there twice.
    The attribute `experiment` is Comet's while open.

    With `online=False` nothing is sent: the values between the first `log` and `close` become an archive in `dir`
    (created if missing), which `comet upload` sends. Comet collects them in a temporary directory until `close`: a run
    that is killed leaves no archive.

    Pass an `experiment_key` of 32 to 50 letters and digits for a run that may be resumed; the attribute is that of the
    new experiment once it has started. Offline each part of a resumed run is an archive of its own, of the same
    experiment. Comet cannot delete numbers: those that a resumed run logs again appear twice, with equal values.

    Raises ImportError if comet_ml is missing, OSError if `dir` cannot be created, SinkError if the process has another
    experiment, of which Comet allows one at a time, and the errors of `comet_ml.start`.

    >>> import lumen as lm
    >>> sink = lm.sinks.Comet("digits", online=False, dir="runs")  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        workspace: str | None = None,
        experiment_key: str | None = None,
        online: bool = True,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002 (as in WandB)
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        check_on_error(on_error)
        require("comet_ml", "Comet")
        if dir is not None and online:
            raise SinkError("Comet writes to a directory only when it is offline: add online=False, or omit dir.")
        self.experiment_key = experiment_key
        self.on_error = on_error
        self.experiment: Any = None
        self._dir = None if dir is None else local_path(dir, "the dir of Comet")
        self._start = {"project_name": project, "workspace": workspace, "online": online, "mode": "get_or_create"}
        self._settings = {"auto_metric_logging": False, "auto_param_logging": False, **kwargs}
        self._config: dict[str, Any] | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """Log `values` as the experiment's parameters with the next `log`."""
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step."""
        numbers, media = split(values)
        experiment = self._open()
        if self._config is not None:
            experiment.log_parameters(flatten(self._config))
            self._config = None
        experiment.log_metrics(numbers, step=int(step))
        for name, value in media.items():
            _log_media(experiment, name, int(step), value)

    def close(self) -> None:
        """End the experiment; a later `log` resumes it."""
        if self.experiment is not None:
            experiment, self.experiment = self.experiment, None
            experiment.end()

    def _open(self) -> Any:
        if self.experiment is not None and self.experiment.ended:
            self.experiment = None
            raise SinkError(
                f"Comet has ended the experiment {self.experiment_key}, because the script started another one: Comet"
                " allows one at a time in a process."
            )
        if self.experiment is None:
            self.experiment = self._start_experiment()
            self.experiment_key = self.experiment.get_key()
        return self.experiment

    def _start_experiment(self) -> Any:
        comet = load("comet_ml")
        running = comet.get_running_experiment()
        if running is not None and not running.ended:
            raise SinkError(
                f"This process already has the Comet experiment {running.get_key()}, which Comet would end: it allows"
                " one at a time. End it first, or use one lm.sinks.Comet, and another sink for the rest."
            )
        if self._dir is not None:
            self._dir.mkdir(parents=True, exist_ok=True)
            self._settings["offline_directory"] = str(self._dir)
        config = comet.ExperimentConfig(**self._settings)
        return comet.start(experiment_key=self.experiment_key, experiment_config=config, **self._start)


def _log_media(experiment: Any, name: str, step: int, value: Media) -> None:
    if isinstance(value, Histogram):
        histogram = load("comet_ml.data_structure").Histogram()
        centers = [(low + high) / 2 for low, high in zip(value.edges, value.edges[1:], strict=False)]
        histogram.add(centers, counts=value.counts)
        experiment.log_histogram_3d(histogram, name=name, step=step)
    elif isinstance(value, Image):
        experiment.log_image(io.BytesIO(value.png()), name=name, step=step)
    else:
        experiment.log_text(value.text, step=step, metadata={"name": name})
