"""How tensors of a checkpoint become those of a transformers model, by transformers' own tables (5.24).

Most are renamed. A converter of transformers makes one or several tensors of a model from one or several in files: it
merges the matrices of experts, for example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumen.core.pending_weights import read_shard
from lumen.core.sharding import ShardSpec
from lumen.errors import CheckpointMismatchError, printable

Read = Callable[[str, tuple[slice, ...]], Tensor]  # a block of a tensor in a file, by its name there


class Recipe(NamedTuple):
    """How tensors of the model are made from tensors in files.

    `path` is that of the first result in the model, `shapes` are those of all results by path, and `sources` the names
    in files, by the patterns of `converter`, which is None where the only source is only renamed.
    """

    path: str
    shapes: Mapping[str, torch.Size]
    sources: Mapping[str, tuple[str, ...]]
    converter: Any
    module: Any

    @property
    def first(self) -> str:
        """The first source."""
        return next(iter(self.sources.values()))[0]

    def read(self, read: Read, specs: Mapping[str, ShardSpec]) -> Iterator[tuple[str, Tensor]]:
        """The shard of each result, by its path; those without a spec in full."""
        if self.converter is None or _merges_rows(self):
            block = (lambda slices: read(self.first, slices)) if self.converter is None else self._experts(read)
            for path in self.shapes:
                yield path, read_shard(specs.get(path), block)
            return
        results = self.convert(lambda name: read(name, ()))
        for path in self.shapes:
            full = results.pop(path)
            shard = read_shard(specs.get(path), lambda slices, full=full: full[slices or ...])  # type: ignore[misc]
            is_alone = shard.untyped_storage().nbytes() == shard.nbytes
            yield path, shard if is_alone else shard.clone(memory_format=torch.contiguous_format)

    def convert(self, read: Callable[[str], Tensor], row: int | None = None) -> dict[str, Tensor]:
        """The full results by path; with `row`, only of the sources in this position of their lists."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names if row is None else names[row : row + 1]:
                converter.add_tensor(self.path, name, pattern, read(name))
        results = converter.convert(self.path, model=self.module, config=self.module.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in results.items()}

    def _experts(self, read: Read) -> Callable[[tuple[slice, ...]], Tensor]:
        """A function that reads a block of experts that are merged, one expert after the other."""
        (path,) = self.shapes
        count = self.shapes[path][0]

        def expert(row: int, others: Sequence[slice]) -> Tensor:
            return self.convert(lambda name: read(name, ()), row)[path][(slice(None), *others)]

        def block(slices: tuple[slice, ...]) -> Tensor:
            rows, *others = slices or (slice(0, count),)
            if rows.start == rows.stop:
                return expert(0, others)[:0].clone()
            first = expert(rows.start, others)
            merged = first.new_empty((rows.stop - rows.start, *first.shape[1:]))
            merged[:1] = first
            for position in range(1, len(merged)):
                merged[position : position + 1] = expert(rows.start + position, others)
            return merged

        return block


def recipes(module: nn.Module, in_files: Mapping[str, Tensor]) -> tuple[list[Recipe], set[str]]:
    """How the tensors `in_files`, by name on the meta device, become those of `module`; and unexpected names.

    A module that is not of transformers has the names of its `state_dict()`.

    Raises `CheckpointMismatchError` where a conversion of transformers fails.
    """
    expected = {name: x for name, x in module.state_dict().items() if isinstance(x, Tensor)}
    if not is_transformers(module):
        known = [name for name in in_files if name in expected]
        entries = [Recipe(name, {name: in_files[name].shape}, {"": (name,)}, None, module) for name in known]
        return entries, in_files.keys() - expected.keys()
    planned, unexpected = _renamed(module, in_files, expected)
    entries = [recipe for path, entry in planned.items() for recipe in [_recipe(module, path, *entry, in_files)]]
    unknown = {path for recipe in entries for path in recipe.shapes if path not in expected}
    entries = [r._replace(shapes={p: s for p, s in r.shapes.items() if p in expected}) for r in entries]
    return [recipe for recipe in entries if recipe.shapes], unexpected | unknown


def _renamed(
    module: Any, in_files: Iterable[str], expected: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Any, dict[str, list[str]]]], set[str]]:
    """By the path of the first result: the converter, and the sources by pattern. And unexpected names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(module)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = module.base_model_prefix
    planned: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    unexpected = set()
    for name in sorted(in_files, key=dot_natural_key):
        path, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if path not in expected and name in expected:  # saved under the names of this version
            path, pattern = rename_source_key(name, [], [], prefix, expected)
        if path not in expected:
            unexpected.add(path)
            continue
        converter, sources = planned.setdefault(path, (None if pattern is None else by_pattern[pattern], {}))
        if converter is not None or not sources:
            sources.setdefault(pattern or "", []).append(name)
    return planned, unexpected


def _recipe(
    module: Any, path: str, converter: Any, sources: Mapping[str, list[str]], in_files: Mapping[str, Tensor]
) -> Recipe:
    by_pattern = {pattern: tuple(names) for pattern, names in sources.items()}
    recipe = Recipe(path, {path: torch.Size()}, by_pattern, converter, module)
    if converter is None:
        return recipe._replace(shapes={path: in_files[recipe.first].shape})
    try:
        results = recipe.convert(in_files.__getitem__)
    except Exception as error:
        names = [name for group in by_pattern.values() for name in group]
        raise CheckpointMismatchError(
            f"transformers cannot convert {', '.join(map(printable, names[:6]))}{' …' if len(names) > 6 else ''} to"
            f" {printable(path)}: {error}. Read the files with from_pretrained, and save them anew."
        ) from error
    return recipe._replace(shapes={name: x.shape for name, x in results.items()})


def is_transformers(module: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def without_ignored(module: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """The names without those that a model of transformers declares as harmless."""
    if not is_transformers(module):
        return missing, unexpected
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    module._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys


def float32_paths(module: Any, dtype: torch.dtype, paths: Iterable[str]) -> set[str]:
    """The paths of tensors that transformers keeps in float32 in a model of this `dtype`."""
    if not is_transformers(module):
        return set()
    from transformers.core_model_loading import build_glob_alternation

    plan = module._get_dtype_plan(dtype)
    if not plan:
        return set()
    pattern = build_glob_alternation(list(plan))[0]
    return {path for path in paths if pattern.search(path)}


def _merges_rows(recipe: Recipe) -> bool:
    """Whether the result's row `i` is made from the sources in position `i` alone: merged experts."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in recipe.converter.operations]
    lengths = {len(names) for names in recipe.sources.values()}
    merged = operations[0] == ("MergeModulelist", 0) and len(lengths) == 1 and len(recipe.shapes) == 1
    return merged and all(name == "Concatenate" and dim not in (0, None) for name, dim in operations[1:])
