"""Every registered type survives flatten and unflatten, for optree and torch alike."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as torch_pytree

import lumen as lm
import lumen.core
import lumen.optim
import lumen.transforms


@lm.dataclass
class Mixed:
    """Dynamic and static fields in turn."""

    first: Any
    name: str = lm.static(default="a")
    second: Any = None
    power: int = lm.static(default=2)


def registered() -> list[type]:
    """Every `lm.dataclass` class that the package defines, and one that mixes both sorts of field."""
    found: dict[type, None] = {Mixed: None}
    for package in (lumen.core, lumen.optim, lumen.transforms):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            found.update(
                (cls, None) for cls in vars(module).values() if isinstance(cls, type) and "_fields_" in vars(cls)
            )
    return list(found)


def numbers() -> st.SearchStrategy[torch.Tensor]:
    return st.integers(-5, 5).map(lambda n: torch.tensor(n))


def trees(nodes: Any = None) -> st.SearchStrategy[Any]:
    """Random trees of tensors, with dicts whose keys are in no order."""
    leaves = numbers() if nodes is None else st.one_of(numbers(), nodes)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.sampled_from("zbayx"), inner, max_size=3),
            st.builds(Mixed, first=inner, name=st.sampled_from(["a", "b"]), second=inner, power=st.integers(0, 3)),
            st.builds(lm.Mean, total=inner, weight=inner),
        ),
        max_leaves=8,
    )


def same(a: Any, b: Any) -> bool:
    """Equality of types, fields, order of keys and leaves, told without any pytree code."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@settings(max_examples=100)
@given(trees())
def test_random_trees_round_trip(values: Any) -> None:
    leaves, spec = lm.tree.flatten(values)
    assert same(lm.tree.unflatten(spec, leaves), values)
    leaves, spec = torch_pytree.tree_flatten(values)
    assert same(torch_pytree.tree_unflatten(leaves, spec), values)


@settings(max_examples=50)
@given(trees())
def test_both_registrations_see_the_same_leaves_in_the_same_order(values: Any) -> None:
    ours, theirs = lm.tree.leaves(values), torch_pytree.tree_leaves(values)
    assert [id(leaf) for leaf in ours] == [id(leaf) for leaf in theirs]


@settings(max_examples=50)
@given(trees())
def test_paths_name_each_leaf_once(values: Any) -> None:
    paths = lm.tree.paths(values)
    assert len(paths) == len(lm.tree.leaves(values)) == len(set(paths))


@pytest.mark.parametrize("cls", registered(), ids=lambda cls: cls.__name__)
@settings(max_examples=5)
@given(data=st.data())
def test_every_registered_type_round_trips(cls: type, data: st.DataObject) -> None:
    fields = dataclasses.fields(cls)
    static = {f.name for f in fields if f.metadata.get("lumen_static")}
    values = {f.name: f"static {f.name}" if f.name in static else data.draw(trees()) for f in fields}
    node = object.__new__(cls)
    node.__dict__.update(values)
    leaves, spec = lm.tree.flatten(node)
    theirs, their_spec = torch_pytree.tree_flatten(node)
    for back in (lm.tree.unflatten(spec, leaves), torch_pytree.tree_unflatten(theirs, their_spec)):
        assert type(back) is cls
        assert set(vars(back)) == {f.name for f in fields}
        assert all(same(getattr(back, name), value) for name, value in values.items())


def test_the_package_has_the_types_that_are_known() -> None:
    known = {"TrainState", "Aux", "Mean", "Sum", "Max", "Min", "Last", "GuardState", "LossScale", "Averaged"}
    assert known <= {cls.__name__ for cls in registered()}


def test_static_fields_are_part_of_the_structure() -> None:
    one = torch.tensor(1)
    assert lm.tree.structure(Mixed(one, "a")) == lm.tree.structure(Mixed(one, "a"))
    assert lm.tree.structure(Mixed(one, "a")) != lm.tree.structure(Mixed(one, "b"))


@settings(max_examples=20)
@given(trees())
def test_vmap_sees_through_them(values: Any) -> None:
    if not lm.tree.leaves(values):
        return
    stacked = lm.tree.map(lambda x: torch.stack([x, x + 1]), values)
    doubled = torch.func.vmap(lambda v: lm.tree.map(lambda x: 2 * x, v))(stacked)
    assert same(doubled, lm.tree.map(lambda x: 2 * x, stacked))
