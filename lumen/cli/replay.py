"""`lumen replay`: a step that `lm.guard("dump")` wrote, done again."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumen.cli import command, find_checkpoints, inspect, parse_transforms, tables
from lumen.cli.entry_point import made_by
from lumen.core.metrics import compute_metrics
from lumen.core.step import Step, as_step, compose
from lumen.errors import NonFiniteError
from lumen.train.replay import described, replay
from lumen.transforms._compile import compile as compiled

_EXAMPLES = """\
  lumen replay dumps/step-7                       what is in the dump, and what to write to do it again
  lumen replay dumps/step-7 --run train.py:make   do it again; make() returns (step, state)
  lumen replay dumps/step-7 --run train.py:make --anomaly
                                                  name the operation whose gradient became NaN first"""
_HOW = """\
To do the step again, give a function that returns it with a fresh state of the same form:

    def make():
        return step, lm.TrainState.create(model, tx)

    lumen replay {path} --run {place}:make
"""


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = command.add(
        commands,
        "replay",
        help='do a step again that lm.guard("dump") wrote',
        description="Show a step that became non-finite, or do it again alone with --run: with the same state, batch"
        "\nand random numbers. Exit code 1 while it fails, 0 once it is mended.",
        examples=_EXAMPLES,
    )
    parser.add_argument("path", type=Path, metavar="DUMP", help='what lm.guard("dump") wrote')
    parser.add_argument(
        "--run",
        dest="function",
        metavar="FILE.py:FUNCTION",
        help="returns (step, state), or (step, state, batch) for a batch of a type of its own; a plain step gets the"
        " transforms named in the dump",
    )
    parser.add_argument(
        "--anomaly",
        action="store_true",
        help="with torch's anomaly detection, and not compiled: names the operation whose gradient is NaN first",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the dump, or do the step again; returns the exit code."""
    path = find_checkpoints.one(options.path)
    told = described(path)
    if options.function is None:
        return _shown(path, told)
    step, state, batch = made_by(options.function)
    step = _composed(as_step(step), told["transforms"])
    if options.anomaly:
        step = compose(*(t for t in step.transforms if not isinstance(t, compiled)))(step.user)
    try:
        with torch.autograd.set_detect_anomaly(True) if options.anomaly else contextlib.nullcontext():
            _, metrics = replay(path, step, state, batch=batch)
    except NonFiniteError as error:
        return _failed(str(error), told["message"])
    except RuntimeError as error:
        # Anomaly detection has no error of its own; it has printed where the operation was called.
        if not options.anomaly or "returned nan values" not in str(error):
            raise
        print(f"the step failed: {tables.readable(str(error))}")
        print(f"The dump was written for what came of it: {tables.readable(told['message'])}")
        return 1
    print("the step succeeded")
    tables.facts(_numbers(metrics))
    return 0


def _failed(message: str, before: str) -> int:
    print(f"the step failed: {tables.readable(message)}")
    if message == before:
        print("This is the failure that the dump was written for.")
    else:
        print(f"The dump was written for another: {tables.readable(before)}")
    return 1


def _shown(path: Path, told: Mapping[str, Any]) -> int:
    found = inspect.described(path)
    print(tables.readable(f"{path}: a step that failed"))
    tables.facts(
        {
            "failure": tables.one_line(told["message"]),
            "function": tables.one_line(told["function"]),
            "transforms": tables.one_line(", ".join(told["transforms"])),
            "batch": "plain data" if told["batch"] is not None else "of a type of its own: return it as well",
            "not finite": tables.one_line(inspect.not_finite(path)),
            **inspect.summary({**found, "meta": None}),
        }
    )
    print()
    inspect.leaves(found)
    module = told["function"].partition(":")[0]
    place = "FILE.py" if module in ("__main__", "?") else module
    print()
    print(tables.readable(_HOW.format(path=path, place=place)), end="")
    return 0


def _composed(step: Step, texts: list[str]) -> Step:
    """The step under the transforms of the dump; its own where it has some."""
    if not step.transforms:
        return compose(*parse_transforms.transforms(texts))(step.user)
    own = [repr(transform) for transform in step.transforms]
    if own != texts:
        print(tables.readable(f"note: the dump names {', '.join(texts)}; this runs {', '.join(own)}"), file=sys.stderr)
    return step


def _numbers(metrics: Any) -> dict[str, str]:
    values = compute_metrics(metrics) if isinstance(metrics, dict) else {"metrics": metrics}
    return {str(name): tables.one_line(_number(value)) for name, value in values.items()}


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not value.is_complex() else str(value)
    return value if isinstance(value, int | float | str | None) else str(value)
