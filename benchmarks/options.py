"""The options of a benchmark."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The command line's wishes, the same for every part; a part looks at those that concern it."""

    quick: bool = False
    rounds: int | None = None
    threads: int = 2
    only: tuple[str, ...] = ()  # globs over variants
    cases: tuple[str, ...] = ()  # globs over cases
    worlds: tuple[int, ...] = ()
    wire: float | None = None  # MB/s
    directory: Path | None = None

    def pick(self, full: T, quick: T) -> T:
        """The one or the other, by what was asked for."""
        return quick if self.quick else full

    def times(self, full: int, quick: int = 3) -> int:
        """How many rounds."""
        return self.rounds or self.pick(full, quick)

    def sizes(self, *full: int, quick: int = 2) -> tuple[int, ...]:
        """How many processes, each in its turn."""
        return self.worlds or self.pick(full, (quick,))

    def wants(self, case: str) -> bool:
        """Whether `case` is to be measured."""
        return _matches(case, self.cases)

    def chosen(self, variants: dict[str, T], base: str) -> dict[str, T]:
        """Those of `variants` that are to be measured, with the one that they are compared with."""
        return {label: each for label, each in variants.items() if label == base or _matches(label, self.only)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)


def progress(text: str) -> None:
    """Say what is being measured, on a terminal and in place of what was said before."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
