"""A sink that logs to MLflow."""

from __future__ import annotations

import json
import posixpath
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lumen.core.arguments import checked
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json, flatten
from lumen.sinks.extras import load, require
from lumen.sinks.media import Histogram, Image, Media, split

# Limits of MLflow's servers for a request and a field.
_METRICS_PER_BATCH, _FIELDS_PER_BATCH = 1000, 100
_PARAM_LENGTH, _TAG_LENGTH = 6000, 5000
_INVALID = re.compile(r"[^\w\-. /]")


@checked
class MLflow:
    """Logs to an MLflow run, which starts at the first `log`; needs the extra `[mlflow]`.

    Numbers are metrics. Images, texts and histograms are artifacts: `images/NAME/STEP.png`, `texts/NAME/STEP.txt`,
    `histograms/NAME/STEP.json`. The configuration becomes params with dotted names; values of more than 6,000
    characters are truncated, with a note. MLflow's params cannot change: values that differ in a resumed run become
    tags of the same name. The commit of `run_info` is the tag `mlflow.source.git.commit`. Characters that MLflow does
    not allow in names become `_`.

    `tracking_uri` defaults to MLflow's own, and `experiment` is created if it does not exist. Pass `run_id` to resume a
    run; the attribute `run_id` is that of the new run once it has started. MLflow cannot delete numbers: those that a
    resumed run logs again appear twice, with equal values. Its databases store infinity as the largest float.

    Raises ImportError if mlflow is missing, and the errors of its client.

    >>> import lumen as lm
    >>> sink = lm.sinks.MLflow("sqlite:///runs/mlflow.db", experiment="digits")  # doctest: +SKIP
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = "Default",
        run_id: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        on_error: OnError = "raise",
        time_fn: Callable[[], float] = time.time,
    ) -> None:
        check_on_error(on_error)
        require("mlflow", "MLflow")
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.on_error = on_error
        self.run_id = run_id
        self._run_name = run_name
        self._tags = dict(tags or {})
        self._time_fn = time_fn
        self._client: Any = None
        self._config: dict[str, Any] | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """Log `values` as the run's params with the next `log`."""
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step."""
        numbers, media = split(values)
        client = self._open()
        if self._config is not None:
            self._log_config(client, self._config)
            self._config = None
        metric, now = load("mlflow.entities").Metric, round(self._time_fn() * 1000)
        metrics = [metric(_name(name), float(value), now, int(step)) for name, value in numbers.items()]
        for batch in _batches(metrics, _METRICS_PER_BATCH):
            client.log_batch(self.run_id, metrics=batch)
        for name, value in media.items():
            self._log_artifact(client, _name(name), int(step), value)

    def close(self) -> None:
        """Mark the run as finished; a later `log` resumes it."""
        if self._client is not None:
            client, self._client = self._client, None
            client.set_terminated(self.run_id)

    def _open(self) -> Any:
        if self._client is None:
            client = load("mlflow.tracking").MlflowClient(tracking_uri=self.tracking_uri)
            if self.run_id is None:
                experiment = _experiment_id(client, self.experiment)
                self.run_id = client.create_run(experiment, run_name=self._run_name, tags=self._tags).info.run_id
            else:
                client.update_run(self.run_id, status="RUNNING")
            self._client = client
        return self._client

    def _log_config(self, client: Any, values: Mapping[str, Any]) -> None:
        entities = load("mlflow.entities")
        params = {_name(name): _truncate(str(value), _PARAM_LENGTH) for name, value in flatten(values).items()}
        existing = client.get_run(self.run_id).data.params
        new = [entities.Param(name, value) for name, value in params.items() if name not in existing]
        tags = {
            name: _truncate(value, _TAG_LENGTH) for name, value in params.items() if existing.get(name, value) != value
        }
        git = values.get("git")
        if isinstance(git, Mapping) and isinstance(git.get("commit"), str):
            tags["mlflow.source.git.commit"] = git["commit"]
        for batch in _batches(new, _FIELDS_PER_BATCH):
            client.log_batch(self.run_id, params=batch)
        for batch in _batches([entities.RunTag(name, value) for name, value in tags.items()], _FIELDS_PER_BATCH):
            client.log_batch(self.run_id, tags=batch)

    def _log_artifact(self, client: Any, name: str, step: int, value: Media) -> None:
        if isinstance(value, Histogram):
            record = {"edges": value.edges, "counts": value.counts, "nonfinite": value.nonfinite}
            client.log_text(self.run_id, json.dumps(record), f"histograms/{name}/{step}.json")
        elif isinstance(value, Image):
            with tempfile.TemporaryDirectory() as directory:
                file = Path(directory, f"{step}.png")
                file.write_bytes(value.png())
                client.log_artifact(self.run_id, str(file), f"images/{name}")
        else:
            client.log_text(self.run_id, value.text, f"texts/{name}/{step}.txt")


def _experiment_id(client: Any, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except load("mlflow.exceptions").MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process may have created it
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _name(name: str) -> str:
    """A name that MLflow accepts: a normalized relative path."""
    return posixpath.normpath(_INVALID.sub("_", name).replace("..", "__").lstrip("/") or "_")[:250]


def _truncate(text: str, size: int) -> str:
    note = f"… (cut, {len(text)} characters)"
    return text if len(text) <= size else text[: size - len(note)] + note


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
