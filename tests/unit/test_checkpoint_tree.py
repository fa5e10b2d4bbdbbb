"""A tree goes to disk and comes back: to the bit, in its place, under its name."""

from __future__ import annotations

import math
import random
import re
import struct
import warnings
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lumen as lm
from lumen import checkpoint
from lumen.checkpoint import dtypes, leaves, orbax_names
from lumen.checkpoint.snapshot import HostMemory, take_snapshot
from lumen.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointFormatError,
    CheckpointLeafError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    InexactWarning,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")

Pair = namedtuple("Pair", "mu nu")


@lm.dataclass
class Slice:
    inner: object
    unit: str = lm.static(default="m")


@lm.dataclass
class Nothing:
    pass


def as_bytes(leaf):
    """Everything about a leaf that must survive."""
    if isinstance(leaf, torch.Tensor):
        data = dtypes.bits(leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()).numpy().tobytes()
        return type(leaf), leaf.dtype, leaf.shape, leaf.requires_grad, data
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf), leaf.dtype, leaf.shape, leaf.tobytes()
    if isinstance(leaf, float):
        return float, struct.pack(">d", leaf)
    if isinstance(leaf, complex):
        return complex, struct.pack(">dd", leaf.real, leaf.imag)
    return type(leaf), leaf


def assert_same(found, expected):
    names, values, spec = leaves.named(expected)
    found_names, found_values, found_spec = leaves.named(found)
    assert (found_names, found_spec) == (names, spec)
    for name, value, other in zip(names, values, found_values, strict=True):
        assert as_bytes(other) == as_bytes(value), name


def blank(leaf):
    """Another leaf of the same kind, with other values."""
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(blank(leaf.detach()), requires_grad=leaf.requires_grad)
    if isinstance(leaf, torch.Tensor):
        zeros = torch.zeros(leaf.numel() * leaf.element_size(), dtype=torch.uint8).view(leaf.dtype).view(leaf.shape)
        return zeros.requires_grad_(leaf.requires_grad)
    if isinstance(leaf, np.ndarray | np.generic):
        return np.zeros(leaf.shape, leaf.dtype)[()] if isinstance(leaf, np.generic) else np.zeros_like(leaf)
    return leaf if leaf is None or leaves.kind_of(leaf, ()) == "empty" else type(leaf)()


def blank_like(tree):
    _, values, spec = leaves.named(tree)
    return lm.tree.unflatten(spec, [blank(value) for value in values])


# --------------------------------------------------------------------------------------------- round trip

NAMES = st.text(max_size=6) | st.sampled_from(
    ["fc.weight", "a/b", "", ".", "..", "_METADATA", "d", "c", "zarr.json", "é", "A.b", "a.b", "%", "~", "x" * 300]
)


@st.composite
def tensors(draw):
    name = draw(st.sampled_from(sorted(dtypes.TORCH)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = math.prod(shape) * dtypes.itemsize(name)
    data = draw(st.binary(min_size=size, max_size=size))
    if name == "bool":
        data = bytes(byte & 1 for byte in data)
    flat = torch.tensor(list(data), dtype=torch.uint8).view(dtypes.TORCH[name])
    tensor = flat.view(shape)
    if len(shape) > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if tensor.dtype in (torch.complex64, torch.complex128) and draw(st.booleans()):
        tensor = tensor.conj()
    if tensor.dtype in (torch.float32, torch.bfloat16) and draw(st.booleans()):
        tensor = tensor.requires_grad_() if draw(st.booleans()) else nn.Parameter(tensor)
    return tensor


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(["bool", "int8", "uint16", "int64", "float16", "float32", "float64", "complex64"]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * np.dtype(dtype).itemsize
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8 if dtype == "bool" else dtype)
    array = array.astype(bool) if dtype == "bool" else array
    array = array.reshape(shape).T  # read-only, and not contiguous
    return array[(0,) * len(shape)] if array.size and draw(st.booleans()) else array


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.complex_numbers(allow_nan=True)
    | st.binary(min_size=8, max_size=8).map(lambda b: struct.unpack(">d", b)[0])
    | st.sampled_from([2**53, -(2**53), 2**200, -0.0, math.inf, -math.inf, 5e-324, "\ud800"])
)  # fmt: skip
TREES = st.recursive(
    tensors() | arrays() | SCALARS,
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=4)
        | st.dictionaries(st.integers(-2, 9), inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Pair, inner, inner)
        | st.builds(Slice, inner)
        | st.just(Nothing())
        | st.dictionaries(NAMES, inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=8,
)


@given(tree=TREES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_tree_comes_back_to_the_bit(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trip") / "checkpoint"
    checkpoint.save(path, tree, extra={"again": tree})
    assert_same(checkpoint.restore(path, blank_like(tree)), tree)
    loaded = checkpoint.load(path, item="extra")["again"]
    for way, value in zip(*leaves.named(tree)[:2], strict=True):
        node = loaded
        for part in way:
            node = node[part]
        if leaves.kind_of(value, way) != "empty":
            plain = value.detach() if isinstance(value, torch.Tensor) else value
            assert as_bytes(node) == as_bytes(plain)


@pytest.mark.parametrize("name", sorted(dtypes.TORCH))
def test_every_bit_of_every_dtype(tmp_path, name):
    bits = (
        torch.arange(256, dtype=torch.uint8).repeat(16) if name != "bool" else torch.tensor([0, 1], dtype=torch.uint8)
    )
    tensor = bits.roll(3).view(dtypes.TORCH[name])
    store = checkpoint.Store(tmp_path)
    with store:
        store.save(0, {"x": tensor})
    assert_same(store.restore(0, {"x": blank(tensor)}), {"x": tensor})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_dtype_of_torch_is_carried_or_refused_by_name():
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    refused = every - set(dtypes.NAMES)
    assert len(refused) == len(every) - len(dtypes.NAMES)
    for dtype in refused:  # one that a later torch gains too
        with pytest.raises(CheckpointLeafError, match=rf"the leaf 'x' is a tensor .*{re.escape(str(dtype))}\."):
            leaves.kind_of(torch.empty(2, dtype=dtype), ("x",))
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        # Quantized ones, and shells without operators.
        assert all(re.search(r"\.(q|bits|u?int[1-7]$)", str(dtype)) for dtype in refused)


def test_a_dtype_that_the_installed_torch_lacks_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path, {"a": {"w": torch.ones(2).half()}})
    monkeypatch.setitem(dtypes.SINCE, "float16", "9.1")
    monkeypatch.delitem(dtypes.TORCH, "float16")
    with pytest.raises(CheckpointFormatError, match=r"'a/w' has dtype float16, .*torch 9\.1 or newer, pip install"):
        checkpoint.load(path)


def test_tied_tensors_and_views_of_one(tmp_path):
    base = torch.randn(4, 4)
    tree = {"a": base, "b": base, "row": base[1], "column": base[:, 1], "expanded": base[:1].expand(3, 4)}
    checkpoint.save(tmp_path / "x", tree)
    assert_same(checkpoint.restore(tmp_path / "x", blank_like(tree)), tree)


def test_a_train_state(tmp_path):
    state = lm.TrainState.create(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), lm.optim.adamw(1e-3), seed=3)
    other = lm.TrainState.create(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), lm.optim.adamw(1e-3))
    other = other.replace(apply_fn=state.apply_fn, tx=state.tx)
    checkpoint.save(tmp_path / "x", state)
    assert_same(checkpoint.restore(tmp_path / "x", other), state)
    assert "params/0.weight" in checkpoint.metadata(tmp_path / "x")["leaves"]


# ------------------------------------------------------------------------------------------- what is refused


def sparse():
    with warnings.catch_warnings(action="ignore"):  # torch 2.11 warns of checks that are asked for
        return torch.sparse_coo_tensor(size=(2, 2), check_invariants=True)


@pytest.mark.parametrize(
    ("leaf", "what"),
    [
        (object(), "builtins.object"),
        (b"bytes", "builtins.bytes"),
        ({1, 2}, "builtins.set"),
        (torch.float32, "torch.dtype"),
        (lambda: 0, "builtins.function"),
        (np.array(["a"]), "<U1"),
        (np.array([object()]), "object"),
        (np.zeros(2, ">f4"), ">f4"),
        (np.zeros(2, "datetime64[s]"), "datetime64"),
        (np.zeros(2, [("a", "f4")]), "'a'"),
        (torch.zeros(2, device="meta"), "meta device"),
        (sparse(), "sparse"),
        (torch.zeros(2).as_subclass(type("Mine", (torch.Tensor,), {})), "subclass of torch.Tensor"),
    ],
)
def test_another_leaf_is_refused_by_name_and_nothing_is_written(tmp_path, leaf, what):
    with pytest.raises(CheckpointLeafError, match=f"'opt/0/odd~1name' is .*{re.escape(what)}") as caught:
        checkpoint.save(tmp_path / "x", {"opt": [{"odd/name": leaf}]})
    assert isinstance(caught.value, lm.LumenError | TypeError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({(1, 2): 0}, "strings or ints"),
        ({True: 0}, "strings or ints"),
        ({0: 1, "0": 2}, "keys 0 and '0'"),
        ({"a": {1: {"b": 0}, "1": {"c": 0}}}, "'a/1'.*keys 1 and '1'"),
    ],
)
def test_keys_that_cannot_be_names(tmp_path, tree, message):
    with pytest.raises(CheckpointLeafError, match=message):
        checkpoint.save(tmp_path / "x", tree)


@pytest.mark.parametrize("meta", [{"x": torch.ones(1)}, {1: 2}, {"a": [{"b": {None: 1}}]}, {"s": {1, 2}}])
def test_meta_is_json(tmp_path, meta):
    with pytest.raises(CheckpointError, match="meta must be JSON"):
        checkpoint.save(tmp_path / "x", {}, meta=meta)


def test_something_there_already_is_not_touched(tmp_path):
    (tmp_path / "x").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("x", "link"):
        with pytest.raises(CheckpointExistsError, match="exists; a checkpoint is written to a new directory"):
            checkpoint.save(tmp_path / name, {"a": 1})
    assert (tmp_path / "x").read_text() == "mine"


# --------------------------------------------------------------------------------------------------- names


@given(paths=st.lists(st.lists(NAMES, max_size=4).map(tuple), unique=True, max_size=12))
def test_names_stay_apart_and_inside(paths):
    leaf_paths = [p for p in paths if not any(q != p and q[: len(p)] == p for q in paths)]
    keys = orbax_names.array_keys(leaf_paths)
    directories = [orbax_names.directory_of(each) for each in keys]
    assert len({each.casefold() for each in directories}) == len(keys)
    assert orbax_names.array_keys(leaf_paths) == keys
    for each in directories:
        assert 0 < len(each.encode()) <= 230
        assert re.fullmatch(r"[ -~]+", each)
        assert not re.search(r"[/\\]", each)
        assert each[0] != "."
        assert not orbax_names._RESERVED.fullmatch(each)


@given(st.text())
def test_escaping_is_reversible(key):
    from urllib.parse import unquote_to_bytes

    escaped = orbax_names.escape(key)
    found = b"" if escaped == "%" else unquote_to_bytes(escaped)
    assert found == key.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", ["fc.weight", "layers.0.attn.in_proj_weight", "a-b_c", "m[0]", "x y"])
def test_ordinary_names_stay(name):
    assert orbax_names.array_keys([("params", name)]) == [("params", name)]


# ---------------------------------------------------------------------------------------------- host memory


def test_host_memory_is_used_again():
    memory = HostMemory()
    tree = {"a": torch.ones(1000), "b": torch.ones(3, dtype=torch.int8)}
    first = take_snapshot({"state": tree}, memory)
    block = memory.allocate(0, pinned=False).data_ptr()
    tree["a"].zero_()  # the step goes on
    assert all(array.all() for array in first.data.values())
    second = take_snapshot({"state": tree}, memory)
    assert memory.allocate(0, pinned=False).data_ptr() == block
    addresses = [[array.ctypes.data for array in each.data.values()] for each in (first, second)]
    assert addresses[0] == addresses[1]
    take_snapshot({"state": {"a": torch.ones(5000)}}, memory)  # more than there is
    assert memory.allocate(0, pinned=False).numel() >= 20000
    memory.release()


# ---------------------------------------------------------------------------------------------------- restore


def saved(tmp_path, tree, **kwargs):
    checkpoint.save(tmp_path / "x", tree, **kwargs)
    return tmp_path / "x"


def test_one_error_lists_everything(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(2), "b": torch.ones(3), "c": 1, **{f"old{i}": i for i in range(30)}})
    like = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(4), "c": 1.0, "new": torch.ones(5)}
    with pytest.raises(CheckpointMismatchError) as caught:
        checkpoint.restore(path, like)
    text = str(caught.value)
    for line in (
        "missing from the checkpoint (1):\n  new: float32[5]",
        "not in `like` (30):\n  old0\n",
        "  and 10 more",
        "different (3):\n  a: float32[2] in the checkpoint, float64[2] wanted\n",
        "  b: float32[3] in the checkpoint, float32[4] wanted",
        "  c: a Python int in the checkpoint, a Python float wanted",
        "strict=False",
        "rename=",
        "cast=True",
    ):
        assert line in text, line
    assert "old25" not in text


def test_not_strict_keeps_and_warns_once(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(2), "gone": 1, "none": {}})
    like = {"a": torch.zeros(2), "new": torch.full((2,), 7.0), "none": {"x": 3}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoint.restore(path, like, strict=False)
    assert [each.category for each in caught] == [InexactWarning]
    text = str(caught[0].message)
    assert "kept as in `like` (2):\n  new: float32[2]\n  none/x: a Python int" in text
    assert "ignored (1):\n  gone" in text
    assert_same(found, {"a": torch.ones(2), "new": torch.full((2,), 7.0), "none": {"x": 3}})
    assert found["new"] is like["new"]
    with pytest.raises(CheckpointMismatchError, match="different"):
        checkpoint.restore(path, {"a": torch.zeros(3)}, strict=False)


def test_a_new_head_on_an_old_body(tmp_path):
    path = saved(tmp_path, {"params": {"body.w": torch.ones(2), "head.w": torch.ones(10)}})
    like = {"params": {"net.body.w": torch.zeros(2), "net.head.w": torch.zeros(3)}}
    for rename in (
        {"params/": "params/net.", "params/head": None},
        lambda name: None if "head" in name else name.replace("params/", "params/net."),
    ):
        with pytest.warns(InexactWarning, match="net.head.w"):
            found = checkpoint.restore(path, like, rename=rename, strict=False)
        assert_same(found, {"params": {"net.body.w": torch.ones(2), "net.head.w": torch.zeros(3)}})
    with pytest.raises(CheckpointError, match="two leaves the name 'one'"):
        checkpoint.restore(path, like, rename=lambda _: "one")


def test_casts(tmp_path):
    tree = {"f": torch.randn(3), "i": torch.tensor([1, -5]), "u": np.array([3], np.uint64)}
    path = saved(tmp_path, tree)
    like = {
        "f": torch.zeros(3, dtype=torch.bfloat16),
        "i": np.zeros(2, np.int8),
        "u": torch.zeros(1, dtype=torch.uint8),
    }
    expected = {"f": tree["f"].bfloat16(), "i": np.array([1, -5], np.int8), "u": torch.tensor([3], dtype=torch.uint8)}
    assert_same(checkpoint.restore(path, like, cast=True), expected)
    for bad in ({**like, "f": torch.zeros(3, dtype=torch.int32)}, {**like, "i": torch.zeros(2, dtype=torch.bool)}):
        with pytest.raises(CheckpointMismatchError, match="different"):
            checkpoint.restore(path, bad, cast=True)
    with pytest.raises(CheckpointMismatchError, match="i has values that do not fit into uint8"):
        checkpoint.restore(path, {**like, "i": torch.zeros(2, dtype=torch.uint8)}, cast=True)


def test_large_unsigned_ints_do_not_wrap(tmp_path):
    path = saved(tmp_path, {"u": np.array([2**64 - 1], np.uint64)})
    with pytest.raises(CheckpointMismatchError, match="do not fit into int64"):
        checkpoint.restore(path, {"u": torch.zeros(1, dtype=torch.int64)}, cast=True)


def test_meta_leaves_are_shapes(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(3.0)})
    found = checkpoint.restore(path, {"a": torch.empty(3, device="meta")})
    assert_same(found, {"a": torch.arange(3.0)})
    assert checkpoint.restore(path, {"a": torch.empty(3)}, device="meta")["a"].is_meta


def test_like_is_not_changed_and_shares_no_memory(tmp_path):
    like = {"a": torch.zeros(3)}
    found = checkpoint.restore(saved(tmp_path, {"a": torch.ones(3)}), like)
    found["a"].add_(1)
    assert like["a"].tolist() == [0, 0, 0]


def test_load_part_by_part(tmp_path):
    tree = {"params": {"w": torch.ones(2), "wide": torch.zeros(1)}, "opt": (1, {"mu": 2}), "a/b": 3}
    path = saved(tmp_path, tree, extra={"n": 5})
    assert checkpoint.load(path, under="opt") == {0: 1, 1: {"mu": 2}}
    assert checkpoint.load(path, under="opt/1/mu") == 2
    assert checkpoint.load(path, under="a~1b") == 3
    assert list(checkpoint.load(path, under="params")) == ["w", "wide"]
    assert_same(checkpoint.load(path, under="params/w"), torch.ones(2))
    assert checkpoint.load(path, item="extra") == {"n": 5}
    with pytest.raises(CheckpointNotFoundError, match=r"nothing under 'par'; it has a~1b, opt, params"):
        checkpoint.load(path, under="par")
    with pytest.raises(CheckpointError, match="items state and extra"):
        checkpoint.load(path, item="meta")
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="not written by Lumen"):
        checkpoint.load(tmp_path)


def test_metadata(tmp_path):
    path = saved(
        tmp_path, {"w": torch.ones(2, 3).half(), "n": float("-inf"), "e": {}}, extra=[4], meta={"a": [None, 1]}
    )
    found = checkpoint.metadata(path)
    assert found["leaves"] == {
        "w": {"kind": "tensor", "dtype": "float16", "shape": (2, 3)},
        "n": {"kind": "float", "value": -math.inf},
        "e": {"kind": "empty"},
    }
    assert found["extra"] == {"0": {"kind": "int", "value": 4}}
    assert (found["meta"], found["format"], found["torch"]) == ({"a": [None, 1]}, 1, torch.__version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["time"])
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in path.rglob("*") if p.is_file())


# -------------------------------------------------------------------------------------------------------- rng


def draws():
    return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), [random.gauss(0, 1) for _ in range(3)]  # noqa: NPY002


@pytest.mark.parametrize("before", range(3))
def test_generators_go_on_where_they_were(tmp_path, before):
    for _ in range(before):  # an odd number of normal draws leaves one in store
        torch.randn(1), np.random.standard_normal(), random.gauss(0, 1)  # noqa: NPY002
    path = saved(tmp_path, {}, extra={"rng": checkpoint.rng.capture()})
    expected = draws()
    draws()
    checkpoint.rng.restore(checkpoint.load(path, item="extra")["rng"])
    assert draws() == expected


def test_no_generator_is_half_restored():
    state = checkpoint.rng.capture()
    expected = draws()
    for name in ("torch", "numpy", "python"):
        with pytest.raises(CheckpointError, match="not what lm.checkpoint.rng.capture"):
            checkpoint.rng.restore({**state, name: {}})
    checkpoint.rng.restore(state)
    assert draws() == expected
    if not torch.cuda.is_available():
        with pytest.warns(InexactWarning, match="CUDA devices 0 were not restored"):
            checkpoint.rng.restore({**state, "cuda": {"0": torch.zeros(16, dtype=torch.uint8)}})
