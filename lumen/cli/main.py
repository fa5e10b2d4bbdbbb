"""The command `lumen`: its arguments and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lumen.cli import demo, export, hang, inspect, plan, replay
from lumen.cli.doctor import doctor
from lumen.cli.plot import command
from lumen.cli.tables import escape
from lumen.core.versions import own_version
from lumen.errors import LumenError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of this process); returns the exit code.

    0 is success, 1 a failure, damage or a replayed step that fails again, 2 a wrong command line. Without a command it
    lists the commands.

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
    if options.command is None:
        parser.print_help()
        return 0
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except LumenError as error:
        print(f"lumen {options.command}: {escape(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `lumen inspect … | head`; Python would print another error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lumen",
        description="Train PyTorch models as pure functions: tools around a training script.",
        epilog="For the options and examples of a command: lumen COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"lumen {own_version() or 'from a source tree'}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (demo, doctor, plan, command, inspect, export, replay, hang):
        module.add(commands)
    return parser
