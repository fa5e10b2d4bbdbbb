"""Identifiers of lumen/ use the field's terms: words that say nothing, or say it privately, stay out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "lumen"

# What a thing is instead: shard, spec, full, layout, path, index, params, grads, message, candidates, …
RETIRED = frozenset({
    *("part", "parts", "piece", "pieces", "whole", "wholes", "cut", "held", "stand", "stands", "taking", "telling"),
    *("told", "said", "given", "found", "place", "places", "meeting", "team", "wish", "everyone", "each", "made"),
})  # fmt: skip
# Terms of torch and of the field that contain such a word.
TERMS = ("in_place", "found_inf", "place_state")


def retired(name: str) -> bool:
    for term in TERMS:
        name = name.replace(term, "")
    return not RETIRED.isdisjoint(name.strip("_").lower().split("_"))


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What a module names: functions, classes, arguments, variables and attributes, each with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr


def test_no_identifier_has_a_retired_word() -> None:
    found = [
        f"{path.relative_to(ROOT.parent)}:{line}: {name}"
        for path in sorted(ROOT.rglob("*.py"))
        for line, name in identifiers(ast.parse(path.read_text(encoding="utf-8")))
        if retired(name)
    ]
    assert not found, "\n".join(["Name what these hold (RETIRED has the words):", *found])


def test_the_words_are_seen_in_every_kind_of_name() -> None:
    source = "class Parts:\n def cut(self, whole): self._held = 1\nfor each in x: update_in_place(placement := each)"
    names = {name for _, name in identifiers(ast.parse(source)) if retired(name)}
    assert names == {"Parts", "cut", "whole", "_held", "each"}
    assert not retired("update_in_place")
