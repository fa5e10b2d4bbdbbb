"""What the suite prints and writes: a table for each benchmark, one JSON file, and the same tables for a page."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row


def number(value: float | None) -> str:
    """A number with three digits, or all digits before the decimal point."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Row, bounded: bool) -> list[str]:
    """A row's columns after the case."""
    if row.value is None:
        return [row.variant, "–", "–", row.note, *(["–"] if bounded else [])]
    ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
    spread = "" if row.low is None or row.low == row.high else f"{row.low:.2f} – {row.high:.2f}"
    shown = [row.variant, f"{number(row.value)} {row.unit}", ratio, spread]
    return [*shown, "–" if row.bound is None else f"{number(row.bound)} {row.unit}"] if bounded else shown


def show(console: Console, part: str, rows: Sequence[Row]) -> None:
    """One table for each metric of a benchmark, with a row for each case."""
    for metric, group in _by_metric(rows):
        bounded = any(row.bound is not None for row in group)
        better = "higher is better" if any(row.higher for row in group) else "lower is better"
        table = Table(title=f"{part}: {metric} (ratio: {better})", title_justify="left")
        for name in heads(bounded):
            table.add_column(name, justify="left" if name in ("case", "variant") else "right")
        for case, of_case in itertools.groupby(group, key=lambda row: row.case):
            for at, row in enumerate(of_case):
                table.add_row("" if at else case, *cells(row, bounded), style=None if row.value is not None else "dim")
            table.add_section()
        console.print(table)


def heads(bounded: bool) -> list[str]:
    """The names of the columns."""
    return ["case", "variant", "median", "ratio", "quartiles", *(["lower bound"] if bounded else [])]


def markdown(report: dict[str, Any]) -> str:
    """All tables as Markdown, for a page of the documentation."""
    blocks = []
    for name, part in report["parts"].items():
        for metric, group in _by_metric([Row(**row) for row in part["rows"]]):
            bounded = any(row.bound is not None for row in group)
            names = heads(bounded)
            lines = [f"### {name}: {metric}", "", _line(names), _line(["---", "---", *["---:"] * (len(names) - 2)])]
            lines += [_line([row.case, *cells(row, bounded)]) for row in group]
            blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def described(machine: dict[str, Any]) -> str:
    """A line that describes the machine."""
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["versions"].items())
    load = "" if machine["load_before"] is None else f", load {machine['load_before']:.1f}"
    return f"{machine['cpu']}, {machine['threads']} threads{load}; Python {machine['python']}; {versions}"


def write(path: Path, report: dict[str, Any]) -> None:
    """Write `report` to `path`, and create its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _by_metric(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.metric, []).append(row)
    return list(groups.items())


def _line(names: Sequence[str]) -> str:
    return f"| {' | '.join(names)} |"
