"""The modules of a model that a transform acts on: its repeated blocks, or those that match a pattern."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lumen.errors import PatternError, printable

Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def select_modules(module: nn.Module, pattern: Pattern | None, requested_by: str) -> list[nn.Module]:
    """The modules inside `module` that match `pattern`; of nested matches, the outermost.

    `pattern` is a glob over names, a class, or a predicate `(name, module) -> bool`; None means the children of the
    first `nn.ModuleList` or `nn.Sequential`.

    Raises `PatternError` if nothing matches; its message begins with `requested_by`.
    """
    matches = _repeated(module) if pattern is None else _matching(module, pattern)
    if not matches:
        raise unmatched(module, requested_by)
    return matches


def unmatched(module: nn.Module, requested_by: str) -> PatternError:
    """The error for a pattern that matches no module of `module`."""
    names = [name for name, _ in module.named_modules() if name]
    return PatternError(
        f"{requested_by} matches no module of {type(module).__name__};"
        f" its modules are {', '.join(map(printable, names[:8])) or 'none'}{' …' if len(names) > 8 else ''}."
    )


def disable_kv_cache(module: nn.Module) -> None:
    """Disable the key-value cache of a Hugging Face transformer, which its blocks append to.

    A recomputed block would append twice, and a compiled block takes and returns tensors only.
    """
    for submodule in module.modules():
        config: Any = getattr(submodule, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # in the skeleton's own copy of the model


def _repeated(module: nn.Module) -> list[nn.Module]:
    for submodule in module.modules():
        if isinstance(submodule, nn.ModuleList | nn.Sequential):
            return list(submodule.children())
    return []


def _matching(module: nn.Module, pattern: Pattern) -> list[nn.Module]:
    outer_names: list[str] = []
    matches = []
    for name, submodule in module.named_modules():
        if (
            name
            and _matches(pattern, name, submodule)
            and not any(name.startswith(f"{outer}.") for outer in outer_names)
        ):
            outer_names.append(name)
            matches.append(submodule)
    return matches


def _matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    return bool(pattern(name, module))
