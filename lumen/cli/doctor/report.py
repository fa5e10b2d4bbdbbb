"""Findings of `lumen doctor`: whether a component is ok, missing or broken, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lumen.cli import tables

Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of a report: `detail` describes the component, `fix` says what to do if `status` is not "ok".

    A missing component is optional; a broken one prevents training.
    """

    section: str
    name: str
    status: Status
    detail: str
    fix: str = ""


def print_report(findings: Iterable[Finding]) -> None:
    """Print each finding as soon as it is yielded, under a heading for its section."""
    section = None
    for finding in findings:
        if finding.section != section:
            print(("\n" if section else "") + finding.section)
            section = finding.section
        first, *more = tables.escape(finding.detail).split("\n")
        print(f"  {finding.status:7}  {tables.escape(finding.name):23}  {first}".rstrip())
        for line in [*more, *(f"fix: {tables.escape(finding.fix)}".split("\n") if finding.fix else [])]:
            print(f"{'':36}{line}")
    print(flush=True)


def summarize(findings: Iterable[Finding]) -> str:
    """Summarize the findings in one line.

    >>> summarize([Finding("a", "b", "missing", "not installed"), Finding("a", "c", "ok", "1.0")])
    'Nothing is broken. 1 thing is missing, which matters only where it is used.'
    """
    statuses = [finding.status for finding in findings]
    broken, missing = statuses.count("broken"), statuses.count("missing")
    text = f"{_count_text(broken)} broken: see above." if broken else "Nothing is broken."
    return text + (f" {_count_text(missing)} missing, which matters only where it is used." if missing else "")


def _count_text(count: int) -> str:
    return "1 thing is" if count == 1 else f"{count} things are"
