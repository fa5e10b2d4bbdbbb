"""`lumen inspect`: show the contents of a checkpoint, or the checkpoints of a run."""

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
from lumen.cli import command, find_checkpoints, locations, tables
from lumen.core.inspect import human_bytes
from lumen.core.urls import basename
from lumen.errors import CheckpointError, printable

_HIDDEN = ("timers", "journal", "callbacks", "batch", "kind")  # shown by --json only
_ARRAY = "shape"
_EXAMPLES = """\
  lumen inspect runs/a                               the checkpoints of a run, with their metrics
  lumen inspect runs/a/checkpoints/500               one checkpoint
  lumen inspect runs/a --best                        the best checkpoint of a run
  lumen inspect runs/a --values params/head.weight   values in the newest checkpoint
  lumen inspect runs/a --verify                      check every file against its digest"""
_PACKED = {
    getattr(torch, name) for name in ("float4_e2m1fn_x2",) if hasattr(torch, name)
}  # torch has no operations on them


def add(commands: Any) -> None:
    """Register the command."""
    parser = command.add(
        commands,
        "inspect",
        help="show the contents of a checkpoint, or the checkpoints of a run",
        description="Show the checkpoints of a run, or the header (time, versions, metrics, configuration, commit) and"
        "\nthe leaves of one checkpoint. Only what is shown is loaded, and no pickle is read."
        "\nExit code 1 if something is damaged.",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "path",
        type=locations.location,
        help="a checkpoint, a run's directory, a directory of checkpoints, or a URL",
    )
    parser.add_argument(
        "--values", metavar="NAME", help="show the values of this leaf, or of all leaves under this name"
    )
    parser.add_argument("--verify", action="store_true", help="check every file against its digest")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    find_checkpoints.add_best(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the checkpoint or the run; returns the exit code."""
    path: Path | str = options.path
    if options.best or options.monitor or options.values is not None:
        path = find_checkpoints.choose(path, options)
    if options.values is not None:
        return _values(path, options.values, options.json)
    if find_checkpoints.is_checkpoint(path):
        return _checkpoint(path, options.json, options.verify)
    return _directory(path, options.json, options.verify)


# ------------------------------------------------------------------------------------------- one checkpoint


def describe(path: Path | str) -> dict[str, Any]:
    """Describe a checkpoint as JSON, without reading its arrays."""
    fields = checkpoint.metadata(path)
    leaves, extra = ({n: _sized(leaf) for n, leaf in fields.pop(item).items()} for item in ("leaves", "extra"))
    reader = Reader(path)
    files = reader.header.files
    size = sum(size for size, _ in files.values()) + reader.files.size_of(header.FILE)
    totals = {"bytes": size, "files": len(files) + 1, "groups": _group_totals(leaves)}
    return {"kind": "checkpoint", "path": str(path), **fields, **totals, "leaves": leaves, "extra": extra}


def _sized(leaf: Mapping[str, Any]) -> dict[str, Any]:
    if _ARRAY not in leaf:
        return dict(leaf)
    return {**leaf, "bytes": math.prod(leaf["shape"]) * dtypes.itemsize(leaf["dtype"])}


def _group_totals(leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Count leaves, elements and bytes of each group: params, opt_state, slots/ema …"""
    groups: dict[str, dict[str, int]] = {}
    for name, leaf in leaves.items():
        group = groups.setdefault(_group_name(name), {"leaves": 0, "elements": 0, "bytes": 0})
        group["leaves"] += 1
        if _ARRAY in leaf:
            group["elements"] += math.prod(leaf["shape"])
            group["bytes"] += leaf["bytes"]
    return groups


def _group_name(name: str) -> str:
    words = name.split("/")
    start = 1 if words[0] == "state" and len(words) > 1 else 0
    return "/".join(words[: start + (2 if words[start] == "slots" else 1)])


def _checkpoint(path: Path | str, as_json: bool, verify: bool) -> int:
    info = describe(path)
    if verify:
        verify_files(path)
        info["verified"] = True
    if as_json:
        tables.print_json(info)
        return 0
    print(tables.escape(info["path"]))
    tables.print_fields(summary(info))
    print()
    print_leaves(info)
    return 0


def summary(info: Mapping[str, Any]) -> dict[str, str]:
    """Lines about a checkpoint apart from its leaves."""
    versions = {name: info[name] for name in ("lumen", "torch", "orbax") if info.get(name) not in (None, "unknown")}
    lines = {
        "written": f"{_time(info.get('time'))} by {tables.one_line(versions)}",
        "size": f"{human_bytes(info['bytes'])} in {info['files']} files",
    }
    if info.get("verified"):
        lines["verified"] = "every file matches its digest"
    if info.get("metrics"):
        lines["metrics"] = tables.one_line(info["metrics"])
    meta = info.get("meta")
    journal = meta.get("journal") if isinstance(meta, dict) else None
    if isinstance(journal, dict) and journal.get("metrics") not in (None, {}, info.get("metrics")):
        lines["newest metrics"] = tables.one_line(journal["metrics"])
    if isinstance(meta, dict):
        shown = {name: value for name, value in meta.items() if name not in _HIDDEN and value not in (None, {}, [])}
        lines |= {name: tables.one_line(value) for name, value in shown.items()}
    return lines


def print_leaves(info: Mapping[str, Any]) -> None:
    """Print a table of all leaves, and one of their groups."""
    rows = [_leaf_row(name, leaf) for name, leaf in info["leaves"].items()]
    tables.print_table(("name", "dtype", "shape", "bytes"), rows, right=("bytes",))
    print()
    groups = [
        (name, str(group["leaves"]), f"{group['elements']:,}", human_bytes(group["bytes"]))
        for name, group in info["groups"].items()
    ]
    extra = _group_totals({f"extra/{name}": leaf for name, leaf in info["extra"].items()}).get("extra")
    if extra:
        groups.append(("(extra)", str(extra["leaves"]), f"{extra['elements']:,}", human_bytes(extra["bytes"])))
    tables.print_table(("group", "leaves", "elements", "bytes"), groups, right=("leaves", "elements", "bytes"))


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


def verify_files(path: Path | str) -> None:
    """Read every file of a checkpoint; raises `CorruptCheckpointError` if one does not match its digest."""
    for item in header.ITEMS:
        reader = Reader(path, item)
        reader.read(reader.records, lambda record, value: None)


def count_nonfinite(path: Path | str) -> dict[str, str]:
    """Count the NaN and infinite elements of each leaf of the state; leaves without any are omitted."""
    reader = Reader(path)
    records = [record for record in reader.records if record.kind in ARRAYS]
    counts = reader.read(records, lambda record, value: int((~_wide(value).isfinite()).sum()))
    nonfinite = {
        name_of(record.path): (count, math.prod(record.shape))
        for record, count in zip(records, counts, strict=True)
        if count
    }
    return {name: f"{count} of {size}" for name, (count, size) in nonfinite.items()}


# -------------------------------------------------------------------------------------------------- a run


def _directory(path: Path | str, as_json: bool, verify: bool) -> int:
    rows = [_describe_row(checkpoint_path, verify) for checkpoint_path in find_checkpoints.list_checkpoints(path)]
    intact = [row for row in rows if "damaged" not in row and row["step"] is not None]
    for row in intact[-1:]:
        row["newest"] = True
    if as_json:
        tables.print_json({"kind": "run", "path": str(path), "checkpoints": rows})
    else:
        cells = [(row["name"], _time(row.get("time")), _size(row), _remark(row)) for row in rows]
        tables.print_table(("checkpoint", "written", "bytes", "metrics"), cells, right=("checkpoint", "bytes"))
    return 1 if any("damaged" in row for row in rows) else 0


def _describe_row(path: Path | str, verify: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": basename(path),
        "path": str(path),
        "step": find_checkpoints.step_of(path),
    }
    try:
        info = describe(path)
        if verify:
            verify_files(path)
    except CheckpointError as error:
        return {**row, "damaged": str(error)}
    return {**row, **{name: info.get(name) for name in ("time", "bytes", "metrics")}}


def _size(row: Mapping[str, Any]) -> str:
    return human_bytes(row["bytes"]) if "bytes" in row else ""


def _remark(row: Mapping[str, Any]) -> str:
    if "damaged" in row:
        return tables.one_line(row["damaged"])
    metrics = tables.one_line(row["metrics"]) if row["metrics"] else ""
    return f"{metrics} (newest)".strip() if row.get("newest") else metrics


# ------------------------------------------------------------------------------------------------- values


def _values(path: Path | str, name: str, as_json: bool) -> int:
    values = {leaf_name: _bytes(value) for leaf_name, value in _flat(checkpoint.load(path, under=name), name).items()}
    if as_json:
        tables.print_json(values)
        return 0
    for leaf_name, value in values.items():
        if isinstance(value, Tensor | np.ndarray | np.generic):
            tensor = value if isinstance(value, Tensor) else _as_tensor(value)
            print(f"{printable(leaf_name)}: {_range(tensor)}")
            print(value if isinstance(value, Tensor) else repr(value))
        else:
            print(f"{printable(leaf_name)}: {tables.one_line(str(value))}")
    return 0


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        leaf_name: leaf for key, child in value.items() for leaf_name, leaf in _flat(child, f"{name}/{key}").items()
    }


def _as_tensor(value: Any) -> Tensor:
    try:
        return torch.from_numpy(np.array(value))
    except TypeError:  # an ml_dtypes dtype such as bfloat16
        return torch.from_numpy(np.array(value, dtype=np.float32))


def _bytes(value: Any) -> Any:
    """A packed tensor as its bytes; any other value unchanged."""
    return value.view(torch.uint8) if isinstance(value, Tensor) and value.dtype in _PACKED else value


def _wide(tensor: Tensor) -> Tensor:
    """The values in a dtype that supports every operation."""
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
    nonfinite = wide.numel() - finite.numel()
    return f"{text}, {nonfinite} not finite" if nonfinite else text
