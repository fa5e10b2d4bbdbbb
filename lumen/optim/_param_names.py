"""Parameters by name: glob patterns, regular expressions and predicates on dotted names."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import optree
from torch import Tensor

from lumen import tree
from lumen.errors import PatternError, printable

Pattern = str | re.Pattern[str]
Predicate = Callable[[str, Tensor], bool]
Selector = Pattern | Sequence[Pattern] | Predicate


def dotted_names(params: Any) -> list[str]:
    """A dotted name for each leaf: keys, indices and field names, joined.

    >>> dotted_names({"encoder": {"weight": 0}, "heads": [1, 2]})
    ['encoder.weight', 'heads.0', 'heads.1']
    """
    if type(params) is dict and all(type(leaf) is Tensor for leaf in params.values()):
        return list(map(str, params))
    accessors = optree.tree_accessors(params, namespace=tree.NAMESPACE)
    return [".".join(str(entry.entry) for entry in accessor) for accessor in accessors]


def matrices(_name: str, leaf: Tensor) -> bool:
    """Selects leaves with two or more dims: the weights of layers, but not biases and norms.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.adamw(3e-4, weight_decay=0.1, decay_mask=lm.optim.matrices)
    """
    return leaf.dim() >= 2


def selected(selector: Selector | None, params: Any) -> list[bool]:
    """Whether each leaf of `params` is selected; None selects every leaf.

    A string is a glob over the full name, in which `*` also crosses dots. A compiled regular expression is
    searched for anywhere in the name. Of several patterns, one must match. A predicate gets the name and the
    leaf; it may use the leaf's shape and dtype, but not its values.

    Raises:
        PatternError: a pattern matches no name.
    """
    names = dotted_names(params)
    if selector is None:
        return [True] * len(names)
    if callable(selector):
        return [bool(selector(name, leaf)) for name, leaf in zip(names, tree.leaves(params), strict=True)]
    patterns = (selector,) if isinstance(selector, str | re.Pattern) else tuple(selector)
    return list(_any_match(patterns, tuple(names)))


def matching(pattern: Pattern, names: Sequence[str], what: str = "parameter") -> list[bool]:
    """Whether each name (of a `what`) matches `pattern`; PatternError with similar names if none does."""
    if isinstance(pattern, re.Pattern):
        flags = [pattern.search(name) is not None for name in names]
    else:
        flags = [fnmatch.fnmatchcase(name, pattern) for name in names]
    if not any(flags):
        raise PatternError(_no_match(pattern, names, what))
    return flags


def matching_any(patterns: Pattern | Sequence[Pattern], names: Sequence[str], what: str) -> list[str]:
    """The names (of a `what`) that match one of the patterns; PatternError for a pattern that matches none."""
    all_patterns = (patterns,) if isinstance(patterns, str | re.Pattern) else patterns
    columns = [matching(pattern, names, what) for pattern in all_patterns]
    return [name for name, *matches in zip(names, *columns, strict=True) if any(matches)]


@functools.lru_cache(maxsize=256)
def _any_match(patterns: tuple[Pattern, ...], names: tuple[str, ...]) -> tuple[bool, ...]:
    return tuple(any(row) for row in zip(*(matching(pattern, names) for pattern in patterns), strict=True))


def _no_match(pattern: Pattern, names: Sequence[str], what: str) -> str:
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    bare = re.sub(r"[^\w.]", "", text)
    near = difflib.get_close_matches(bare, names, n=3, cutoff=0.4) or list(names[:5])
    kind = "regular expression" if isinstance(pattern, re.Pattern) else "pattern"
    return (
        f"the {kind} {text!r} matches none of the {len(names)} {what} names. Near names:"
        f" {', '.join(map(printable, near))}. A glob must match the full name ('*.bias', 'encoder.*'); a"
        " compiled regex may match anywhere in it."
    )
