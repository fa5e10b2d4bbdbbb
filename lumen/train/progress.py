"""Progress of a run: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lumen.sinks.format import numbers
from lumen.train.clock import Clock
from lumen.train.curves import measures

_REFRESH = 0.1  # seconds between two redrawings on a terminal
_PAUSE = 50  # times what a drawing took: a busy machine or a slow terminal does not slow the run by more than 2%
_NOTEBOOK_REFRESH = 0.5  # each is a message to the browser


class Progress(Protocol):
    """The interface of a display; one without `ticks` changes only with new numbers."""

    ticks: bool

    def start(self, total: int | None, begin: int) -> None:
        """A run of `total` steps (None: unknown) starts at step `begin`."""

    def tick(self, clock: Clock) -> None:
        """A step is complete. With `ticks` this is called after every step, so it must be cheap."""

    def show(self, clock: Clock, values: Mapping[str, float]) -> None:
        """New numbers."""

    def note(self, text: str) -> None:
        """Show a line about the run."""

    def stop(self) -> None:
        """The run is over."""


class Silent:
    """Shows nothing."""

    ticks = False

    def start(self, total: int | None, begin: int) -> None:
        """Nothing."""

    def tick(self, clock: Clock) -> None:
        """Nothing."""

    def show(self, clock: Clock, values: Mapping[str, float]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines:
    """One line for each logging point: for files, pipes and CI."""

    ticks = False

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

    def note(self, text: str) -> None:
        """Print it."""
        self._write(text)

    def stop(self) -> None:
        """Nothing."""


class Newest:
    """The newest number of each name, those that measure the model first."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def update(self, values: Mapping[str, float]) -> str:
        """Add new numbers; returns all of them as text.

        >>> newest = Newest()
        >>> newest.update({"train/loss": 0.5, "lr": 0.1})
        'loss 0.5  lr 0.1'
        >>> newest.update({"val/loss": 0.75})
        'loss 0.5  val/loss 0.75  lr 0.1'
        """
        self._values.update(values)
        first = measures(list(self._values))
        names = [*first, *(name for name in self._values if name not in first)]
        return numbers({name: self._values[name] for name in names})


class Bar:
    """A rich progress bar, redrawn at most ten times a second: each time takes about a millisecond."""

    ticks = True

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
        self._newest = Newest()
        self._numbers = ""
        self._clock = Clock()
        self._due = 0.0

    def start(self, total: int | None, begin: int) -> None:
        """Draw the empty bar."""
        self._clock = Clock(step=begin)
        self._bar.start()
        self._task = self._bar.add_task("fit", total=total, completed=begin, epoch=0, numbers="")

    def tick(self, clock: Clock) -> None:
        """Redraw, if the last drawing is old enough."""
        self._clock = clock
        now = time.monotonic()
        if now >= self._due:
            self._draw()
            drawn = time.monotonic()
            self._due = drawn + max(_REFRESH, _PAUSE * (drawn - now))

    def show(self, clock: Clock, values: Mapping[str, float]) -> None:
        """Store new numbers, which the next drawing shows beside those of other names."""
        self._numbers = self._newest.update(values)
        self.tick(clock)

    def note(self, text: str) -> None:
        """Print it above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave a last drawing on the screen."""
        if self._task is not None:
            self._draw()
        self._bar.stop()

    def _draw(self) -> None:
        clock = self._clock
        self._bar.update(self._task, completed=clock.step, epoch=clock.epoch, numbers=self._numbers)
        self._bar.refresh()


class NotebookBar:
    """A bar in the output of a notebook's cell, as HTML: it needs no widgets, and is saved with the notebook."""

    ticks = True

    def __init__(self) -> None:
        self._newest = Newest()
        self._numbers = ""
        self._notes: list[str] = []
        self._total: int | None = None
        self._clock = Clock()
        self._begin = 0
        self._began = self._due = 0.0
        self._handle: Any = None

    def start(self, total: int | None, begin: int) -> None:
        """Display the empty bar."""
        self._total, self._begin, self._began = total, begin, time.monotonic()
        self._clock = Clock(step=begin)
        self._handle = importlib.import_module("IPython.display").display(self, display_id=True)

    def tick(self, clock: Clock) -> None:
        """Redraw, if the last drawing is old enough."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _NOTEBOOK_REFRESH
            self._draw(clock)

    def show(self, clock: Clock, values: Mapping[str, float]) -> None:
        """Store new numbers, which the next drawing shows beside those of other names."""
        self._numbers = self._newest.update(values)
        self.tick(clock)

    def note(self, text: str) -> None:
        """Show it above the bar."""
        self._notes.append(text)

    def stop(self) -> None:
        """Leave the last drawing in the cell."""
        if self._handle is not None:
            self._handle.update(self)

    def _draw(self, clock: Clock) -> None:
        self._clock = clock
        if self._handle is not None:
            self._handle.update(self)

    def __repr__(self) -> str:
        return "\n".join([*self._notes, self._status()])

    def _repr_html_(self) -> str:
        notes = "".join(f"<div>{html.escape(text)}</div>" for text in self._notes)
        size = "" if self._total is None else f' value="{self._clock.step}" max="{self._total}"'
        bar = f'<progress{size} style="width:200px;vertical-align:middle"></progress>'
        return f'<div style="font-family:monospace;font-size:13px">{notes}{bar} {html.escape(self._status())}</div>'

    def _status(self) -> str:
        clock, of = self._clock, f"/{self._total}" if self._total else ""
        steps, elapsed = clock.step - self._begin, time.monotonic() - self._began
        texts = [f"epoch {clock.epoch}", f"step {clock.step}{of}", _duration(clock.seconds)]
        if self._total and steps > 0 and clock.step < self._total:
            texts.append(f"eta {_duration(elapsed / steps * (self._total - clock.step))}")
        return "  ".join([*texts, self._numbers]).rstrip()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def make_progress(kind: bool | str) -> Progress:
    """The display for `kind`: True or "auto" (a bar on a terminal or in a notebook), "bar", "lines", False."""
    if kind is False:
        return Silent()
    in_notebook = "ipykernel" in sys.modules
    if kind == "bar" or (kind in (True, "auto") and (sys.stdout.isatty() or in_notebook)):
        return NotebookBar() if in_notebook else Bar()
    return Lines()
