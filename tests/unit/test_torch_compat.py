"""Private torch: one module reaches into it, what that uses is listed, and the installed torch has all of it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lumen.core import _torch_compat
from lumen.core._torch_compat import NAMES, PRIVATE, has, missing

ROOT = Path(__file__).parents[2]
COMPAT = "lumen/core/_torch_compat.py"
OTHER_LIBRARIES = ("lumen/data/grain.py",)  # an attribute of Grain that is called as one of torch

# Private attributes that Lumen reaches into and that are not torch's.
OTHERS = {
    *(
        "_asdict",
        "_is_protocol",
        "_fields_",
        "_dynamic_fields_",
        "_row_fields_",
        "_param_fields_",
        "_param_row_fields_",
    ),  # of a named tuple; of Lumen's own dataclasses
    *("_exit", "_getframe", "_register_atexit"),  # CPython
    *(
        "_defaults",
        "_enable_compute_groups",
        "_filter_kwargs",
        "_groups_checked",
        "_reductions",
        "_to_sync",
    ),  # torchmetrics
    *("_filter_kwargs", "_wrap_compute", "_wrap_update"),  # torchmetrics
    *("_hp_mapping", "_index_in_param_group"),  # DeepSpeed
    *("_batch_fn", "_batch_size", "_max_index", "_num_records", "_parent", "_parents", "_shard_options"),  # Grain
    "_window_size",  # Grain
    *("_tp_plan", "_adjust_missing_and_unexpected_keys", "_get_dtype_plan", "_is_hf_initialized"),  # transformers
    *("_keys_to_ignore_on_save", "_weight_conversions"),  # transformers
    *("_distributed", "_ex_iterable"),  # datasets
}
# What objects of torch have: on anything but `self` these are torch's, whoever else has one of that name.
TORCHS = {
    name
    for each in (torch.nn.Module(), torch.Tensor, torch.UntypedStorage, torch.utils.data.DataLoader([0]), DeviceMesh)
    for name in dir(each)
} | {name.rpartition(".")[2] for name in PRIVATE}
ASKED = ("getattr", "hasattr", "setattr", "delattr")


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def is_any_private(dotted: str) -> bool:
    return any(map(is_private, dotted.split(".")))


class Names(ast.NodeVisitor):
    """The private names of torch in one module: by their full names, or as `.name` where an object's class is open."""

    def __init__(self, own: set[str]) -> None:
        self.own = own  # private names that Lumen defines
        self.known: dict[str, str] = {}  # what names of this module are of torch's
        self.found: defaultdict[str, list[int]] = defaultdict(list)
        self.imported: dict[str, int] = {}
        self.called: list[str] = []  # the names of the functions around a place

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            if each.name.split(".")[0] == "torch":
                self.known[each.asname or "torch"] = each.name if each.asname else "torch"
                self.imported[each.name] = node.lineno

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module and node.module.split(".")[0] == "torch":
            for each in node.names:
                name = f"{node.module}.{each.name}"
                self.known[each.asname or each.name] = name
                self.imported[name] = node.lineno

    def visit_Assign(self, node: ast.Assign) -> None:
        name = self.of_torch(node.value)
        if name is not None and isinstance(node.targets[0], ast.Name):
            self.known[node.targets[0].id] = name
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.of_torch(node)
        if name is not None:
            self.add(name, node)
            return
        of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if is_private(node.attr) and (node.attr not in self.own or (node.attr in TORCHS and not of_self)):
            self.found[f".{node.attr}"].append(node.lineno)
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg is not None and is_private(keyword.arg) and keyword.arg not in self.own:
                self.found[f".{keyword.arg}="].append(node.lineno)
        if isinstance(node.func, ast.Name) and node.func.id in ASKED and len(node.args) > 1:
            self.asked(node, node.args[1])
        self.generic_visit(node)

    def asked(self, node: ast.Call, name: ast.expr) -> None:
        holder = self.of_torch(node.args[0])
        text = name.value if isinstance(name, ast.Constant) else ""
        if isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
            text = name.values[0].value
        if holder is not None and text:
            self.add(f"{holder}.{text}", node)
        elif is_private(text) and text not in self.own:
            self.found[f".{text}"].append(node.lineno)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and is_private(node.value) and node.value in TORCHS:  # for a getattr elsewhere
            self.found[f".{node.value}"].append(node.lineno)

    def of_torch(self, node: ast.expr) -> str | None:
        """The full name of what is torch's."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        above = self.of_torch(node.value) if isinstance(node, ast.Attribute) else None
        return None if above is None else f"{above}.{node.attr}"

    def add(self, name: str, node: ast.expr) -> None:
        name = name.removesuffix(".__get__")
        if is_any_private(name):
            self.found[name].append(node.lineno)

    def all(self) -> Iterator[tuple[str, int]]:
        """A module that is imported for what is in it is not listed itself."""
        for name, lines in self.found.items():
            yield from ((name, line) for line in lines)
        for name, line in self.imported.items():
            if is_any_private(name) and not any(each.startswith(f"{name}.") for each in self.found):
                yield name, line


def defined(trees: list[ast.Module]) -> set[str]:
    """The names that this source gives to anything."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            names.add(node.attr if node.value.id == "self" else "")
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.rpartition(".")[2])
    return names


def used(root: Path) -> dict[str, list[str]]:
    """Where each private name stands below `root`: `file:line`."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
    own = defined([*trees.values()]) | {path.stem for path in trees}
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        names = Names(own)
        names.visit(tree)
        for name, line in names.all():
            places[name].append(f"{path.relative_to(root.parent)}:{line}")
    return places


def private_uses(places: dict[str, list[str]]) -> list[str]:
    return [
        f"{place}: {name.lstrip('.')}"
        for name, found in places.items()
        if name.lstrip(".") not in OTHERS
        for place in found
    ]


def test_one_module_reaches_into_private_torch() -> None:
    elsewhere = [use for use in private_uses(used(ROOT / "lumen")) if not use.startswith((COMPAT, *OTHER_LIBRARIES))]
    assert elsewhere == [], f"use what is public, or offer these in {COMPAT}"


def test_what_is_offered_is_used_and_what_is_used_is_offered() -> None:
    sources = {path: path.read_text() for path in (ROOT / "lumen").rglob("*.py")}
    compat = sources.pop(ROOT / COMPAT)
    asked = {name for text in sources.values() for name in re.findall(r"\b_torch_compat\.(\w+)", text)}
    assert sorted(asked - NAMES.keys() - vars(_torch_compat).keys()) == []
    assert sorted(NAMES.keys() - asked - set(re.findall(r"\bthis\.(\w+)", compat))) == [], f"take these out of {COMPAT}"


def test_what_the_module_reaches_into_is_used_there() -> None:
    compat = (ROOT / COMPAT).read_text()
    others = {name.rpartition("(")[2].rstrip("=)").rpartition(".")[2] for name in PRIVATE.keys() - NAMES.values()}
    pytree = {name.removeprefix("torch.utils._pytree.") for name in PRIVATE if name.startswith("torch.utils._pytree.")}
    assert [name for name in sorted(others - pytree) if len(re.findall(rf"\b{name}\b", compat)) < 2] == []


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_is_found(name: str) -> None:
    assert getattr(_torch_compat, name) is not None


def test_a_name_that_torch_lacks_fails_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMES, "gone", "torch._gone")
    monkeypatch.setitem(PRIVATE, "torch._gone", _torch_compat.Use("torch._gone", "a test", ("2.12",)))
    with pytest.raises(AttributeError, match=r"no torch\._gone, which Lumen uses for a test\. Install .*torch 2\.12"):
        _ = _torch_compat.gone
    with pytest.raises(AttributeError, match="has no attribute 'unheard_of'"):
        _ = _torch_compat.unheard_of


def test_the_installed_torch_has_every_name() -> None:
    assert missing() == [], f"torch {torch.__version__} lacks these: see docs/compatibility.md"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["torch._none", "torch.nn.Module._none", "torch._gone.c", "torch.nn.functional.dropout(_none=)"]
    uses = {name: _torch_compat.Use(name, "for a test") for name in [*names, "torch._C"]}
    monkeypatch.setattr(_torch_compat, "PRIVATE", uses)
    wanted = [f"{name} (for a test; found in torch 2.11, 2.12, 2.13, 2.14)" for name in names]
    assert missing() == wanted
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu150")  # a torch that nobody has tried
    assert missing() == wanted
    without = {"torch._none": _torch_compat.Use("torch._none", "where there is one", ("2.12", "2.13"))}
    monkeypatch.setattr(_torch_compat, "PRIVATE", without)
    assert missing() == ["torch._none (where there is one; found in torch 2.12, 2.13)"]
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")  # known to lack it
    assert missing() == []
    assert not has("no_such_package._x")


@pytest.mark.parametrize(
    "clone_all", [_torch_compat.clone_all, _torch_compat._clone_one_by_one]
)  # torch 2.11: the second
def test_copies_by_one_call_and_by_many(clone_all: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
    tensors = [torch.randn(3, 2).T, torch.zeros((), dtype=torch.bfloat16)]
    for tensor, copy in zip(tensors, clone_all(tensors), strict=True):
        assert torch.equal(tensor, copy)
        assert (tensor.stride(), tensor.dtype) == (copy.stride(), copy.dtype)
        assert tensor.data_ptr() != copy.data_ptr()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch._foo(1)", "torch._foo"),
        ("import torch\ntorch.nn.functional._foo", "torch.nn.functional._foo"),
        ("import torch.distributed as dist\ndist.group._foo", "torch.distributed.group._foo"),
        ("from torch import nn\nnn._foo", "torch.nn._foo"),
        ("import torch\n\nclass A(torch.nn._Foo): ...", "torch.nn._Foo"),
        ("from torch._foo import bar", "torch._foo.bar"),
        ("def f():\n    from torch.nn import _foo as bar", "torch.nn._foo"),
        ("import torch._foo", "torch._foo"),
        ("import torch._foo as bar\nbar.baz()", "torch._foo.baz"),
        ("import torch\naten = torch.ops.aten\naten._foo()", "torch.ops.aten._foo"),
        ("import torch\ngetattr(torch, '_foo')", "torch._foo"),
        ("import torch\ngetattr(torch.ops.aten, f'_foo_{1}')", "torch.ops.aten._foo_"),
        ("def f(x):\n    x._foo()", "._foo"),
        ("def f(x):\n    x.y[0]._foo.z", "._foo"),
        ("def f(x):\n    hasattr(x, '_foo')", "._foo"),
        ("class A:\n    _buffers = 1\ndef f(x):\n    x._buffers", "._buffers"),
        ("NAMES = ('_buffers',)", "._buffers"),
        ("def f(g):\n    g(1, _foo=2)", "._foo="),
    ],
)
def test_the_scan_sees(tmp_path: Path, source: str, name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text(source)
    places = used(tmp_path / "a")
    assert places == {name: [place := f"a/b.py:{len(source.splitlines())}"]}
    assert private_uses(places) == [f"{place}: {name.lstrip('.')}"]


def test_the_scan_lets_pass(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(
        "import torch\nfrom torch.utils import _pytree as trees\n\n_mine = torch.__version__\n\n\nclass A:\n"
        "    def __init__(self, b):\n        self._mine = b._mine\n        self._buffers = 1\n        f(_mine=2)\n"
    )
    assert used(tmp_path) == {"torch.utils._pytree": [f"{tmp_path.name}/b.py:2"]}
