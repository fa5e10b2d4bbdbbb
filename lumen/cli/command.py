"""Register a command of `lumen`, with its description and examples in `--help`."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any, name: str, *, help: str, description: str, examples: str) -> argparse.ArgumentParser:  # noqa: A002
    """A parser for the command `name`: `help` is its line in `lumen --help`; its own `--help` shows the other texts."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
