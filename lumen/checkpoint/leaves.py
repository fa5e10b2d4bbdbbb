"""A tree as a list of leaves with names, and Python scalars as JSON.

The name of a leaf is its path of field names, dict keys and positions, joined with slashes: `params/encoder.weight`. A
slash in a key is written `~1` and a tilde `~0`, as in a JSON pointer.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, nn

from lumen import tree
from lumen.checkpoint import dtypes
from lumen.errors import CheckpointLeafError

PathKey = str | int
LeafPath = tuple[PathKey, ...]

ARRAYS = ("tensor", "numpy", "generic")
_SCALARS: dict[type, str] = {
    type(None): "none",
    bool: "bool",
    int: "int",
    float: "float",
    complex: "complex",
    str: "str",
}


def named(pytree: Any) -> tuple[list[LeafPath], list[Any], tree.Spec]:
    """The path of each leaf, the leaves, and the spec to rebuild the tree.

    Unlike in `lumen.tree`, None and empty containers are leaves, because a checkpoint records them.
    """
    accessors, values, spec = optree.tree_flatten_with_accessor(
        pytree, _is_empty, none_is_leaf=True, namespace=tree.NAMESPACE
    )
    paths = [tuple(_path_key(entry, accessor) for entry in accessor) for accessor in accessors]
    _check_unique(paths)
    return paths, values, spec


def name_of(path: Sequence[PathKey]) -> str:
    """The name of a leaf with slashes.

    >>> name_of(("opt_state", 0, "mu", "fc/1.weight"))
    'opt_state/0/mu/fc~11.weight'
    """
    return "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in path)


def kind_of(value: Any, path: Sequence[PathKey]) -> str:
    """The kind of a leaf; raises `CheckpointLeafError` for a value that a checkpoint cannot contain."""
    if type(value) in _SCALARS:
        return _SCALARS[type(value)]
    if isinstance(value, Tensor):
        problem = _tensor_problem(value)
        kind = "tensor"
    elif isinstance(value, np.ndarray | np.generic):
        dtype = value.dtype
        problem = "" if dtypes.is_numpy(dtype) else f"a numpy array of dtype {dtype!s}"
        kind = "numpy" if isinstance(value, np.ndarray) else "generic"
    elif _is_empty(value):
        return "empty"
    else:
        problem = f"a {type(value).__module__}.{type(value).__qualname__}"
        kind = ""
    if problem:
        raise CheckpointLeafError(
            f"the leaf {name_of(path)!r} is {problem}. A checkpoint can contain dense tensors, numpy arrays of numbers,"
            " int, float, complex, bool, str and None, but nothing that would have to be pickled. Convert the leaf, or"
            " keep it out of the tree: a field of an @lm.dataclass class is left out with lm.static()."
        )
    return kind


def _tensor_problem(value: Tensor) -> str:
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__module__}.{type(value).__qualname__} (a subclass of torch.Tensor)"
    if value.layout != torch.strided or value.is_quantized:
        return f"a tensor with layout {value.layout} and dtype {value.dtype}"
    if value.device.type == "meta":
        return "a tensor on the meta device, which has no values"
    if value.dtype not in dtypes.NAMES:
        return f"a tensor of dtype {value.dtype}"
    return ""


# ------------------------------------------------------------------------------------------ scalars in JSON


def encode(value: Any) -> Any:
    """A Python scalar as JSON, exact to the bit.

    >>> encode(0.1), encode(float("-inf")), encode(2**70), encode(1 - 2j)
    (0.1, 'fff0000000000000', '0x400000000000000000', [1.0, -2.0])
    """
    if type(value) is int and abs(value) >= 2**53:  # readers in other languages would round it
        return hex(value)
    if type(value) is float and not math.isfinite(value):
        return struct.pack(">d", value).hex()
    if type(value) is complex:
        return [encode(value.real), encode(value.imag)]
    return value


def decode(kind: str, value: Any) -> Any:
    """The inverse of `encode`; raises ValueError or TypeError for what `encode` does not write."""
    if kind == "int" and type(value) is str:
        return int(value, 16)
    if kind == "float" and type(value) is str:
        return struct.unpack(">d", bytes.fromhex(value))[0]
    if kind == "complex":
        real, imag = value
        return complex(decode("float", real), decode("float", imag))
    if _SCALARS.get(type(value)) != kind:
        raise ValueError(f"{value!r} is no {kind}")
    return value


# ------------------------------------------------------------------------------------------------- names


def _is_empty(node: Any) -> bool:
    children = tree.CHILDREN.get(type(node))
    if children is not None:
        return not children(node)
    return isinstance(node, dict | tuple | list | deque) and not node


def _path_key(entry: optree.PyTreeEntry, accessor: optree.PyTreeAccessor) -> PathKey:
    key = entry.field if isinstance(entry, optree.NamedTupleEntry) else entry.entry
    if type(key) in (str, int):
        return key
    raise CheckpointLeafError(
        f"the key {key!r} of {accessor.codify('tree')} is a {type(key).__name__}; in a checkpoint keys are strings or"
        f" ints. Write: {{str(key): value for key, value in ...}}"
    )


def _check_unique(paths: list[LeafPath]) -> None:
    """Raise if a dict has an int and the same number as a string among its keys: their names would be equal."""
    first_paths: dict[tuple[str, ...], LeafPath] = {}
    for path in paths:
        names = tuple(map(str, path))
        for end in range(1, len(path) + 1):
            if first_paths.setdefault(names[:end], path[:end]) != path[:end]:
                raise CheckpointLeafError(
                    f"two entries of the tree have the name {name_of(path[:end])!r}: a dict has the keys"
                    f" {int(path[end - 1])} and '{path[end - 1]}'. Rename one."
                )
