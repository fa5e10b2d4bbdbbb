"""`lumen plan`: what a run on many devices will hold, send and take, from one process."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumen.cli import command, parse_transforms, tables
from lumen.cli.entry_point import function
from lumen.core.order import CHAINS
from lumen.core.step import StepFn, Transform, as_step, compose
from lumen.errors import HyperparameterError, StepError
from lumen.parallel.ddp.ddp import ddp
from lumen.parallel.fsdp.fsdp import fsdp
from lumen.planner.dry_run import Make
from lumen.planner.plan import plan_loaded
from lumen.planner.roofline import DEVICES

_EXAMPLES = """\
  lumen plan train.py:make --mesh shard=64                  make() returns (step, state, batch)
  lumen plan train.py:make --world-size 1024 --mesh data=16,shard=64 -o plan.html
  lumen plan train.py:make --world-size 64 --strategy 'fsdp(stage=2)' --device a100"""
_STRATEGIES: dict[str, type[Transform]] = {"ddp": ddp, "fsdp": fsdp}
_FIGURES = {
    "memory": "bytes of the device",
    "bandwidth": "bytes per second of its memory",
    "flops": "floating point operations per second, of every dtype",
    "inside": "bytes per second from one device to another in its node",
    "between": "bytes per second from one device out of its node",
    "per-node": "devices to a node",
    "efficiency": "the share of flops and bandwidth that is reached, up to 1",
}


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = command.add(
        commands,
        "plan",
        help="say what a run on many devices will hold, send and take",
        description="Say how much memory a run on many devices will need on each, what they will send to each other,"
        "\nand how long a step will take, before there is any device: two steps are run on tensors without values, in a"
        "\nworld that is only thought of. Exit code 0 where the run fits on its devices, 1 where it does not.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "function",
        metavar="FILE.py:FUNCTION",
        help="returns (step, state, batch): the step with its transforms, its state before step.init, and the batch of"
        " one process",
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="how many processes; by default as the mesh says")
    parser.add_argument("--mesh", type=_mesh, metavar="shard=64,data=16", help="the axes, in place of the script's")
    parser.add_argument("--rank", type=int, default=0, help="which of the processes; by default 0")
    parser.add_argument("--strategy", metavar="'fsdp(stage=2)'", help="ddp or fsdp, in place of the step's own")
    parser.add_argument("--device", choices=tuple(DEVICES), default="h100", help="by default h100")
    for name, text in _FIGURES.items():
        parser.add_argument(f"--{name}", type=float, metavar="X", help=text)
    parser.add_argument(
        "-o", "--output", type=Path, action="append", default=[], metavar="FILE", help="a .html, .svg or .png as well"
    )
    parser.add_argument("--json", action="store_true", help="for a program to read")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Plan; returns the exit code."""
    figures = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in _FIGURES}
    found = plan_loaded(
        lambda: _made(options.function, options.strategy),
        world_size=options.world_size,
        mesh=options.mesh,
        rank=options.rank,
        device=options.device,
        **{name: value for name, value in figures.items() if value is not None},
    )
    if options.json:
        tables.as_json(found.numbers)
    else:
        print(tables.readable(str(found)))
    for path in options.output:
        _save(found.save, path)
    return 0 if found.fits else 1


def _save(save: Callable[[Path], None], path: Path) -> None:
    try:
        save(path)
    except ModuleNotFoundError as error:
        raise HyperparameterError(f"{path.name} needs a package: pip install {error.name}. Or write a .svg.") from error


def _made(text: str, strategy: str | None) -> Make:
    make = function(text, "lumen plan")

    def made() -> tuple[StepFn, Any, Any]:
        parts = make()
        if not isinstance(parts, tuple) or len(parts) != 3:
            got = f"a tuple of {len(parts)}" if isinstance(parts, tuple) else type(parts).__name__
            raise StepError(f"{text} must return (step, state, batch) for a plan, but returned {got}.")
        step, state, batch = parts
        return (step if strategy is None else _under(step, strategy)), state, batch

    return made


def _under(step: StepFn, strategy: str) -> StepFn:
    """The step under another parallel transform."""
    try:
        kind, args, kwargs = parse_transforms.parsed(
            f"lm.{strategy if '(' in strategy else f'{strategy}()'}", _STRATEGIES
        )
    except (ValueError, SyntaxError) as error:
        raise StepError(
            f"--strategy takes {', '.join(_STRATEGIES)}, such as 'fsdp(stage=2)', not {strategy!r}."
        ) from error
    whole = as_step(step)
    others = [each for each in whole.transforms if each.level != "parallel"]
    before = CHAINS[0][: CHAINS[0].index("parallel")]
    outside = [each for each in others if each.level in before]
    return compose(*outside, kind(*args, **kwargs), *(each for each in others if each not in outside))(whole.user)


def _mesh(text: str) -> dict[str, int]:
    try:
        axes = dict(part.split("=") for part in text.split(","))
        return {name.strip(): int(size) for name, size in axes.items()}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must name axes and sizes: shard=64,data=16") from None
