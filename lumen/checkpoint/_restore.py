"""`restore`: the leaves of a checkpoint in the structure of an existing tree."""

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
from lumen.checkpoint._load import Reader, ReadRequest, as_kind
from lumen.checkpoint.leaves import ARRAYS, LeafPath, kind_of, name_of, named
from lumen.checkpoint.snapshot import LeafRecord
from lumen.core.arguments import checked_first
from lumen.core.sharding import ShardSpec
from lumen.core.step import StepFn
from lumen.errors import CheckpointError, CheckpointMismatchError, InexactWarning, printable

Rename = Mapping[str, str | None] | Callable[[str], str | None]

_SHOWN = 20


@checked_first
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
    """The checkpoint at `path` as a tree with the structure, dtypes and devices of `like`, which is not changed.

    With `strict=False`, leaves that are missing from the checkpoint keep their value in `like`, and unexpected ones are
    ignored; one `InexactWarning` lists both. `cast=True` converts between float dtypes, and between int dtypes if the
    values fit. `rename` maps prefixes of saved names to those of `like`, or is a function from one name to the other;
    None leaves a leaf out. Leaves of `like` on the meta device need no memory; they are restored to the CPU, or to
    `device` like all others.

    If a transform shards the state over processes, `step` is the step with that transform, and `like` is this process's
    state of it. Each process reads its own shards, whatever transforms the checkpoint was saved under.

    Raises `CheckpointMismatchError` with every leaf that does not fit, `CorruptCheckpointError` if a file is damaged,
    and `CheckpointNotFoundError` if there is no checkpoint.

    >>> import lumen as lm, torch, tempfile
    >>> path = tempfile.mkdtemp() + "/first"
    >>> lm.checkpoint.save(path, {"body": {"weight": torch.ones(2)}, "head": torch.ones(3)})
    >>> like = {"backbone": {"weight": torch.zeros(2, dtype=torch.float64)}}
    >>> lm.checkpoint.restore(path, like, rename={"body": "backbone", "head": None}, cast=True)
    {'backbone': {'weight': tensor([1., 1.], dtype=torch.float64)}}
    """
    shard_specs.check(step, like, "lm.checkpoint.restore(path, like, step=step)")
    like, import_opaque = shard_specs.export_opaque(step, like)
    paths, values, spec = named(like)
    reader = Reader(path)
    saved = renamed(reader.records, rename)
    kinds = [kind_of_like(value, leaf_path) for value, leaf_path in zip(values, paths, strict=True)]
    specs = shard_specs.by_leaf_index(shard_specs.leaf_specs(step, like), kinds)
    targets = [
        _Target(name_of(leaf_path), kind, value, specs.get(index))
        for index, (leaf_path, kind, value) in enumerate(zip(paths, kinds, values, strict=True))
    ]
    problems = Problems.between(targets, saved, cast)
    if problems.wrong or (strict and problems.any()):
        raise CheckpointMismatchError(problems.message(str(path)))
    if problems.any():
        warnings.warn(problems.notice(str(path)), InexactWarning, stacklevel=3)
    filled = [target for target in targets if target.kind != "empty" and target.name in saved]
    by_record = {id(saved[target.name]): target for target in filled}
    values_read = reader.read(
        [saved[target.name] for target in filled],
        lambda record, value: by_record[id(record)].convert(value, device),
        {saved[target.name].path: target.request for target in filled if target.request is not None},
    )
    new = dict(zip((target.name for target in filled), values_read, strict=True))
    return import_opaque(tree.unflatten(spec, [new.get(target.name, target.value) for target in targets]))


@dataclass(frozen=True)
class _Target:
    """One leaf of `like`."""

    name: str
    kind: str
    value: Any
    spec: ShardSpec | None = None  # if it is a shard

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if self.spec is None else self.spec.shape

    @property
    def request(self) -> ReadRequest | None:
        return None if self.spec is None else ReadRequest(tuple(self.value.shape), self.spec.boxes)

    @property
    def dtype(self) -> str:
        dtype = self.value.dtype
        return dtypes.NAMES[dtype] if isinstance(dtype, torch.dtype) else str(dtype.name)

    def described(self) -> str:
        if self.kind in ARRAYS:
            return _array_text(self.dtype, self.shape)
        return f"a Python {self.kind}"

    def mismatch(self, record: LeafRecord, cast: bool) -> str:
        """How a saved leaf differs from what this one needs; empty if it fits."""
        if self.kind in ARRAYS and record.kind in ARRAYS:
            same = record.dtype == self.dtype or (cast and _castable(record.dtype, self.dtype))
            fits = same and record.shape == self.shape
        else:
            fits = record.kind == self.kind
        saved = _array_text(record.dtype, record.shape) if record.kind in ARRAYS else f"a Python {record.kind}"
        return "" if fits else f"{printable(self.name)}: {saved} in the checkpoint, {self.described()} wanted"

    def convert(self, value: Tensor, device: torch.device | str | None) -> Any:
        """A saved array with the kind, dtype and device of this leaf."""
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


def kind_of_like(value: Any, path: LeafPath) -> str:
    """The kind of a leaf of `like`; a tensor may be on the meta device, or a fake one."""
    if isinstance(value, Tensor) and value.is_meta and value.dtype in dtypes.NAMES:
        return "tensor"
    return kind_of(value, path)


# ------------------------------------------------------------------------------------------------- names


def renamed(records: Sequence[LeafRecord], rename: Rename | None) -> dict[str, LeafRecord]:
    """The records by their new names, without empty containers, which have nothing to restore."""
    new = _by_prefix(rename or {}) if rename is None or isinstance(rename, Mapping) else rename
    result: dict[str, LeafRecord] = {}
    for record in records:
        name = new(name_of(record.path)) if record.kind != "empty" else None
        if name is None:
            continue
        if name in result:
            raise CheckpointError(
                f"rename gives two leaves the name {name!r}: {name_of(result[name].path)!r} and"
                f" {name_of(record.path)!r}. Leave one of them out by renaming it to None."
            )
        result[name] = record
    return result


def _by_prefix(table: Mapping[str, str | None]) -> Callable[[str], str | None]:
    """The longest prefix decides."""
    prefixes = sorted(table, key=len, reverse=True)

    def new(name: str) -> str | None:
        for prefix in prefixes:
            if name.startswith(prefix):
                replacement = table[prefix]
                return None if replacement is None else replacement + name[len(prefix) :]
        return name

    return new


# ------------------------------------------------------------------------------------------------ dtypes


def _castable(saved: str, target: str) -> bool:
    return _family(dtypes.TORCH[saved]) == _family(dtypes.TORCH[target])


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
            f"{printable(name)} has values that do not fit into {dtypes.NAMES[dtype]}: it was saved as"
            f" {dtypes.NAMES[value.dtype]}. Restore it with that dtype, and convert it yourself."
        )
    return new


def _equal_ints(converted: Tensor, original: Tensor) -> bool:
    a, b = converted.to(torch.int64), original.to(torch.int64)
    # From 2**63 up, unsigned ints have the bits of negative ones.
    wraps = (converted.dtype == torch.uint64) != (original.dtype == torch.uint64) and bool((a < 0).any())
    return torch.equal(a, b) and not wraps


# ---------------------------------------------------------------------------------------------- problems


@dataclass
class Problems:
    """Every difference between the leaves of a checkpoint and those of a tree."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def between(cls, targets: Sequence[_Target], saved: Mapping[str, LeafRecord], cast: bool) -> Problems:
        """Compare the leaves of a tree with those of a checkpoint."""
        problems = cls()
        for target in targets:
            if target.kind == "empty":
                continue
            record = saved.get(target.name)
            if record is None:
                problems.missing.append(f"{printable(target.name)}: {target.described()}")
            elif why := target.mismatch(record, cast):
                problems.wrong.append(why)
        names = {target.name for target in targets}
        problems.unexpected = [printable(name) for name in saved if name not in names]
        return problems

    def any(self) -> bool:
        """Whether there is any difference."""
        return bool(self.missing or self.unexpected or self.wrong)

    def message(self, path: str) -> str:
        """The text of the error."""
        hints = []
        if self.wrong:
            hints.append("cast=True converts dtypes within floats or ints, rename={'name': None} leaves a leaf out")
        if self.missing and self.unexpected:
            hints.append("rename={'saved prefix': 'wanted prefix'} maps names")
        slots = [name for name in [*self.missing, *self.unexpected] if name.startswith("slots")]
        if slots:
            hints.append("the slots of transforms are in result.state, and in runner.step.init(state)")
        if self.missing or self.unexpected:
            hints.append("strict=False keeps missing leaves as they are in `like` and ignores unexpected ones")
        lists = self._lists("missing from the checkpoint", "in the checkpoint, but not in `like`")
        return f"the checkpoint {path} does not fit.\n{lists}\nIn restore(...), {'; '.join(hints)}."

    def notice(self, path: str) -> str:
        """The text of the warning."""
        return f"the checkpoint {path} was only partially restored.\n{self._lists('kept as in `like`', 'ignored')}"

    def _lists(self, missing: str, unexpected: str) -> str:
        titled = ((missing, self.missing), (unexpected, self.unexpected), ("different", self.wrong))
        return "\n".join(_listed(title, lines) for title, lines in titled if lines)


def _listed(title: str, lines: list[str]) -> str:
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"  and {len(lines) - _SHOWN} more")
    return "\n".join([f"{title} ({len(lines)}):", *shown])
