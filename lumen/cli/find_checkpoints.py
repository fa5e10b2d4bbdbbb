"""Find the checkpoints that a path names: itself, those of a run, or those in a directory."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumen import checkpoint
from lumen.checkpoint import step_metrics
from lumen.checkpoint.header import FILE
from lumen.checkpoint.retention import Retention
from lumen.checkpoint.upload import exists
from lumen.core.urls import basename
from lumen.errors import CheckpointError, CheckpointNotFoundError
from lumen.train.history import better

_SHOWN = 8


def is_checkpoint(path: Path | str) -> bool:
    """Whether `path` is a checkpoint, intact or damaged."""
    return exists(path) if isinstance(path, str) else (path / FILE).is_file()


def step_of(path: Path | str) -> int | None:
    """The step in the name of a checkpoint of a run; None if it is named otherwise."""
    number, _, rest = basename(path).partition(".")  # at a URL, 12.1 replaces 12
    return int(number) if number.isdigit() and (not rest or (isinstance(path, str) and rest.isdigit())) else None


def list_checkpoints(directory: Path | str) -> list[Path | str]:
    """The checkpoints of the run or store in `directory`, the newest last.

    Raises `CheckpointNotFoundError`, which names near matches on a disk, if there is none.
    """
    if isinstance(directory, str):
        return _checkpoints_at(directory)
    if not directory.exists():
        raise CheckpointNotFoundError(f"{directory} does not exist. {suggest_path(directory)}")
    subdirectory = directory / "checkpoints"
    root = subdirectory if subdirectory.is_dir() else directory
    paths = _checkpoints_in(root)
    if not paths:
        raise CheckpointNotFoundError(f"{root} is not a checkpoint and contains none. {_suggest_below(root)}")
    paths.sort(key=lambda path: (path.name.isdigit(), int(path.name) if path.name.isdigit() else path.name))
    return [*paths]


def _checkpoints_at(url: str) -> list[Path | str]:
    for store in (checkpoint.Store(f"{url}/checkpoints"), checkpoint.Store(url)):
        if steps := store.steps():
            return [store.path(step) for step in steps]
    raise CheckpointNotFoundError(f"{url} is not a checkpoint and contains none.")


def resolve(path: Path | str) -> Path | str:
    """The checkpoint at `path`, or the newest of the run there."""
    if is_checkpoint(path):
        return path
    paths = list_checkpoints(path)
    if len(paths) > 1 and step_of(paths[-1]) is None:
        raise CheckpointNotFoundError(f"{path} contains several checkpoints; pass one of them: {format_paths(paths)}.")
    return paths[-1]


def add_best(parser: argparse.ArgumentParser) -> None:
    """Register the options of `choose`."""
    parser.add_argument("--best", action="store_true", help="the best checkpoint of a run instead of the newest")
    parser.add_argument("--monitor", metavar="METRIC", help="the best by this metric (default: the Checkpointer's)")
    parser.add_argument("--mode", choices=("min", "max"), help="whether the lowest or the highest value is the best")


def choose(path: Path | str, options: argparse.Namespace) -> Path | str:
    """The checkpoint at `path`, or of the run there the best if the options ask for it, else the newest."""
    if not (options.best or options.monitor):
        return resolve(path)
    return path if is_checkpoint(path) else _best(path, options.monitor, options.mode)


def _best(directory: Path | str, monitor: str | None, mode: str | None) -> Path | str:
    headers = {path: header for path in list_checkpoints(directory) if (header := _header(path)) is not None}
    recorded: Mapping[str, str] = {}
    for header in headers.values():
        meta = header.get("meta")
        recorded = meta.get("monitor", recorded) if isinstance(meta, dict) else recorded
    monitor = monitor or recorded.get("metric")
    by_path = {path: step_metrics.from_json(header.get("metrics")) for path, header in headers.items()}
    names = sorted({name for metrics in by_path.values() for name in metrics})
    if monitor not in names:
        what = "the run names no metric to choose by" if monitor is None else f"none was saved with {monitor!r}"
        known = (
            f"Write --monitor NAME, with one of {', '.join(names)}." if names else "They were saved without metrics."
        )
        raise CheckpointNotFoundError(f"{directory} has no best checkpoint: {what}. {known}")
    mode = mode or better(monitor, {recorded["metric"]: recorded["mode"]} if recorded else {})
    if mode is None:
        raise CheckpointError(
            f"whether a low or a high {monitor} is better is unknown: write --mode min or --mode max."
        )
    paths = list(by_path)
    ranked = Retention(monitor=monitor, mode=mode).ranked(dict(enumerate(by_path.values())))
    if not ranked:
        raise CheckpointNotFoundError(f"{directory} has no best checkpoint: {monitor!r} is NaN in all of them.")
    return paths[ranked[0]]


def _header(path: Path | str) -> dict[str, Any] | None:
    try:
        return checkpoint.metadata(path)
    except CheckpointError:  # a damaged one
        return None


def _checkpoints_in(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if not path.name.startswith(".") and is_checkpoint(path)]


def suggest_path(path: Path) -> str:
    """Suggest directories with a similar name."""
    parent = next(p for p in path.absolute().parents if p.is_dir())
    names = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    name = path.absolute().relative_to(parent).parts[0]
    matches = difflib.get_close_matches(name, names, n=3)
    if matches:
        return f"Did you mean {', '.join(matches)}?"
    return f"{parent} contains {', '.join(names[:_SHOWN])}." if names else f"{parent} contains no directories."


def _suggest_below(directory: Path) -> str:
    """Suggest runs and checkpoints up to three levels down."""
    if not directory.is_dir():
        return "A checkpoint is a directory."
    headers = [path for pattern in ("*/checkpoints/*", "*/*") for path in directory.glob(f"{pattern}/{FILE}")]
    directories = {path.parents[2] for path in headers if not path.parents[1].name.startswith(".")}
    candidates = sorted({path.parent if path.name == "checkpoints" else path for path in directories})
    if candidates:
        return f"There are some in {format_paths(candidates)}."
    return "Pass a run's directory or one of its checkpoints."


def format_paths(paths: Sequence[Path | str]) -> str:
    """The first few paths, and how many more there are."""
    shown = ", ".join(str(path) for path in paths[:_SHOWN])
    return shown + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
