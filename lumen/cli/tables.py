"""Print tables and fields: with rich on a terminal, as plain text elsewhere.

The text may come from an untrusted checkpoint, so control sequences in it are escaped.
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


def escape(text: str) -> str:
    r"""Escape all nonprintable characters in the text except newlines.

    >>> escape("red: \x1b[31m")
    'red: \\x1b[31m'
    """
    return printable(text, keep="\n")


def one_line(value: Any) -> str:
    """Format any JSON value on one line, dicts as `name value, name value`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(name)} {one_line(item)}" for name, item in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(escape(value if isinstance(value, str) else json.dumps(value)).split("\n"))


def print_fields(lines: Mapping[str, str]) -> None:
    """Print names and values in two aligned columns."""
    fields = {printable(name): text for name, text in lines.items()}
    width = max(map(len, fields), default=0)
    for name, text in fields.items():
        print(f"  {name:{width}}  {text}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table; the columns in `right` are right-aligned."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich_table(columns, rows, right)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, columns, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _print_rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rich_table = Table()
    for name in columns:
        rich_table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        rich_table.add_row(*map(Text, row))
    Console().print(rich_table)


def print_json(value: Any) -> None:
    """Print the value as JSON; NaN and infinity become strings."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
