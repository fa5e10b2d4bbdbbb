"""`restore`: the leaves of a checkpoint in the places of a tree like it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lumen import tree
from lumen.checkpoint import dtypes, shard_specs
from lumen.checkpoint._load import Reader, Wanted, as_kind
from lumen.checkpoint.leaves import ARRAYS, Path, kind_of, name_of, named
from lumen.checkpoint.snapshot import LeafRecord
from lumen.core.sharding import ShardSpec
from lumen.core.step import StepFn
from lumen.errors import CheckpointError, CheckpointMismatchError, InexactWarning, printable

Rename = Mapping[str, str | None] | Callable[[str], str | None]

_SHOWN = 20


def restore(
    path: str | os.PathLike[str],
    like: Any,
    *,
    strict: bool = True,
    cast: bool = False,
    rename: Rename | None = None,
    device: torch.device | str | None = None,
    step: StepFn | None = None,
) -> Any:
    """The checkpoint at `path` as a tree like `like`, which gives structure, dtypes and devices and is not changed.

    With `strict=False`, leaves that the checkpoint lacks stay as they are in `like`, and what it has beyond is left
    out; one `InexactWarning` lists both. `cast=True` allows floats of another dtype, and ints of another that hold
    the values. `rename` maps prefixes of saved names to the wanted ones, or is a function of the whole name; None
    leaves a leaf out. Leaves of `like` on the meta device give a shape and a dtype and come to the CPU, or to `device`
    like all others.

    Under a transform that spreads the state over processes, `step` is the step that has it, and `like` this process's
    state of it: each process reads the parts that it holds, whatever the checkpoint was saved under.

    Raises `CheckpointMismatchError` with everything that does not fit, `CorruptCheckpointError` where a file is
    damaged, and `CheckpointNotFoundError` where there is no checkpoint.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"body": {"weight": torch.ones(2)}, "head": torch.ones(3)})
    >>> like = {"backbone": {"weight": torch.zeros(2, dtype=torch.float64)}}
    >>> lm.checkpoint.restore(path, like, rename={"body": "backbone", "head": None}, cast=True)
    {'backbone': {'weight': tensor([1., 1.], dtype=torch.float64)}}
    """
    shard_specs.check(step, like, "lm.checkpoint.restore(path, like, step=step)")
    like, hand_back = shard_specs.export_opaque(step, like)
    paths, values, spec = named(like)
    reader = Reader(path)
    saved = renamed(reader.rows, rename)
    kinds = [kind_of_like(value, way) for value, way in zip(values, paths, strict=True)]
    pieces = shard_specs.by_place(shard_specs.shard_specs(step, like), kinds)
    targets = [
        _Target(name_of(way), kind, value, pieces.get(place))
        for place, (way, kind, value) in enumerate(zip(paths, kinds, values, strict=True))
    ]
    problems = Problems.between(targets, saved, cast)
    if problems.wrong or (strict and problems.any()):
        raise CheckpointMismatchError(problems.message(str(path)))
    if problems.any():
        warnings.warn(problems.notice(str(path)), InexactWarning, stacklevel=3)
    filled = [target for target in targets if target.kind != "empty" and target.name in saved]
    by_row = {id(saved[target.name]): target for target in filled}
    found = reader.read(
        [saved[target.name] for target in filled],
        lambda row, value: by_row[id(row)].place(value, device),
        {saved[target.name].path: target.wanted for target in filled if target.wanted is not None},
    )
    new = dict(zip((target.name for target in filled), found, strict=True))
    return hand_back(tree.unflatten(spec, [new.get(target.name, target.value) for target in targets]))


@dataclass(frozen=True)
class _Target:
    """One leaf of `like`."""

    name: str
    kind: str
    value: Any
    piece: ShardSpec | None = None  # what it is of a whole leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if self.piece is None else self.piece.shape

    @property
    def wanted(self) -> Wanted | None:
        return None if self.piece is None else Wanted(tuple(self.value.shape), self.piece.boxes)

    @property
    def dtype(self) -> str:
        dtype = self.value.dtype
        return dtypes.NAMES[dtype] if isinstance(dtype, torch.dtype) else str(dtype.name)

    def described(self) -> str:
        if self.kind in ARRAYS:
            return _array_text(self.dtype, self.shape)
        return f"a Python {self.kind}"

    def mismatch(self, row: LeafRecord, cast: bool) -> str:
        """How a saved leaf does not fit here, or nothing."""
        if self.kind in ARRAYS and row.kind in ARRAYS:
            same = row.dtype == self.dtype or (cast and _castable(row.dtype, self.dtype))
            fits = same and row.shape == self.shape
        else:
            fits = row.kind == self.kind
        found = _array_text(row.dtype, row.shape) if row.kind in ARRAYS else f"a Python {row.kind}"
        return "" if fits else f"{printable(self.name)}: {found} in the checkpoint, {self.described()} wanted"

    def place(self, value: Tensor, device: torch.device | str | None) -> Any:
        """A saved array in the form of this leaf."""
        value = _cast(value, dtypes.TORCH[self.dtype], self.name)
        if self.kind != "tensor":
            return as_kind(self.kind, value)
        like: Tensor = self.value
        if device is None:
            device = torch.device("cpu") if like.is_meta else like.device
        value = value.to(device)
        if isinstance(like, nn.Parameter):
            return nn.Parameter(value, requires_grad=like.requires_grad)
        return value.requires_grad_(like.requires_grad)


def _array_text(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def kind_of_like(value: Any, path: Path) -> str:
    """The kind of a leaf of `like`; a tensor may be on the meta device, or a fake one."""
    if isinstance(value, Tensor) and value.is_meta and value.dtype in dtypes.NAMES:
        return "tensor"
    return kind_of(value, path)


# ------------------------------------------------------------------------------------------------- names


def renamed(rows: Sequence[LeafRecord], rename: Rename | None) -> dict[str, LeafRecord]:
    """The rows by the names that are wanted; empty containers hold nothing to be restored."""
    new = _by_prefix(rename or {}) if rename is None or isinstance(rename, Mapping) else rename
    result: dict[str, LeafRecord] = {}
    for row in rows:
        name = new(name_of(row.path)) if row.kind != "empty" else None
        if name is None:
            continue
        if name in result:
            raise CheckpointError(
                f"rename gives two leaves the name {name!r}: {name_of(result[name].path)!r} and {name_of(row.path)!r}."
                " Leave one of them out by renaming it to None."
            )
        result[name] = row
    return result


def _by_prefix(table: Mapping[str, str | None]) -> Callable[[str], str | None]:
    """The longest prefix decides."""
    prefixes = sorted(table, key=len, reverse=True)

    def new(name: str) -> str | None:
        for prefix in prefixes:
            if name.startswith(prefix):
                wanted = table[prefix]
                return None if wanted is None else wanted + name[len(prefix) :]
        return name

    return new


# ------------------------------------------------------------------------------------------------ dtypes


def _castable(saved: str, wanted: str) -> bool:
    return _family(dtypes.TORCH[saved]) == _family(dtypes.TORCH[wanted])


def _family(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "float"
    return "bool" if dtype == torch.bool else "int"


def _cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if value.dtype == dtype:
        return value
    new = value.to(dtype)
    if _family(dtype) == "int" and not _equal_ints(new, value):
        raise CheckpointMismatchError(
            f"{printable(name)} holds values that do not fit into {dtypes.NAMES[dtype]}: it was saved as"
            f" {dtypes.NAMES[value.dtype]}. Restore it as that, and convert it as it should be."
        )
    return new


def _equal_ints(one: Tensor, other: Tensor) -> bool:
    a, b = one.to(torch.int64), other.to(torch.int64)
    # From 2**63 up, unsigned ints have the bits of negative ones.
    wraps = (one.dtype == torch.uint64) != (other.dtype == torch.uint64) and bool((a < 0).any())
    return torch.equal(a, b) and not wraps


# ---------------------------------------------------------------------------------------------- problems


@dataclass
class Problems:
    """Everything that does not fit between a checkpoint and a tree."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def between(cls, targets: Sequence[_Target], saved: Mapping[str, LeafRecord], cast: bool) -> Problems:
        """Compare the leaves of a tree with those of a checkpoint."""
        found = cls()
        for target in targets:
            if target.kind == "empty":
                continue
            row = saved.get(target.name)
            if row is None:
                found.missing.append(f"{printable(target.name)}: {target.described()}")
            elif why := target.mismatch(row, cast):
                found.wrong.append(why)
        names = {target.name for target in targets}
        found.unexpected = [printable(name) for name in saved if name not in names]
        return found

    def any(self) -> bool:
        """Whether there is one."""
        return bool(self.missing or self.unexpected or self.wrong)

    def message(self, path: str) -> str:
        """The text of the error."""
        hints = []
        if self.wrong:
            hints.append("cast=True converts dtypes within floats or ints, rename={'name': None} leaves a leaf out")
        if self.missing and self.unexpected:
            hints.append("rename={'saved prefix': 'wanted prefix'} maps names")
        if self.missing or self.unexpected:
            hints.append("strict=False keeps what is missing as it is in `like` and ignores what is unexpected")
        lists = self._lists("missing from the checkpoint", "in the checkpoint, but not wanted")
        return f"the checkpoint {path} does not fit.\n{lists}\nIn restore(...), {'; '.join(hints)}."

    def notice(self, path: str) -> str:
        """The text of the warning."""
        return f"the checkpoint {path} was restored in part.\n{self._lists('kept as in `like`', 'ignored')}"

    def _lists(self, missing: str, unexpected: str) -> str:
        titled = ((missing, self.missing), (unexpected, self.unexpected), ("different", self.wrong))
        return "\n".join(_listed(title, lines) for title, lines in titled if lines)


def _listed(title: str, lines: list[str]) -> str:
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"  and {len(lines) - _SHOWN} more")
    return "\n".join([f"{title} ({len(lines)}):", *shown])
