"""Progress of a run: a rich bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lumen.sinks.format import numbers
from lumen.train.clock import Clock

_REFRESH = 0.1  # seconds between two redrawings


class Progress(Protocol):
    """The interface of a display."""

    def start(self, total: int | None, begin: int) -> None:
        """A run of `total` steps (None: unknown) starts at step `begin`."""

    def tick(self, clock: Clock) -> None:
        """A step is complete. This is called after every step, so it must be cheap."""

    def show(self, clock: Clock, values: Mapping[str, float]) -> None:
        """New numbers."""

    def stop(self) -> None:
        """The run is over."""


class Silent:
    """Shows nothing."""

    def start(self, total: int | None, begin: int) -> None:
        """Nothing."""

    def tick(self, clock: Clock) -> None:
        """Nothing."""

    def show(self, clock: Clock, values: Mapping[str, float]) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines:
    """One line for each logging point: for files, pipes and CI."""

    def __init__(self, write: Callable[[str], Any] | None = None) -> None:
        self._write = write or (lambda line: print(line, flush=True))
        self._total: int | None = None

    def start(self, total: int | None, begin: int) -> None:
        """Store the number of steps."""
        self._total = total

    def tick(self, clock: Clock) -> None:
        """Nothing: a line is printed with new numbers."""

    def show(self, clock: Clock, values: Mapping[str, float]) -> None:
        """Print one line."""
        of = f"/{self._total}" if self._total else ""
        self._write(f"step {clock.step}{of}  epoch {clock.epoch}  {clock.seconds:.1f}s  {numbers(values)}")

    def stop(self) -> None:
        """Nothing."""


class Bar:
    """A rich progress bar, redrawn at most ten times a second."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining
        from rich.table import Column

        last = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            Remaining(),
            # The only column that shrinks on a narrow terminal.
            TextColumn("{task.fields[numbers]}", markup=False, table_column=last),
            auto_refresh=False,
            expand=True,
        )
        self._task: Any = None
        self._numbers = ""
        self._due = 0.0

    def start(self, total: int | None, begin: int) -> None:
        """Draw the empty bar."""
        self._bar.start()
        self._task = self._bar.add_task("fit", total=total, completed=begin, epoch=0, numbers="")

    def tick(self, clock: Clock) -> None:
        """Redraw, if the last drawing is old enough."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _REFRESH
            self._draw(clock)

    def show(self, clock: Clock, values: Mapping[str, float]) -> None:
        """Redraw with new numbers."""
        self._numbers = numbers(values)
        self._draw(clock)

    def stop(self) -> None:
        """Leave the last drawing on the screen."""
        self._bar.stop()

    def _draw(self, clock: Clock) -> None:
        self._bar.update(self._task, completed=clock.step, epoch=clock.epoch, numbers=self._numbers)
        self._bar.refresh()


def make_progress(kind: bool | str) -> Progress:
    """The display for `kind`: True or "auto" (a bar on a terminal or in a notebook), "bar", "lines", False."""
    if kind is False:
        return Silent()
    if kind == "bar" or (kind in (True, "auto") and (sys.stdout.isatty() or "ipykernel" in sys.modules)):
        return Bar()
    return Lines()
