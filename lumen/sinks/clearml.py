"""A sink that logs to ClearML."""

from __future__ import annotations

import io
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lumen.core.arguments import checked
from lumen.errors import SinkError
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json, flatten
from lumen.sinks.extras import load, require
from lumen.sinks.media import Histogram, Image, Media, split


@checked
class ClearML:
    """Logs to a ClearML task, which starts at the first `log`; needs the extra `[clearml]`.

    `train/loss` is the series `train` of the plot `loss`. ClearML stores NaN and infinity as 0, so these become lines
    of the console log instead. Images and texts are debug samples, histograms plots, and the configuration becomes
    hyperparameters with dotted names. `project`, `task_name` and all other arguments are those of `clearml.Task.init`
    (`project_name` for the first); the attribute `task` is ClearML's while open. What ClearML logs by itself from
    other libraries is off, because it would be there twice: `auto_connect_frameworks=True` switches it on.

    With `offline=True`, which sets ClearML's offline mode for the process, nothing is sent: the values between the
    first `log` and `close` become a folder, `offline_folder`, and a zip file next to it, below the directory of the
    environment variable `CLEARML_CACHE_DIR`; `clearml.Task.import_offline_session` sends it.

    Each run is a new task. Pass `task_id` to resume one; the attribute `task_id` is that of the new task once it has
    started. ClearML cannot resume a task offline: each part of a resumed run is a session of its own, which
    `import_offline_session(folder, previous_task_id=…)` joins. Numbers that a resumed run logs again appear twice, with
    equal values.

    ClearML seeds all random generators and replaces signal handlers when a task starts. This sink prevents the first
    (`Task.set_random_seed(None)`) and undoes the second, because both change a run. Errors in ClearML's threads appear
    in its log, and are not raised.

    Raises ImportError if clearml is missing, SinkError if the process has another task, of which ClearML allows one at
    a time, or for a `task_id` offline, and the errors of `Task.init`.

    >>> import lumen as lm
    >>> sink = lm.sinks.ClearML("digits", "first", offline=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str,
        task_name: str,
        *,
        task_id: str | None = None,
        offline: bool = False,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> None:
        check_on_error(on_error)
        require("clearml", "ClearML")
        if offline and task_id is not None:
            raise SinkError(
                f"ClearML cannot resume the task {task_id} offline: omit task_id, and join the sessions afterwards with"
                " clearml.Task.import_offline_session(folder, previous_task_id=…)."
            )
        self.task_id = task_id
        self.offline = offline
        self.offline_folder: Path | None = None
        self.on_error = on_error
        self.task: Any = None
        self._arguments = {
            "project_name": project,
            "task_name": task_name,
            "auto_connect_arg_parser": False,
            "auto_connect_frameworks": False,
            **kwargs,
        }
        self._config: dict[str, Any] | None = None

    def config(self, values: Mapping[str, Any]) -> None:
        """Set `values` as the task's hyperparameters with the next `log`."""
        self._config = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of one step."""
        numbers, media = split(values)
        task = self._open()
        if self._config is not None:
            task.update_parameters({f"General/{name}": value for name, value in flatten(self._config).items()})
            self._config = None
        logger = task.get_logger()
        for name, number in numbers.items():
            if math.isfinite(number):
                logger.report_scalar(*_plot(name), number, int(step))
            else:
                logger.report_text(f"{name} is {number} at step {step}", print_console=False)
        for name, value in media.items():
            _log_media(logger, name, int(step), value)

    def close(self) -> None:
        """Complete the task; a later `log` resumes it, or starts a new one offline."""
        if self.task is not None:
            task, self.task = self.task, None
            with _same_signal_handlers():
                task.close()

    def _open(self) -> Any:
        if self.task is None:
            self.task = self._start()
            folder = self.task.get_offline_mode_folder()  # None online
            if folder is not None:
                self.offline_folder = Path(folder)
            else:
                self.task_id = self.task.id
        return self.task

    def _start(self) -> Any:
        tasks = load("clearml").Task
        current = tasks.current_task()
        if current is not None:
            raise SinkError(
                f"This process already has the ClearML task {current.name!r} ({current.id}), and ClearML allows one at"
                " a time. Close it first, or use one lm.sinks.ClearML, and another sink for the rest."
            )
        if self.offline:
            tasks.set_offline(True)
        tasks.set_random_seed(None)
        # Without a task_id ClearML would overwrite the last task of this name, and with it shift the steps.
        resume = {"reuse_last_task_id": self.task_id or False, "continue_last_task": 0 if self.task_id else False}
        with _same_signal_handlers():
            return tasks.init(**{**resume, **self._arguments})


@contextmanager
def _same_signal_handlers() -> Iterator[None]:
    """Put the handlers back: a run that is ended by a signal saves first."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    if threading.current_thread() is threading.main_thread():  # the only one that may set them
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _plot(name: str) -> tuple[str, str]:
    """The plot and the series of a value: `train/loss` and `val/loss` share a plot."""
    series, separator, title = name.partition("/")
    return (title, series) if separator and series and title else (name, name)


def _log_media(logger: Any, name: str, step: int, value: Media) -> None:
    title, series = _plot(name)
    if isinstance(value, Histogram):
        labels = [f"{edge:.6g}" for edge in value.edges[:-1]]
        logger.report_histogram(title, series, value.counts, iteration=step, xlabels=labels)
    else:
        content, extension = (value.png(), "png") if isinstance(value, Image) else (value.text.encode(), "txt")
        stream = io.BytesIO(content)
        logger.report_media(title, series, step, stream=stream, file_extension=extension, max_history=-1)
