"""`lumen export`: write the tensors of a checkpoint to a file that other programs read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lumen import checkpoint
from lumen.cli import command, find_checkpoints, locations, tables
from lumen.core.inspect import human_bytes
from lumen.errors import CheckpointError

_EXAMPLES = """\
  lumen export runs/a --to safetensors               params.safetensors of the newest checkpoint
  lumen export runs/a --best --to safetensors        those of the best, by the metric that the run monitors
  lumen export runs/a/checkpoints/500 --to torch     params.pt, for torch.load(weights_only=True)
  lumen export runs/a --to safetensors --what ema -o model.safetensors
                                                     the averaged params of lm.ema"""
_SUFFIX = {"safetensors": ".safetensors", "torch": ".pt"}


def add(commands: Any) -> None:
    """Register the command."""
    parser = command.add(
        commands,
        "export",
        help="write tensors of a checkpoint to a file",
        description="Write tensors of a checkpoint, or of the newest or best checkpoint of a run, to a file that other"
        "\nprograms read: one flat dict with the module's names. The file must not exist.",
        examples=_EXAMPLES,
    )
    parser.add_argument("path", type=locations.location, help="a checkpoint, or a run's directory, or the URL of one")
    parser.add_argument("--to", choices=tuple(_SUFFIX), required=True, help="the format")
    parser.add_argument("--what", choices=("params", "ema", "buffers", "state"), default="params", help="which tensors")
    parser.add_argument(
        "-o", "--output", type=locations.local, metavar="FILE", help="the file (default: WHAT.safetensors or WHAT.pt)"
    )
    find_checkpoints.add_best(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export; returns the exit code."""
    path = find_checkpoints.choose(options.path, options)
    target = options.output or Path(options.what + _SUFFIX[options.to])
    try:
        written = checkpoint.export(path, target, format=options.to, what=options.what)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"--to {options.to} needs {error.name}: pip install {error.name}. Or use --to torch."
        ) from error
    size = human_bytes(written.stat().st_size)
    print(tables.escape(f"wrote {options.what} of {path} to {written} ({size})"))
    return 0
