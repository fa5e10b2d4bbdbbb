"""The options of a benchmark."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The options of the command line, the same for every benchmark; each reads those that it needs."""

    quick: bool = False
    rounds: int | None = None
    threads: int = 2
    only: tuple[str, ...] = ()  # globs over variants
    cases: tuple[str, ...] = ()  # globs over cases
    worlds: tuple[int, ...] = ()
    wire: float | None = None  # MB/s
    directory: Path | None = None

    def pick(self, full: T, quick: T) -> T:
        """One value for `--quick`, the other otherwise."""
        return quick if self.quick else full

    def times(self, full: int, quick: int = 3) -> int:
        """The number of rounds."""
        return self.rounds or self.pick(full, quick)

    def sizes(self, *full: int, quick: int = 2) -> tuple[int, ...]:
        """The numbers of processes to measure, one after the other."""
        return self.worlds or self.pick(full, (quick,))

    def wants(self, case: str) -> bool:
        """Whether `case` is to be measured."""
        return _matches(case, self.cases)

    def chosen(self, variants: dict[str, T], base: str) -> dict[str, T]:
        """The selected `variants`, with their reference."""
        return {label: each for label, each in variants.items() if label == base or _matches(label, self.only)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)


def parser(prog: str, doc: str | None) -> argparse.ArgumentParser:
    """A command line whose help is the docstring `doc`: its first line above the arguments, the rest below."""
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=prog, description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def progress(text: str) -> None:
    """Show what is being measured: on a terminal, replacing the previous line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
