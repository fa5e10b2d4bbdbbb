"""Nested Python data with tensors, as one JSON text and a list of tensors, without pickle."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen.checkpoint._load import listed

_SCALARS = (str, int, float, bool, type(None))


def number(value: float) -> float | str:
    """`value` for JSON, with NaN and infinities as strings; `float` converts both forms back.

    >>> from lumen.checkpoint import json_tree
    >>> json_tree.number(0.5), json_tree.number(float("-inf"))
    (0.5, '-inf')
    """
    return value if math.isfinite(value) else str(value)


def pack(value: Any) -> dict[str, Any]:
    """`value` as `{"text": …, "tensors": […]}`; raises TypeError, with its path, for an object of any other type.

    Accepts numbers, strings, bytes, None, tensors, arrays, and dicts, lists and tuples of them.

    >>> from lumen.checkpoint import json_tree
    >>> json_tree.unpack(json_tree.pack({1: (2.5, b"x"), "t": [None]}))
    {1: (2.5, b'x'), 't': [None]}
    """
    tensors: list[Tensor] = []
    return {"text": json.dumps(_packed(value, tensors, "")), "tensors": tensors}


def unpack(packed: Any) -> Any:
    """The inverse of `pack`, also after a round trip through a checkpoint."""
    return _unpacked(json.loads(packed["text"]), listed(packed["tensors"]))


def _packed(value: Any, tensors: list[Tensor], path: str) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().clone())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, np.ndarray | np.generic):
        tensors.append(torch.from_numpy(np.array(value)))
        return {"array": len(tensors) - 1}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):
        pairs = [[_packed(k, tensors, path), _packed(v, tensors, f"{path}[{k!r}]")] for k, v in value.items()]
        return {"dict": pairs}
    raise TypeError(f"its state{path} is a {type(value).__name__}, which has no plain form")


def _unpacked(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, body),) = value.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "array":
        return tensors[body].numpy()
    if kind == "bytes":
        return base64.b64decode(body)
    if kind == "dict":
        return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in body}
    items = [_unpacked(item, tensors) for item in body]
    return tuple(items) if kind == "tuple" else items
