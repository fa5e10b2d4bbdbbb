"""Units: the modules whose params are gathered, used and freed together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from lumen.transforms._support.module_patterns import unmatched


class FSDPUnits(NamedTuple):
    """The names of the units in order, the root `""` first; `owner` is the index of each param's unit."""

    names: tuple[str, ...]
    owner: dict[str, int]


def find(module: nn.Module, patterns: Sequence[str] | None, params: Iterable[str]) -> FSDPUnits:
    """The units of `module`: the modules that match a pattern, by default the repeated blocks.

    `params` are the names of its params, also of frozen ones: such as a quantized weight's codes, which are buffers. A
    param belongs to the unit that contains it. A param that several units contain (tied weights), or none, belongs
    to the root. Units do not nest: the outermost match counts.

    Raises `PatternError` for a pattern that matches nothing.
    """
    params = frozenset(params)
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    canonical: dict[int, str] = {}
    for path, tensor in tensors:
        canonical.setdefault(id(tensor), path)
    chosen = _repeated(module, params, canonical) if patterns is None else _matching(module, patterns)
    outer = [name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)]
    names = ("", *outer)
    owner: dict[str, int] = {}
    for path, tensor in tensors:
        name = canonical[id(tensor)]
        unit = next((i for i, prefix in enumerate(names) if prefix and path.startswith(f"{prefix}.")), 0)
        owner[name] = unit if owner.get(name, unit) == unit else 0
    return FSDPUnits(names, {name: owner[name] for name in params})


def _repeated(module: nn.Module, params: Collection[str], canonical: Mapping[int, str]) -> list[str]:
    """Children of lists and sequences that have params, and whose class occurs there more than once.

    In a list, a child that has children itself is a block even if it is the only one of its class.
    """
    blocks = []
    for name, parent in module.named_modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            counts = Counter(type(child) for child in parent.children())
            for key, child in parent.named_children():
                if isinstance(child, nn.ModuleList | nn.ModuleDict):
                    continue
                if not any(canonical[id(x)] in params for x in itertools.chain(child.parameters(), child.buffers())):
                    continue
                block = isinstance(parent, nn.ModuleList) and next(child.children(), None) is not None
                if block or counts[type(child)] > 1:
                    blocks.append(f"{name}.{key}" if name else key)
    return [name for name in blocks if callable(getattr(module.get_submodule(name), "forward", None))]


def _matching(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unmatched(module, f"fsdp(wrap=[{pattern!r}])")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
