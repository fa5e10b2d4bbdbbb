"""The dtypes that a checkpoint holds, by name, and what carries each on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# Zarr has no such types: their bits travel as integers of the same size.
_AS_BITS = {"float8_e8m0fnu": "uint8", "float4_e2m1fn_x2": "uint8", "complex32": "uint32", "bcomplex32": "uint32"}

_NAMES = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *_AS_BITS,
)

# A dtype that torch gained lately is carried where the installed torch has it, and refused by name where it has not.
SINCE = {"bcomplex32": "2.14"}

TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}

# Copies go through integers, so that no bit of a NaN is lost on the way; complex128 has none of its size.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory seen as integers of the same size."""
    return tensor.view(_BITS[tensor.element_size()])


def carrier(name: str) -> str:
    """The name of the dtype that holds these bits on disk."""
    return _AS_BITS.get(name, name)


def itemsize(name: str) -> int:
    """Bytes of one element."""
    return TORCH[name].itemsize


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of that name; those of machine learning come from ml_dtypes, which Orbax brings along."""
    try:
        found: np.dtype[Any] = np.dtype(name)
    except TypeError:
        import ml_dtypes

        found = np.dtype(getattr(ml_dtypes, name))
    return found


def is_numpy(dtype: np.dtype[Any]) -> bool:
    """Whether an array of this dtype can be saved."""
    return dtype.isnative and dtype.name in TORCH and dtype.fields is None
