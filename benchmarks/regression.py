"""Has Lumen become slower, or larger? Compares the ratios of a report with the committed ones.

A ratio counts as worse if it lies beyond the baseline's by more than the sum of both interquartile ranges, and by more
than `FLOOR`. The noise of either run thus widens the tolerance, and a figure without noise, such as memory, may still
change a little. All differences are relative to the ratio, so that 0.5 and 5 are treated alike. The reference of a
case shares the machine, the minute and the noise with the variants compared to it, so ratios are comparable between
machines to some extent. Times are not, and are not compared. Only Lumen's rows are compared, not those of other
libraries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Key, Row

FLOOR = 0.05
BASELINE = Path(__file__).with_name("baseline.json")


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison: warnings, and the number of compared rows."""

    warnings: Sequence[str]
    compared: int
    unknown: int  # rows of Lumen that the baseline lacks

    def lines(self) -> list[str]:
        """The lines to print."""
        said = [f"warning: {line}" for line in self.warnings]
        new = f", {self.unknown} not in the baseline" if self.unknown else ""
        said.append(f"{self.compared} ratios compared with the baseline, {len(self.warnings)} worse{new}")
        return said


def load(path: Path) -> dict[str, Any]:
    """A report as `write` saves it; an empty one if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def rows_of(report: dict[str, Any]) -> list[Row]:
    """All rows of a report."""
    return [Row(**row) for part in report["parts"].values() for row in part["rows"]]


def compare(rows: Iterable[Row], baseline: Iterable[Row]) -> Verdict:
    """Compare each of Lumen's ratios in `rows` with the same case, variant and metric in `baseline`."""
    known: dict[Key, Row] = {row.key: row for row in baseline}
    warnings, compared, unknown = [], 0, 0
    for row in rows:
        before = known.get(row.key)
        if not row.ours or (row.ratio is None and row.value is not None):
            continue
        if before is None or before.ratio is None:
            unknown += 1
            continue
        compared += 1
        if row.ratio is None:
            warnings.append(f"{_name(row)}: {row.note}; the baseline is {before.ratio:.2f}")
        elif worse(row, before):
            warnings.append(f"{_name(row)}: {_shown(row)}, where the baseline is {_shown(before)}")
    return Verdict(warnings, compared, unknown)


def worse(row: Row, before: Row) -> bool:
    """Whether `row` is worse than the baseline by more than the noise of both."""
    now, then = row.ratio or 0.0, before.ratio or 0.0
    if not now or not then:
        return False
    loss = (then / now if row.higher else now / then) - 1
    return loss > max(FLOOR, _spread(row) + _spread(before))


def merged(baseline: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The baseline, with the benchmarks of `report` replaced."""
    return {"parts": {**baseline["parts"], **report["parts"]}}


def elsewhere(report: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """Differences of machine and software from the baseline's, for the benchmarks in both."""
    found = set()
    for name, part in report["parts"].items():
        here, there = part["machine"], baseline["parts"].get(name, {}).get("machine", part["machine"])
        for what in ("cpu", "threads", "python"):
            if here[what] != there[what]:
                found.add(f"{what} {here[what]}, the baseline's {there[what]}")
        if here["versions"]["torch"] != there["versions"]["torch"]:
            found.add(f"torch {here['versions']['torch']}, the baseline's {there['versions']['torch']}")
    return sorted(found)


def _spread(row: Row) -> float:
    if row.low is None or row.high is None or not row.ratio:
        return 0.0
    return (row.high - row.low) / row.ratio


def _name(row: Row) -> str:
    return f"{row.part}, {row.case}, {row.variant} ({row.metric})"


def _shown(row: Row) -> str:
    quartiles = "" if row.low is None or row.high is None else f" [{row.low:.2f}–{row.high:.2f}]"
    return f"{row.ratio:.2f}{quartiles}"
