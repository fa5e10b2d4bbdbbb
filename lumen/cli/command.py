"""How a command is added to `lumen`: what it is for, and examples of it, in its `--help`."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any, name: str, *, help: str, description: str, examples: str) -> argparse.ArgumentParser:  # noqa: A002
    """A parser for the command `name`: `help` is its line in `lumen --help`, the rest what its own `--help` says."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
