"""`lumen inspect`: what a checkpoint, or the checkpoints of a run, hold."""

from __future__ import annotations

import argparse
import datetime as dt
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen import checkpoint
from lumen.checkpoint import dtypes, header
from lumen.checkpoint._load import Reader
from lumen.checkpoint.leaves import ARRAYS, name_of
from lumen.cli import command, find_checkpoints, tables
from lumen.core.inspect import human_bytes
from lumen.errors import CheckpointError, printable

_HIDDEN = ("timers", "journal", "callbacks", "batch", "kind")  # of use to a program: see --json
_ARRAY = "shape"
_EXAMPLES = """\
  lumen inspect runs/a                               the checkpoints of a run, with their metrics
  lumen inspect runs/a/checkpoints/500               one of them
  lumen inspect runs/a --values params/head.weight   numbers, of the newest
  lumen inspect runs/a --verify                      read everything, and check it"""
_PACKED = {
    getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)
}  # torch has no operations on them


def add(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = command.add(
        commands,
        "inspect",
        help="show what a checkpoint, or a run's checkpoints, hold",
        description="Show the checkpoints of a run, or of one checkpoint its header (when and by what it was written,"
        "\nmetrics, configuration, commit) and its leaves. Nothing is loaded but what is shown, and no pickle is read."
        "\nExit code 1 where something is damaged.",
        examples=_EXAMPLES,
    )
    parser.add_argument("path", type=Path, help="a checkpoint, a run's directory, or a directory of checkpoints")
    parser.add_argument("--values", metavar="NAME", help="show the values of this leaf, or of all below this name")
    parser.add_argument("--verify", action="store_true", help="read everything, and check it against its digests")
    parser.add_argument("--json", action="store_true", help="for a program to read")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show it; returns the exit code."""
    path: Path = options.path
    if options.values is not None:
        return _values(find_checkpoints.one(path), options.values, options.json)
    if find_checkpoints.is_checkpoint(path):
        return _checkpoint(path, options.json, options.verify)
    return _directory(path, options.json, options.verify)


# ------------------------------------------------------------------------------------------- one checkpoint


def described(path: Path) -> dict[str, Any]:
    """All that is known of a checkpoint without reading its arrays, as JSON has it."""
    known = checkpoint.metadata(path)
    leaves, extra = ({n: _sized(leaf) for n, leaf in known.pop(item).items()} for item in ("leaves", "extra"))
    files = Reader(path).header.files
    size = sum(size for size, _ in files.values()) + (path / header.FILE).stat().st_size
    totals = {"bytes": size, "files": len(files) + 1, "parts": _parts(leaves)}
    return {"kind": "checkpoint", "path": str(path), **known, **totals, "leaves": leaves, "extra": extra}


def _sized(leaf: Mapping[str, Any]) -> dict[str, Any]:
    if _ARRAY not in leaf:
        return dict(leaf)
    return {**leaf, "bytes": math.prod(leaf["shape"]) * dtypes.itemsize(leaf["dtype"])}


def _parts(leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Leaves, elements and bytes of each part: params, opt_state, slots/ema …"""
    parts: dict[str, dict[str, int]] = {}
    for name, leaf in leaves.items():
        part = parts.setdefault(_part(name), {"leaves": 0, "elements": 0, "bytes": 0})
        part["leaves"] += 1
        if _ARRAY in leaf:
            part["elements"] += math.prod(leaf["shape"])
            part["bytes"] += leaf["bytes"]
    return parts


def _part(name: str) -> str:
    words = name.split("/")
    start = 1 if words[0] == "state" and len(words) > 1 else 0
    return "/".join(words[: start + (2 if words[start] == "slots" else 1)])


def _checkpoint(path: Path, as_json: bool, verify: bool) -> int:
    found = described(path)
    if verify:
        verified(path)
        found["verified"] = True
    if as_json:
        tables.as_json(found)
        return 0
    print(tables.readable(found["path"]))
    tables.facts(summary(found))
    print()
    leaves(found)
    return 0


def summary(found: Mapping[str, Any]) -> dict[str, str]:
    """What is to be said of a checkpoint besides its leaves."""
    versions = {name: found[name] for name in ("lumen", "torch", "orbax") if found.get(name) not in (None, "unknown")}
    lines = {
        "written": f"{_time(found.get('time'))} by {tables.one_line(versions)}",
        "size": f"{human_bytes(found['bytes'])} in {found['files']} files",
    }
    if found.get("verified"):
        lines["verified"] = "every file is as it was written"
    if found.get("metrics"):
        lines["metrics"] = tables.one_line(found["metrics"])
    meta = found.get("meta")
    journal = meta.get("journal") if isinstance(meta, dict) else None
    if isinstance(journal, dict) and journal.get("metrics") not in (None, {}, found.get("metrics")):
        lines["newest metrics"] = tables.one_line(journal["metrics"])
    if isinstance(meta, dict):
        told = {name: value for name, value in meta.items() if name not in _HIDDEN and value not in (None, {}, [])}
        lines |= {name: tables.one_line(value) for name, value in told.items()}
    return lines


def leaves(found: Mapping[str, Any]) -> None:
    """The table of all leaves, and that of the parts they make up."""
    rows = [_leaf_row(name, leaf) for name, leaf in found["leaves"].items()]
    tables.table(("name", "dtype", "shape", "bytes"), rows, right=("bytes",))
    print()
    parts = [
        (name, str(part["leaves"]), f"{part['elements']:,}", human_bytes(part["bytes"]))
        for name, part in found["parts"].items()
    ]
    extra = _parts({f"extra/{name}": leaf for name, leaf in found["extra"].items()}).get("extra")
    if extra:
        parts.append(("(extra)", str(extra["leaves"]), f"{extra['elements']:,}", human_bytes(extra["bytes"])))
    tables.table(("part", "leaves", "elements", "bytes"), parts, right=("leaves", "elements", "bytes"))


def _leaf_row(name: str, leaf: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if _ARRAY in leaf:
        return name, leaf["dtype"], str(list(leaf["shape"])), human_bytes(leaf["bytes"])
    value = "" if leaf["kind"] in ("empty", "none") else tables.one_line(str(leaf["value"]))
    return name, leaf["kind"], value, ""


def _time(text: Any) -> str:
    try:
        return dt.datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S %Z")
    except (TypeError, ValueError):
        return "at an unknown time"


def verified(path: Path) -> None:
    """Read every file of a checkpoint; raises `CorruptCheckpointError` where one is not as it was written."""
    for item in header.ITEMS:
        reader = Reader(path, item)
        reader.read(reader.rows, lambda row, value: None)


def not_finite(path: Path) -> dict[str, str]:
    """How many elements of which leaves of the state are no numbers, or infinite; those that have none are left out."""
    reader = Reader(path)
    rows = [row for row in reader.rows if row.kind in ARRAYS]
    counts = reader.read(rows, lambda row, value: int((~_wide(value).isfinite()).sum()))
    bad = {name_of(row.path): (count, math.prod(row.shape)) for row, count in zip(rows, counts, strict=True) if count}
    return {name: f"{count} of {size}" for name, (count, size) in bad.items()}


# -------------------------------------------------------------------------------------------------- a run


def _directory(path: Path, as_json: bool, verify: bool) -> int:
    rows = [_line(each, verify) for each in find_checkpoints.checkpoints(path)]
    whole = [row for row in rows if "damaged" not in row and row["step"] is not None]
    for row in whole[-1:]:
        row["newest"] = True
    if as_json:
        tables.as_json({"kind": "run", "path": str(path), "checkpoints": rows})
    else:
        cells = [(row["name"], _time(row.get("time")), _size(row), _remark(row)) for row in rows]
        tables.table(("checkpoint", "written", "bytes", "metrics"), cells, right=("checkpoint", "bytes"))
    return 1 if any("damaged" in row for row in rows) else 0


def _line(path: Path, verify: bool) -> dict[str, Any]:
    known: dict[str, Any] = {
        "name": path.name,
        "path": str(path),
        "step": int(path.name) if path.name.isdigit() else None,
    }
    try:
        found = described(path)
        if verify:
            verified(path)
    except CheckpointError as error:
        return {**known, "damaged": str(error)}
    return {**known, **{name: found.get(name) for name in ("time", "bytes", "metrics")}}


def _size(row: Mapping[str, Any]) -> str:
    return human_bytes(row["bytes"]) if "bytes" in row else ""


def _remark(row: Mapping[str, Any]) -> str:
    if "damaged" in row:
        return tables.one_line(row["damaged"])
    said = tables.one_line(row["metrics"]) if row["metrics"] else ""
    return f"{said} (newest)".strip() if row.get("newest") else said


# ------------------------------------------------------------------------------------------------- values


def _values(path: Path, name: str, as_json: bool) -> int:
    found = {full: _bytes(value) for full, value in _flat(checkpoint.load(path, under=name), name).items()}
    if as_json:
        tables.as_json(found)
        return 0
    for each, value in found.items():
        if isinstance(value, Tensor | np.ndarray | np.generic):
            tensor = value if isinstance(value, Tensor) else _as_tensor(value)
            print(f"{printable(each)}: {_range(tensor)}")
            print(value if isinstance(value, Tensor) else repr(value))
        else:
            print(f"{printable(each)}: {tables.one_line(str(value))}")
    return 0


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {full: leaf for key, each in value.items() for full, leaf in _flat(each, f"{name}/{key}").items()}


def _as_tensor(value: Any) -> Tensor:
    try:
        return torch.from_numpy(np.array(value))
    except TypeError:  # a dtype of machine learning, such as bfloat16
        return torch.from_numpy(np.array(value, dtype=np.float32))


def _bytes(value: Any) -> Any:
    """A packed tensor as its bytes, anything else as it is."""
    return value.view(torch.uint8) if isinstance(value, Tensor) and value.dtype in _PACKED else value


def _wide(tensor: Tensor) -> Tensor:
    """The numbers in a dtype that has every operation."""
    tensor = _bytes(tensor)
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


def _range(tensor: Tensor) -> str:
    text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.is_complex() or not tensor.numel():
        return text
    wide = _wide(tensor).flatten()
    finite = wide[wide.isfinite()]
    if finite.numel():
        text += f", from {finite.min():.6g} to {finite.max():.6g}, mean {finite.mean():.6g}"
    bad = wide.numel() - finite.numel()
    return f"{text}, {bad} not finite" if bad else text
