"""Numbers on the screen."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from lumen.errors import printable
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json, flatten
from lumen.sinks.format import short
from lumen.sinks.media import Text, split

_WIDTH = 6  # of a number, until a wider one comes
_CONFIG = 200  # characters of the configuration that are shown


class Console:
    """Prints one line for each `log`, numbers under numbers: in color on a terminal, plain elsewhere.

    A `Text` follows on lines of its own; histograms and images are left out. The configuration is one line, cut at 200
    characters. `file` is the standard output unless given. The Runner's own display shows the same numbers: give it
    `progress=False`, or a bar on a terminal, above which the lines go.

    >>> import lumen as lm
    >>> sink = lm.sinks.Console()
    >>> sink.log(50, {"loss": 0.69314, "lr": 1e-3})
    step     50  loss 0.6931  lr  0.001
    >>> sink.log(100, {"loss": 0.5, "lr": 1e-3, "sample": lm.sinks.Text("to be")})
    step    100  loss    0.5  lr  0.001
    sample: to be
    """

    def __init__(self, file: TextIO | None = None, *, on_error: OnError = "raise") -> None:
        check_on_error(on_error)
        self._file = file
        self.on_error = on_error
        self._widths: dict[str, int] = {}

    def config(self, values: Mapping[str, Any]) -> None:
        """Print the configuration on one line."""
        line = "config  " + "  ".join(f"{name} {value}" for name, value in flatten(as_json(values)).items())
        line = printable(" ".join(line.splitlines()))
        self._print([("", line if len(line) <= _CONFIG else line[: _CONFIG - 1] + "…")])

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Print one line."""
        numbers, media = split(values)
        self._print([self._cell(name, value) for name, value in {"step": int(step), **numbers}.items()])
        for name, value in media.items():
            if isinstance(value, Text):
                self._print([(f"{printable(name)}: ", printable(value.text, keep="\n\t"))])

    def close(self) -> None:
        """Do nothing: each line was flushed."""

    def _cell(self, name: str, value: float) -> tuple[str, str]:
        text = short(value)
        width = self._widths[name] = max(self._widths.get(name, _WIDTH), len(text))
        return f"{printable(name)} ", text.rjust(width)

    def _print(self, cells: list[tuple[str, str]]) -> None:
        file = self._file or sys.stdout  # looked up each time: notebooks and tests replace it
        if file.isatty():
            _print_in_colour(file, cells)
        else:
            file.write("  ".join(name + value for name, value in cells) + "\n")
            file.flush()


def _print_in_colour(file: TextIO, cells: list[tuple[str, str]]) -> None:
    import rich
    from rich.console import Console as RichConsole
    from rich.text import Text as RichText

    line = RichText("  ").join(RichText.assemble((name, "dim"), value) for name, value in cells)
    # The one console of the process knows of a progress bar that is being drawn, and prints above it.
    console = rich.get_console() if file is sys.stdout else RichConsole(file=file)
    console.print(line, soft_wrap=True)
