"""Floating point operations of what torch's own counter counts as none: `torch.utils.flop_counter` of torch 2.13."""

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
        _torch_compat.aten_attention_cpu: _attention,
        _torch_compat.aten_attention_cpu_backward: _attention_backward,
        _torch_compat.aten_grouped_mm: _grouped_product,
        **dict.fromkeys((aten.addmm_, aten.addmv, aten.addmv_), _added_product),
        **dict.fromkeys((aten.baddbmm_, aten.addbmm, aten.addbmm_), _added_batches),
        **dict.fromkeys((aten.mv, aten.dot, aten.vdot), _vector_product),
        aten.mkldnn_rnn_layer: _rnn_layer,
        aten.mkldnn_rnn_layer_backward: _twice(_rnn_layer),
        _torch_compat.aten_cudnn_rnn: _rnn,
        _torch_compat.aten_cudnn_rnn_backward: _twice(_rnn),
        aten.miopen_rnn: _rnn,
        aten.miopen_rnn_backward: _twice(_rnn),
    }


def _attention(q: Any, k: Any, v: Any, *_args: Any, **_options: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(q, k, v))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_args: Any, **_options: Any) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return int(sdpa_backward_flop_count(grad, q, k, v))


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
