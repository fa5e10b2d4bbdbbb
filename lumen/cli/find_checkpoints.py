"""Find the checkpoints that a path names: itself, those of a run, or those in a directory."""

from __future__ import annotations

import difflib
from pathlib import Path

from lumen.checkpoint.header import FILE
from lumen.errors import CheckpointNotFoundError

_SHOWN = 8


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint, intact or damaged."""
    return (path / FILE).is_file()


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of the run or store in `directory`, the newest last.

    Raises `CheckpointNotFoundError`, which names near matches, if there is none.
    """
    if not directory.exists():
        raise CheckpointNotFoundError(f"{directory} does not exist. {suggest_path(directory)}")
    subdirectory = directory / "checkpoints"
    root = subdirectory if subdirectory.is_dir() else directory
    paths = _checkpoints_in(root)
    if not paths:
        raise CheckpointNotFoundError(f"{root} is not a checkpoint and contains none. {_suggest_below(root)}")
    return sorted(paths, key=lambda path: (path.name.isdigit(), int(path.name) if path.name.isdigit() else path.name))


def resolve(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run there."""
    if is_checkpoint(path):
        return path
    paths = list_checkpoints(path)
    if len(paths) > 1 and not paths[-1].name.isdigit():
        raise CheckpointNotFoundError(f"{path} contains several checkpoints; pass one of them: {format_paths(paths)}.")
    return paths[-1]


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


def format_paths(paths: list[Path]) -> str:
    """The first few paths, and how many more there are."""
    shown = ", ".join(str(path) for path in paths[:_SHOWN])
    return shown + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")
