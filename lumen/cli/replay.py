"""`lumen replay`: replay a step that `lm.guard("dump")` wrote."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumen.cli import command, find_checkpoints, inspect, locations, parse_transforms, tables
from lumen.cli.entry_point import load_step
from lumen.core.metrics import compute_metrics
from lumen.core.step import Step, as_step, compose
from lumen.errors import NonFiniteError, SpikeError
from lumen.train.replay import read_description as describe_dump
from lumen.train.replay import replay
from lumen.transforms._compile import compile as compiled

_EXAMPLES = """\
  lumen replay dumps/step-7                       the contents of the dump, and how to replay it
  lumen replay dumps/step-7 --run train.py:make   replay it; make() returns (step, state)
  lumen replay dumps/step-7 --run train.py:make --anomaly
                                                  name the first operation whose gradient is NaN"""
_HOW = """\
To replay the step, pass a function that returns it with a new state of the same structure:

    def make():
        return step, lm.TrainState.create(model, tx)

    lumen replay {path} --run {source}:make
"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = command.add(
        commands,
        "replay",
        help='replay a step that lm.guard("dump") wrote',
        description="Show a step that became non-finite, or replay it with --run, with the same state, batch and random"
        "\nnumbers. Exit code 1 while the step fails, 0 once it is fixed.",
        examples=_EXAMPLES,
    )
    parser.add_argument("path", type=locations.local, metavar="DUMP", help='what lm.guard("dump") wrote')
    parser.add_argument(
        "--run",
        dest="function",
        metavar="FILE.py:FUNCTION",
        help="returns (step, state), or (step, state, batch) if the batch has a custom type; a plain step gets the"
        " transforms named in the dump",
    )
    parser.add_argument(
        "--anomaly",
        action="store_true",
        help="use torch's anomaly detection, without compiling: names the first operation whose gradient is NaN",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the dump, or replay the step; returns the exit code."""
    path = find_checkpoints.resolve(options.path)
    dump = describe_dump(path)
    if options.function is None:
        return _show(path, dump)
    step, state, batch = load_step(options.function)
    step = _with_transforms(as_step(step), dump["transforms"])
    if options.anomaly:
        step = compose(*(t for t in step.transforms if not isinstance(t, compiled)))(step.user)
    try:
        with torch.autograd.set_detect_anomaly(True) if options.anomaly else contextlib.nullcontext():
            _, metrics = replay(path, step, state, batch=batch)
    except (NonFiniteError, SpikeError) as error:
        return _report_failure(str(error), dump["message"])
    except RuntimeError as error:
        # Anomaly detection raises a plain RuntimeError; it has printed where the operation was called.
        if not options.anomaly or "returned nan values" not in str(error):
            raise
        print(f"the step failed: {tables.escape(str(error))}")
        print(f"The dump was written for the resulting failure: {tables.escape(dump['message'])}")
        return 1
    print("the step succeeded")
    tables.print_fields(_numbers(metrics))
    return 0


def _report_failure(message: str, recorded: str) -> int:
    print(f"the step failed: {tables.escape(message)}")
    if message == recorded:
        print("This is the failure that the dump was written for.")
    else:
        print(f"The dump was written for another failure: {tables.escape(recorded)}")
    return 1


def _show(path: Path | str, dump: Mapping[str, Any]) -> int:
    info = inspect.describe(path)
    print(tables.escape(f"{path}: a step that failed"))
    tables.print_fields(
        {
            "failure": tables.one_line(dump["message"]),
            "function": tables.one_line(dump["function"]),
            "transforms": tables.one_line(", ".join(dump["transforms"])),
            "batch": "plain data" if dump["batch"] is not None else "of a custom type: return it as well",
            "not finite": tables.one_line(inspect.count_nonfinite(path)),
            **inspect.summary({**info, "meta": None}),
        }
    )
    print()
    inspect.print_leaves(info)
    module = dump["function"].partition(":")[0]
    source = "FILE.py" if module in ("__main__", "?") else module
    print()
    print(tables.escape(_HOW.format(path=path, source=source)), end="")
    return 0


def _with_transforms(step: Step, recorded: list[str]) -> Step:
    """The step with its own transforms, or with those of the dump if it has none."""
    if not step.transforms:
        return compose(*parse_transforms.parse(recorded))(step.user)
    actual = [repr(transform) for transform in step.transforms]
    if actual != recorded:
        print(
            tables.escape(f"note: the dump names {', '.join(recorded)}; this step has {', '.join(actual)}"),
            file=sys.stderr,
        )
    return step


def _numbers(metrics: Any) -> dict[str, str]:
    values = compute_metrics(metrics) if isinstance(metrics, dict) else {"metrics": metrics}
    return {str(name): tables.one_line(_number(value)) for name, value in values.items()}


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not value.is_complex() else str(value)
    return value if isinstance(value, int | float | str | None) else str(value)
