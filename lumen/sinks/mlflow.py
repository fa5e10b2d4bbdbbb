"""MLflow."""

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

from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json, flatten
from lumen.sinks.extras import load, require
from lumen.sinks.media import Histogram, Image, Media, split

# What MLflow's servers take in one request and one field.
_METRICS, _FIELDS = 1000, 100
_PARAM, _TAG = 6000, 5000
_OTHER = re.compile(r"[^\w\-. /]")


class MLflow:
    """Logs to a run of MLflow, which begins at the first `log`; needs `pip install 'lumen-torch[mlflow]'`.

    Numbers are metrics. Images, texts and histograms are artifacts: `images/NAME/STEP.png`, `texts/NAME/STEP.txt`,
    `histograms/NAME/STEP.json`. The configuration becomes params by dotted names; values of more than 6,000 characters
    are cut, with a note. MLflow's params cannot change: what a resumed run has otherwise becomes a tag of that name.
    The commit of `run_info` is the tag `mlflow.source.git.commit`. Characters that MLflow has not in names become `_`.

    `tracking_uri` is MLflow's own default unless given, and `experiment` is made where there is none. `run_id` goes
    on with a run, as a resumed one should; the `run_id` of a new run is the attribute once it began. MLflow cannot take
    numbers back: those that a resumed run logs again are there twice, and equal. Its databases keep infinity as the
    largest float.

    Raises ImportError where mlflow is missing, and what its client raises.

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
        """Make `values` the run's params, with the next `log`."""
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step."""
        numbers, media = split(values)
        client = self._opened()
        if self._config is not None:
            self._log_config(client, self._config)
            self._config = None
        metric, now = load("mlflow.entities").Metric, round(self._time_fn() * 1000)
        metrics = [metric(_name(name), float(value), now, int(step)) for name, value in numbers.items()]
        for some in _batches(metrics, _METRICS):
            client.log_batch(self.run_id, metrics=some)
        for name, value in media.items():
            self._log_artifact(client, _name(name), int(step), value)

    def close(self) -> None:
        """Mark the run as finished; a later `log` goes on with it."""
        if self._client is not None:
            client, self._client = self._client, None
            client.set_terminated(self.run_id)

    def _opened(self) -> Any:
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
        params = {_name(name): _cut(str(value), _PARAM) for name, value in flatten(values).items()}
        there = client.get_run(self.run_id).data.params
        new = [entities.Param(name, value) for name, value in params.items() if name not in there]
        tags = {name: _cut(value, _TAG) for name, value in params.items() if there.get(name, value) != value}
        git = values.get("git")
        if isinstance(git, Mapping) and isinstance(git.get("commit"), str):
            tags["mlflow.source.git.commit"] = git["commit"]
        for some in _batches(new, _FIELDS):
            client.log_batch(self.run_id, params=some)
        for some in _batches([entities.RunTag(name, value) for name, value in tags.items()], _FIELDS):
            client.log_batch(self.run_id, tags=some)

    def _log_artifact(self, client: Any, name: str, step: int, value: Media) -> None:
        if isinstance(value, Histogram):
            written = {"edges": value.edges, "counts": value.counts, "nonfinite": value.nonfinite}
            client.log_text(self.run_id, json.dumps(written), f"histograms/{name}/{step}.json")
        elif isinstance(value, Image):
            with tempfile.TemporaryDirectory() as directory:
                file = Path(directory, f"{step}.png")
                file.write_bytes(value.png())
                client.log_artifact(self.run_id, str(file), f"images/{name}")
        else:
            client.log_text(self.run_id, value.text, f"texts/{name}/{step}.txt")


def _experiment_id(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except load("mlflow.exceptions").MlflowException:
            found = client.get_experiment_by_name(name)  # another process may have been faster
            if found is None:
                raise
    return str(found.experiment_id)


def _name(name: str) -> str:
    """A name that MLflow takes: it must be a relative path in its shortest form."""
    return posixpath.normpath(_OTHER.sub("_", name).replace("..", "__").lstrip("/") or "_")[:250]


def _cut(text: str, size: int) -> str:
    note = f"… (cut, {len(text)} characters)"
    return text if len(text) <= size else text[: size - len(note)] + note


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
