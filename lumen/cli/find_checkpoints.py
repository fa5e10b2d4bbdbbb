"""Which checkpoints a path stands for: itself, those of a run, or those that lie beside each other in a directory."""

from __future__ import annotations

import difflib
from pathlib import Path

from lumen.checkpoint.header import FILE
from lumen.errors import CheckpointNotFoundError

_SHOWN = 8


def is_checkpoint(path: Path) -> bool:
    """Whether there is a checkpoint, sound or damaged, at `path`."""
    return (path / FILE).is_file()


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of the run, or the store, in `directory`, the newest last.

    Raises `CheckpointNotFoundError`, saying what is there instead, where there is none.
    """
    if not directory.exists():
        raise CheckpointNotFoundError(f"{directory} does not exist. {beside(directory)}")
    inner = directory / "checkpoints"
    place = inner if inner.is_dir() else directory
    found = _within(place)
    if not found:
        raise CheckpointNotFoundError(f"{place} is no checkpoint, and there is none in it. {_below(place)}")
    return sorted(found, key=lambda path: (path.name.isdigit(), int(path.name) if path.name.isdigit() else path.name))


def one(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run there."""
    if is_checkpoint(path):
        return path
    found = checkpoints(path)
    if len(found) > 1 and not found[-1].name.isdigit():
        raise CheckpointNotFoundError(f"{path} holds several checkpoints; give one: {listed(found)}.")
    return found[-1]


def _within(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return [each for each in place.iterdir() if not each.name.startswith(".") and is_checkpoint(each)]


def beside(path: Path) -> str:
    """What a reader may have meant."""
    parent = next(each for each in path.absolute().parents if each.is_dir())
    names = sorted(each.name for each in parent.iterdir() if each.is_dir() and not each.name.startswith("."))
    wanted = path.absolute().relative_to(parent).parts[0]
    near = difflib.get_close_matches(wanted, names, n=3)
    if near:
        return f"Did you mean {', '.join(near)}?"
    return f"There is {', '.join(names[:_SHOWN])} in {parent}." if names else f"{parent} has no directories."


def _below(place: Path) -> str:
    """Runs and checkpoints a little further down."""
    if not place.is_dir():
        return "A checkpoint is a directory."
    levels = [each for pattern in ("*/checkpoints/*", "*/*") for each in place.glob(f"{pattern}/{FILE}")]
    holders = {each.parents[2] for each in levels if not each.parents[1].name.startswith(".")}
    found = sorted({each.parent if each.name == "checkpoints" else each for each in holders})
    return f"There are some in {listed(found)}." if found else "A run's directory or one of its checkpoints is wanted."


def listed(paths: list[Path]) -> str:
    """Some of them, and how many more there are."""
    shown = ", ".join(str(path) for path in paths[:_SHOWN])
    return shown + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
