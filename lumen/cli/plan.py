"""`lumen plan`: predict memory, communication and step time of a run on many devices, from one process."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumen.cli import command, locations, parse_transforms, tables
from lumen.cli.entry_point import load_function
from lumen.core.order import CHAINS
from lumen.core.step import StepFn, Transform, as_step, compose
from lumen.errors import HyperparameterError, StepError
from lumen.parallel.ddp.ddp import ddp
from lumen.parallel.fsdp.fsdp import fsdp
from lumen.planner.dry_run import MakeRun
from lumen.planner.plan import plan_loaded
from lumen.planner.roofline import DEVICES

_EXAMPLES = """\
  lumen plan train.py:make --mesh shard=64                  make() returns (step, state, batch)
  lumen plan train.py:make --world-size 1024 --mesh data=16,shard=64 -o plan.html
  lumen plan train.py:make --world-size 64 --strategy 'fsdp(stage=2)' --device a100"""
_STRATEGIES: dict[str, type[Transform]] = {"ddp": ddp, "fsdp": fsdp}
_FIGURES = {
    "memory": "device memory in bytes",
    "bandwidth": "memory bandwidth in bytes per second",
    "flops": "floating-point operations per second, for every dtype",
    "inside": "bandwidth between devices of a node, in bytes per second per device",
    "between": "bandwidth between nodes, in bytes per second per device",
    "per-node": "devices per node",
    "efficiency": "the achieved fraction of flops and bandwidth, up to 1",
}


def add(commands: Any) -> None:
    """Register the command."""
    parser = command.add(
        commands,
        "plan",
        help="predict memory, communication and step time of a run on many devices",
        description="Predict how much memory a run on many devices needs per device, what the devices communicate, and"
        "\nhow long a step takes, without any device: two steps run on fake tensors in a simulated world."
        "\nExit code 0 if the run fits on its devices, 1 if it does not.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "function",
        metavar="FILE.py:FUNCTION",
        help="returns (step, state, batch): the step with its transforms, its state before step.init, and the batch of"
        " one process",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="number of processes (default: the size of the mesh)"
    )
    parser.add_argument("--mesh", type=_mesh, metavar="shard=64,data=16", help="the mesh axes, instead of the script's")
    parser.add_argument("--rank", type=int, default=0, help="the rank to plan for (default: 0)")
    parser.add_argument("--strategy", metavar="'fsdp(stage=2)'", help="ddp or fsdp, instead of the step's own")
    parser.add_argument("--device", choices=tuple(DEVICES), default="h100", help="type of the devices (default: h100)")
    for name, text in _FIGURES.items():
        parser.add_argument(f"--{name}", type=float, metavar="X", help=text)
    parser.add_argument(
        "-o",
        "--output",
        type=locations.local,
        action="append",
        default=[],
        metavar="FILE",
        help="also write a .html, .svg or .png file",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Plan; returns the exit code."""
    figures = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in _FIGURES}
    plan = plan_loaded(
        lambda: _make_fn(options.function, options.strategy),
        world_size=options.world_size,
        mesh=options.mesh,
        rank=options.rank,
        device=options.device,
        **{name: value for name, value in figures.items() if value is not None},
    )
    if options.json:
        tables.print_json(plan.numbers)
    else:
        print(tables.escape(str(plan)))
    for path in options.output:
        _save(plan.save, path)
    return 0 if plan.fits else 1


def _save(save: Callable[[Path], None], path: Path) -> None:
    try:
        save(path)
    except ModuleNotFoundError as error:
        raise HyperparameterError(
            f"{path.name} needs {error.name}: pip install {error.name}. Or write a .svg file."
        ) from error


def _make_fn(text: str, strategy: str | None) -> MakeRun:
    load = load_function(text, "lumen plan")

    def make() -> tuple[StepFn, Any, Any]:
        result = load()
        if not isinstance(result, tuple) or len(result) != 3:
            actual = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
            raise StepError(f"{text} must return (step, state, batch) for a plan, but returned {actual}.")
        step, state, batch = result
        return (step if strategy is None else _with_strategy(step, strategy)), state, batch

    return make


def _with_strategy(step: StepFn, strategy: str) -> StepFn:
    """The step with its parallel transform replaced."""
    try:
        kind, args, kwargs = parse_transforms.parse_call(
            f"lm.{strategy if '(' in strategy else f'{strategy}()'}", _STRATEGIES
        )
    except (ValueError, SyntaxError) as error:
        raise StepError(
            f"--strategy takes {', '.join(_STRATEGIES)}, such as 'fsdp(stage=2)', got {strategy!r}."
        ) from error
    composed = as_step(step)
    transforms = [t for t in composed.transforms if t.level != "parallel"]
    outer_levels = CHAINS[0][: CHAINS[0].index("parallel")]
    outer = [t for t in transforms if t.level in outer_levels]
    return compose(*outer, kind(*args, **kwargs), *(t for t in transforms if t not in outer))(composed.user)


def _mesh(text: str) -> dict[str, int]:
    try:
        axes = dict(axis.split("=") for axis in text.split(","))
        return {name.strip(): int(size) for name, size in axes.items()}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must name axes and sizes: shard=64,data=16") from None
