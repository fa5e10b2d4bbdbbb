"""The command `lumen`: what it takes, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lumen.cli import demo, export, inspect, plan, replay
from lumen.cli.doctor import doctor
from lumen.cli.plot import command
from lumen.cli.tables import readable
from lumen.core.versions import own_version
from lumen.errors import LumenError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default that of this process; returns its exit code.

    It is 0, 1 where something failed or is damaged (and for a step that fails again), and 2 for a wrong command line.

    >>> import lumen as lm, tempfile, torch
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"weight": torch.ones(2)})
    >>> main(["inspect", path, "--values", "weight"])
    weight: float32 [2], from 1 to 1, mean 1
    tensor([1., 1.])
    0
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except LumenError as error:
        print(f"lumen {options.command}: {readable(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `lumen inspect … | head`; Python would complain again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lumen",
        description="Train PyTorch models as pure functions: what is done beside a training script.",
        epilog="Each command says more of itself, with examples: lumen COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"lumen {own_version() or 'from a source tree'}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (demo, doctor, plan, command, inspect, export, replay):
        module.add(commands)
    return parser
