"""What `lumen doctor` says of one thing: that it is there, missing or broken, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lumen.cli import tables

Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of a report: `found` is what there is, `fix` what to do where `status` is not "ok".

    A missing thing is one that Lumen does without until it is asked for; a broken one is in the way.
    """

    section: str
    name: str
    status: Status
    found: str
    fix: str = ""


def report(findings: Iterable[Finding]) -> None:
    """Print each as soon as it is found, under a heading for its section."""
    section = None
    for each in findings:
        if each.section != section:
            print(("\n" if section else "") + each.section)
            section = each.section
        found, *more = tables.readable(each.found).split("\n")
        print(f"  {each.status:7}  {tables.readable(each.name):23}  {found}".rstrip())
        for line in [*more, *(f"fix: {tables.readable(each.fix)}".split("\n") if each.fix else [])]:
            print(f"{'':36}{line}")
    print(flush=True)


def summed(findings: Iterable[Finding]) -> str:
    """How it stands, in a line.

    >>> summed([Finding("a", "b", "missing", "not installed"), Finding("a", "c", "ok", "1.0")])
    'Nothing is broken. 1 thing is missing, which matters only where it is used.'
    """
    counted = [each.status for each in findings]
    broken, missing = counted.count("broken"), counted.count("missing")
    said = f"{_things(broken)} broken: see above." if broken else "Nothing is broken."
    return said + (f" {_things(missing)} missing, which matters only where it is used." if missing else "")


def _things(count: int) -> str:
    return "1 thing is" if count == 1 else f"{count} things are"
