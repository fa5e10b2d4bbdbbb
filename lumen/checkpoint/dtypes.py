"""The dtypes that a checkpoint can contain, by name, and the dtype that stores each on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# Zarr lacks these dtypes, so they are stored as integers of the same size.
_AS_BITS = {"float8_e8m0fnu": "uint8", "float4_e2m1fn_x2": "uint8", "complex32": "uint32", "bcomplex32": "uint32"}

_NAMES = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *_AS_BITS,
)

# Recent dtypes, and the torch version that added them; reading one with an older torch raises an error.
SINCE = {"bcomplex32": "2.14"}

TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}

# Tensors are copied as integers, so that no bit of a NaN changes; there is no integer of the size of complex128.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same element size."""
    return tensor.view(_BITS[tensor.element_size()])


def carrier(name: str) -> str:
    """The name of the dtype that stores these bits on disk."""
    return _AS_BITS.get(name, name)


def itemsize(name: str) -> int:
    """The bytes of one element."""
    return TORCH[name].itemsize


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name; those that NumPy lacks come from ml_dtypes, a dependency of Orbax."""
    try:
        dtype: np.dtype[Any] = np.dtype(name)
    except TypeError:
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, name))
    return dtype


def is_numpy(dtype: np.dtype[Any]) -> bool:
    """Whether an array of this dtype can be saved."""
    return dtype.isnative and dtype.name in TORCH and dtype.fields is None
