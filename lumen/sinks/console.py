"""A sink that prints numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from lumen.core.arguments import checked
from lumen.errors import printable
from lumen.sinks.base import OnError, check_on_error
from lumen.sinks.config import as_json, flatten
from lumen.sinks.format import short
from lumen.sinks.media import Text, split

_WIDTH = 6  # minimum width of a number
_CONFIG = 200  # maximum number of characters of the configuration


@checked
class Console:
    """Prints one line for each `log`, in aligned columns: in color on a terminal, plain elsewhere.

    A `Text` is printed on separate lines; histograms and images are ignored. The configuration is one line, truncated
    to 200 characters. `file` defaults to the standard output. The Runner's own display shows the same numbers: pass
    `progress=False` to the Runner, or keep its progress bar, which the lines are printed above.

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
        """Do nothing: each line is already flushed."""

    def _cell(self, name: str, value: float) -> tuple[str, str]:
        text = short(value)
        width = self._widths[name] = max(self._widths.get(name, _WIDTH), len(text))
        return f"{printable(name)} ", text.rjust(width)

    def _print(self, cells: list[tuple[str, str]]) -> None:
        file = self._file or sys.stdout  # looked up on each call: notebooks and tests replace it
        if file.isatty():
            _print_in_color(file, cells)
        else:
            file.write("  ".join(name + value for name, value in cells) + "\n")
            file.flush()


def _print_in_color(file: TextIO, cells: list[tuple[str, str]]) -> None:
    import rich
    from rich.console import Console as RichConsole
    from rich.text import Text as RichText

    line = RichText("  ").join(RichText.assemble((name, "dim"), value) for name, value in cells)
    # The global console prints above an active progress bar.
    console = rich.get_console() if file is sys.stdout else RichConsole(file=file)
    console.print(line, soft_wrap=True)
