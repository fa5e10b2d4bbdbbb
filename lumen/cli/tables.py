"""Tables and facts for a reader: with rich on a terminal, as plain text elsewhere.

What is shown may come from a stranger's checkpoint, so nothing in it reaches the terminal as a control sequence.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lumen.errors import printable


def readable(text: str) -> str:
    r"""The text with everything that does not print written out, but line ends.

    >>> readable("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return printable(text, keep="\n")


def one_line(value: Any) -> str:
    """Any JSON, on one line: dicts as `name value, name value`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(name)} {one_line(each)}" for name, each in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(readable(value if isinstance(value, str) else json.dumps(value)).split("\n"))


def facts(lines: Mapping[str, str]) -> None:
    """Names and what is to be said of each, below each other."""
    named = {printable(name): text for name, text in lines.items()}
    width = max(map(len, named), default=0)
    for name, text in named.items():
        print(f"  {name:{width}}  {text}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table; the columns in `right` are flush right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(columns, rows, right)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table()
    for name in columns:
        drawn.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


def as_json(value: Any) -> None:
    """Print it as JSON; numbers that JSON does not have become strings."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
