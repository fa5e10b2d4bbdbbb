"""`lm.losses.linear_cross_entropy`: the product with a language model's head and the cross-entropy, in chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lumen.core.annotations import integer_of
from lumen.core.arguments import check, describe
from lumen.core.metrics import Mean
from lumen.errors import LossError
from lumen.losses._chunked import Settings, VocabularyShard, total_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk: int | None = None,
) -> Mean:
    """The cross-entropy of the logits `hidden @ weight.T + bias`, which never exist as a whole.

    The logits of `chunk` tokens at a time are computed, together with their gradients, and freed again. What a step
    holds beside its params is then one chunk of logits and a gradient of `weight`, instead of several tensors of
    `tokens × vocabulary`.

    Args:
        hidden: What the head reads, `[..., features]`, of a floating dtype, which is that of the products.
        weight: The head's weight, `[vocabulary, features]`.
        targets: The class of each token, integers of shape `[...]`. Tokens whose target is `ignore_index` count
            nothing.
        weights: How much each token counts, of a shape that broadcasts to `[...]`; all count 1 by default. Tokens of
            weight zero count nothing.
        bias: The head's bias, `[vocabulary]`.
        label_smoothing: The share of each target that is spread over all classes, from 0 to 1 (Szegedy et al. 2015,
            arXiv 1512.00567).
        z_loss: The factor of the squared logarithm of the softmax's denominator, which is added to the loss of each
            token (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
        soft_cap: Replaces the logits by `soft_cap * tanh(logits / soft_cap)` (Gemma Team 2024, arXiv 2408.00118).
        chunk: Tokens at a time. By default as many as make a chunk of logits about as large as `hidden`, at least 128.

    Returns:
        An `lm.Mean` over the tokens, in float32 at least: what a loss function may return as it is.

    Raises `LossError` for tensors of other shapes or dtypes, and `ArgumentError` for arguments of other types.

    The gradients equal those of `torch.nn.functional.cross_entropy(hidden @ weight.T, targets)` up to the order of
    sums. They may be differentiated again, in reverse mode, and taken by `torch.func` and in lanes; second derivatives
    hold all logits.

    >>> import lumen as lm, torch
    >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(50, 8)
    >>> targets = torch.tensor([[1, 49, 7], [3, -100, -100]])
    >>> loss = lm.losses.linear_cross_entropy(hidden, weight, targets)
    >>> whole = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    >>> torch.allclose(loss.compute(), whole), int(loss.weight)
    (True, 4)
    """
    check(linear_cross_entropy, weights=weights, bias=bias, ignore_index=ignore_index, chunk=chunk)
    check(linear_cross_entropy, label_smoothing=label_smoothing, z_loss=z_loss, soft_cap=soft_cap)
    _check_tensors(hidden, weight, targets, bias)
    _check_numbers(label_smoothing, z_loss, soft_cap, chunk)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    options |= {"soft_cap": soft_cap, "chunk": chunk}
    return mean_loss(hidden, weight, targets, weights, bias, options)


def mean_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    options: Mapping[str, Any],
    shard: VocabularyShard | None = None,
) -> Mean:
    """`linear_cross_entropy` of arguments that were checked; a weight that is a proxy says itself what it is."""
    if torch.overrides.has_torch_function((weight, bias)):
        arguments = hidden, weight, targets, weights, bias, options
        result: Mean = torch.overrides.handle_torch_function(mean_loss, (weight, bias), *arguments)
        return result
    ignore_index, chunk = options["ignore_index"], options["chunk"]
    tokens, features = targets.numel(), hidden.shape[-1]
    counted = _counted(targets, weights, ignore_index, torch.promote_types(hidden.dtype, torch.float32))
    settings = Settings(
        ignore_index,
        options["label_smoothing"],
        options["z_loss"],
        options["soft_cap"],
        chunk or default_chunk(tokens, features, len(weight)),
        shard=shard,
    )
    total = total_loss(hidden.reshape(tokens, features), weight, bias, targets.reshape(-1), counted, settings)
    return Mean(total, counted.sum())


def _counted(targets: Tensor, weights: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How much each token counts, `[tokens]`."""
    is_counted = targets.reshape(-1) != ignore_index
    if weights is None:
        return is_counted.to(dtype)
    try:
        expanded = torch.as_tensor(weights, device=targets.device).to(dtype).expand_as(targets)
    except RuntimeError:
        raise LossError(
            f"weights of shape {list(weights.shape)} do not broadcast to the targets, {list(targets.shape)}."
        ) from None
    return torch.where(is_counted, expanded.reshape(-1), 0)


def default_chunk(tokens: int, features: int, vocabulary: int) -> int:
    """As many tokens as make a chunk of logits about as large as the hidden states, at least 128."""
    size = max(128, tokens * features // max(vocabulary, 1))
    return 1 << (size - 1).bit_length()


def _check_tensors(hidden: Any, weight: Any, targets: Any, bias: Any) -> None:
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if not isinstance(x, Tensor):
            raise LossError(f"linear_cross_entropy takes {name} as a tensor, not {describe(x)}.")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise LossError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit: give hidden as [..., features]"
            " and weight as [vocabulary, features], as in torch.nn.Linear."
        )
    if targets.shape != hidden.shape[:-1]:
        raise LossError(
            f"targets {list(targets.shape)} do not fit hidden {list(hidden.shape)}: give one class for each token,"
            f" {list(hidden.shape[:-1])}. For a causal language model shift them first:"
            " linear_cross_entropy(hidden[:, :-1], weight, tokens[:, 1:])"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise LossError(f"targets are the indices of classes, integers, not {targets.dtype}.")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise LossError(f"hidden and weight are floating-point tensors, not {hidden.dtype} and {weight.dtype}.")
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        shape = list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise LossError(f"bias has one number for each class, [{len(weight)}], not {shape}.")


def _check_numbers(label_smoothing: float, z_loss: float, soft_cap: float | None, chunk: int | None) -> None:
    if not 0 <= label_smoothing <= 1:
        raise LossError(f"label_smoothing={label_smoothing!r} is a share from 0 to 1.")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise LossError(f"z_loss={z_loss!r} is a factor of 0 or more, such as 1e-4.")
    if soft_cap is not None and not soft_cap > 0:
        raise LossError(f"soft_cap={soft_cap!r} is a positive number, such as 30.0, or None.")
    if chunk is not None and integer_of(chunk, low=1) is None:
        raise LossError(f"chunk={chunk!r} is a positive number of tokens, or None.")
