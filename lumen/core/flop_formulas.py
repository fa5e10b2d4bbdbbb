"""Floating point operations of what torch's own counter leaves out: `torch.utils.flop_counter`, by its versions.

Torch 2.13 counts most of them as none; torch 2.11 also raises for attention with grouped heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lumen.core import _torch_compat

Shape = torch.Size
Formula = Callable[..., int]


def formulas() -> dict[Any, Formula]:
    """By the operation, functions of its arguments, with shapes in place of tensors."""
    aten = torch.ops.aten
    return {
        _torch_compat.scaled_dot_product_flash_attention_for_cpu: _attention,
        _torch_compat.scaled_dot_product_flash_attention: _attention,
        _torch_compat.scaled_dot_product_efficient_attention: _attention,
        _torch_compat.scaled_dot_product_cudnn_attention: _attention,
        _torch_compat.scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        _torch_compat.scaled_dot_product_flash_attention_backward: _attention_backward,
        _torch_compat.scaled_dot_product_efficient_attention_backward: _attention_backward,
        _torch_compat.scaled_dot_product_cudnn_attention_backward: _attention_backward,
        _torch_compat.grouped_mm: _grouped_product,
        **dict.fromkeys((aten.addmm_, aten.addmv, aten.addmv_), _added_product),
        **dict.fromkeys((aten.baddbmm_, aten.addbmm, aten.addbmm_), _added_batches),
        **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _vector_product),
        aten.mkldnn_rnn_layer: _rnn_layer,
        aten.mkldnn_rnn_layer_backward: _twice(_rnn_layer),
        _torch_compat.cudnn_rnn: _rnn,
        _torch_compat.cudnn_rnn_backward: _twice(_rnn),
        aten.miopen_rnn: _rnn,
        aten.miopen_rnn_backward: _twice(_rnn),
    }


def _attention(q: Shape, k: Shape, v: Shape, *_args: Any, **_options: Any) -> int:
    """Two products for each head of the queries: grouped heads of keys and values are repeated for them."""
    return _product_with_scores(q, k) + _product_with_scores(q, v)


def _attention_backward(_grad: Shape, q: Shape, k: Shape, v: Shape, *_args: Any, **_options: Any) -> int:
    """The scores once more, and the gradients of both products, as in FlashAttention (Dao et al., 2022)."""
    return 3 * _product_with_scores(q, k) + 2 * _product_with_scores(q, v)


def _product_with_scores(q: Shape, other: Shape) -> int:
    """For keys `[B, H, T, D]` the scores `[B, H, S, T]` of the queries; for values, the product of these with them."""
    return 2 * math.prod(q[:-1]) * math.prod(other[-2:])


def _added_product(_added: Shape, x: Shape, y: Shape, *_args: Any, **_options: Any) -> int:
    """A sum with `[M, K] @ [K, N]`, or with `[M, K] @ [K]`."""
    return _vector_product(x, y) * math.prod(y[1:])


def _vector_product(x: Shape, _y: Shape, *_args: Any, **_options: Any) -> int:
    """`[M, K] @ [K]`, or `[K] @ [K]`."""
    return 2 * math.prod(x)


def _added_batches(_added: Shape, x: Shape, y: Shape, *_args: Any, **_options: Any) -> int:
    """A sum with `[B, M, K] @ [B, K, N]`, or with the sum of these over B."""
    return 2 * math.prod(x) * y[-1]


def _grouped_product(x: Shape, y: Shape, *_args: Any, **_options: Any) -> int:
    """Products of groups: the rows, the columns or the inner entries of a matrix are divided among them."""
    groups = x[0] if len(x) == len(y) == 3 else 1
    return 2 * groups * x[-2] * x[-1] * y[-1]


def _rnn_layer(steps: Shape, inner: Shape, hidden: Shape, *_args: Any, **_options: Any) -> int:
    """One direction of a layer: each of `[T, B]` inputs meets the weights of the input and of the hidden state."""
    return 2 * math.prod(steps[:-1]) * (math.prod(inner) + math.prod(hidden))


def _rnn(steps: Shape, weights: Sequence[Shape], *_args: Any, **_options: Any) -> int:
    """All layers and directions: each of `[T, B]` inputs meets each matrix."""
    return 2 * math.prod(steps[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)


def _twice(formula: Formula) -> Formula:
    """The backward pass: the gradients of the inputs and of the weights."""
    return lambda *args, **options: 2 * formula(*args, **options)
