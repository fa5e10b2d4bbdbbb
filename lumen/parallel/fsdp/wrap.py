"""Units: the modules whose params are gathered, used and let go together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from lumen.transforms._support.module_patterns import unmatched


class FSDPUnits(NamedTuple):
    """The chosen modules by name, in order; the first is the root, `""`. `owner` is the unit of each param."""

    names: tuple[str, ...]
    owner: dict[str, int]


def find(module: nn.Module, patterns: Sequence[str] | None, params: Iterable[str]) -> FSDPUnits:
    """The units of `module`: what matches a pattern, by default the repeated blocks.

    A param belongs to the unit around all the places where it stands, and to the root where these are several units
    (tied weights) or none. Units do not nest: the outermost match counts.

    Raises `PatternError` for a pattern that matches nothing.
    """
    chosen = _repeated(module) if patterns is None else _matching(module, patterns)
    outer = [name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)]
    names = ("", *outer)
    owner: dict[str, int] = {}
    canonical = {id(p): name for name, p in module.named_parameters()}
    for place, parameter in module.named_parameters(remove_duplicate=False):
        name = canonical[id(parameter)]
        unit = next((i for i, each in enumerate(names) if each and place.startswith(f"{each}.")), 0)
        owner[name] = unit if owner.get(name, unit) == unit else 0
    return FSDPUnits(names, {name: owner[name] for name in params})


def _repeated(module: nn.Module) -> list[str]:
    """Children of lists and sequences whose class occurs there more than once, and which have params.

    A child of a list that is made of modules itself is a block also where it is the only one of its kind.
    """
    found = []
    for name, each in module.named_modules():
        if isinstance(each, nn.ModuleList | nn.Sequential):
            counts = Counter(type(child) for child in each.children())
            for key, child in each.named_children():
                if isinstance(child, nn.ModuleList | nn.ModuleDict) or next(child.parameters(), None) is None:
                    continue
                block = isinstance(each, nn.ModuleList) and next(child.children(), None) is not None
                if block or counts[type(child)] > 1:
                    found.append(f"{name}.{key}" if name else key)
    return [name for name in found if callable(getattr(module.get_submodule(name), "forward", None))]


def _matching(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unmatched(module, f"fsdp(wrap=[{pattern!r}])")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
