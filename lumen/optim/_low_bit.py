"""How an optimizer stores its averages over steps, in which dtype, and how it rounds them and 16-bit params.

The random bits of a rounding follow from a key in the state, the update count, and the entry's place in the full leaf.
So a resumed run draws those of the uninterrupted one, and a rank of `lm.fsdp` those of one process.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import random, tree
from lumen.core import sharding
from lumen.core.dtypes import wide_dtype
from lumen.errors import HyperparameterError, ParamsError
from lumen.optim._hyperparams import HParams, device_of
from lumen.optim._numerics import as_tree
from lumen.optim._param_names import dotted_names
from lumen.optim._quantized import Quantized, dequantize, quantize, quantized_zeros, round_to_bf16
from lumen.random._rounding_bits import counted_keys, rounding_bits

StateDtype = Literal["int8", "bf16"] | torch.dtype | None
KEY = "rounding_key"  # its name among the hyperparameters

_DTYPES: dict[Any, Any] = {
    None: None,
    "int8": torch.int8,
    "bf16": torch.bfloat16,
    **{dtype: dtype for dtype in (torch.int8, torch.bfloat16, torch.float32, torch.float64)},
}
_LEAST_SIZE, _LEAST_WIDTH = 4096, 32  # smaller leaves, and those with shorter rows, would save little


class Storage:
    """The dtype of an optimizer's averages, and whether it rounds bfloat16 params stochastically."""

    def __init__(self, rule: str, state_dtype: StateDtype, stochastic_rounding: bool = False) -> None:
        if state_dtype not in _DTYPES:
            raise HyperparameterError(
                f'{rule}(state_dtype={state_dtype!r}) is not allowed: give "int8", "bf16", torch.float32 or'
                f' torch.float64, or None for the dtype of the params, at least float32: {rule}(…, state_dtype="int8")'
            )
        self.dtype: torch.dtype | None = _DTYPES[state_dtype]
        self.is_low_bit = self.dtype in (torch.int8, torch.bfloat16)
        self.rounds_params = stochastic_rounding
        self.is_rounding = self.is_low_bit or stochastic_rounding
        self.reason = ""
        if self.is_low_bit:
            self.reason = f"{rule}(state_dtype={state_dtype!r}) rounds each row by random bits for its place"
        elif stochastic_rounding:
            self.reason = f"{rule}(stochastic_rounding=True) rounds each row by random bits for its place"

    def fields(self) -> dict[str, Any]:
        """What a `GradientTransformation` says about it."""
        return {"needs_rows": self.reason, "rounds_params": self.rounds_params}

    def with_key(self, hparams: HParams, params: Any) -> HParams:
        """The hyperparameters, with the key of the rounding if there is one; checks the params' dtypes."""
        if self.rounds_params:
            _check_dtypes(params)
        if not self.is_rounding:
            return hparams
        return {**hparams, KEY: random.key(0).to(device_of(params))}

    def zeros(self, params: Any, signed: bool = True) -> Any:
        """Zeros in the shapes of `params`: of a mean, or if not `signed` of a mean of squares."""
        if self.dtype != torch.int8:
            return tree.map(lambda p: torch.zeros_like(p, dtype=self.dtype or wide_dtype(p.dtype)), params)
        full = as_tree(_full_shapes(params), params)

        def leaf(p: Tensor, shape: _Shape) -> Any:
            if shape.is_quantized and wide_dtype(p.dtype) == torch.float32:
                return quantized_zeros(p, signed)
            return torch.zeros_like(p, dtype=wide_dtype(p.dtype))

        return tree.map(leaf, params, full)

    def noises(self, hparams: HParams, count: Tensor, params: Any) -> list[LeafNoise]:
        """The source of random bits for each leaf of `params` in the update after `count`; [] if none is needed."""
        if not self.is_rounding:
            return []
        key = hparams[KEY]
        leaves = tree.leaves(params)
        keys = counted_keys(key.to(leaves[0].device), count.to(leaves[0].device), 2 * len(leaves))
        starts = _starts(params)
        return [
            LeafNoise(keys[2 * i], keys[2 * i + 1] if self.rounds_params else None, start)
            for i, start in enumerate(starts)
        ]

    def noise_tree(self, hparams: HParams, count: Tensor, params: Any) -> Any:
        """The same as a tree like `params`, or an empty tuple."""
        noises = self.noises(hparams, count, params)
        return as_tree(noises, params) if noises else ()


class LeafNoise:
    """The random bits for the moments of one leaf, and for its param if that is rounded too.

    `start` is the flat index in the full leaf of the first entry here.
    """

    __slots__ = ("_moments", "_param", "_start")

    def __init__(self, moments: Tensor, param: Tensor | None, start: int) -> None:
        self._moments, self._param, self._start = moments, param, start

    @property
    def rounds_param(self) -> bool:
        """Whether the param is rounded stochastically."""
        return self._param is not None

    def for_moments(self, shape: torch.Size, first: int = 0) -> tuple[Tensor, Tensor]:
        """Sixteen bits for each entry of two moments, those from flat index `first` here."""
        words = rounding_bits(self._moments, shape, self._start + first)
        return words & 0xFFFF, (words >> 16).bitwise_and_(0xFFFF)

    def for_param(self, shape: torch.Size, first: int = 0) -> Tensor | None:
        """Sixteen bits for each entry of the param; None if it is rounded to nearest."""
        return None if self._param is None else rounding_bits(self._param, shape, self._start + first) & 0xFFFF


def loaded(leaf: Tensor | Quantized | None) -> Any:
    """The moment as a tensor."""
    return dequantize(leaf) if isinstance(leaf, Quantized) else leaf


def is_rounded(moment: Any) -> bool:
    """Whether a moment is stored with stochastic rounding."""
    return isinstance(moment, Quantized) or (isinstance(moment, Tensor) and moment.dtype == torch.bfloat16)


def moment_bits(noise: LeafNoise | None, moment: Any) -> tuple[Tensor | None, Tensor | None]:
    """The bits for the first and the second moment of a leaf, the first of which is `moment`."""
    if noise is None or not is_rounded(moment):
        return None, None
    return noise.for_moments(moment.codes.shape if isinstance(moment, Quantized) else moment.shape)


def stored(x: Tensor, like: Any, bits: Tensor | None) -> Any:
    """`x` in the format of `like`, rounded by `bits` if that is narrower."""
    if bits is None:
        return x.to(like.dtype)
    if x.requires_grad:
        raise HyperparameterError(
            "an update with a low-bit state or with stochastic rounding was differentiated, and the rounding has no"
            " derivative. Leave out state_dtype and stochastic_rounding where gradients pass through the optimizer."
        )
    if isinstance(like, Quantized):
        return quantize(x, bits, signed=like.codes.dtype == torch.int8)
    return round_to_bf16(x, bits)


def rounded_update(update: Tensor, wide_p: Tensor, p: Tensor, noise: LeafNoise | None) -> Tensor:
    """The update that makes `p`, in its own dtype, one of the two values next to `wide_p + update`."""
    bits = None if noise is None or p.dtype != torch.bfloat16 else noise.for_param(p.shape)
    return update if bits is None else stored(wide_p + update, p, bits).to(wide_p.dtype) - wide_p


class _Shape:
    """The shape of a full leaf, as a leaf of a tree."""

    def __init__(self, shape: torch.Size) -> None:
        width = math.prod(shape[1:])
        self.is_quantized = len(shape) > 1 and shape[0] * width >= _LEAST_SIZE and width >= _LEAST_WIDTH


def _full_shapes(params: Any) -> list[_Shape]:
    gatherer = sharding.param_gatherer()
    if gatherer is None:
        return [_Shape(p.shape) for p in tree.leaves(params)]
    return [_Shape(gatherer.shape(name)) for name in dotted_names(params)]


def _starts(params: Any) -> list[int]:
    """The flat index in the full leaf of the first entry of each leaf of `params`."""
    leaves = tree.leaves(params)
    gatherer = sharding.param_gatherer()
    if gatherer is None:
        return [0] * len(leaves)
    names = dotted_names(params)
    return [gatherer.first_row(name) * math.prod(p.shape[1:]) for name, p in zip(names, leaves, strict=True)]


def _check_dtypes(params: Any) -> None:
    dtypes = {leaf.dtype for leaf in tree.leaves(params)}
    if torch.float16 in dtypes or torch.bfloat16 not in dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ParamsError(
            f"stochastic_rounding=True rounds bfloat16 params, and these are {names}. Cast the model, net.bfloat16(),"
            " or leave stochastic_rounding out."
        )
