"""Ring attention: keys and values of each rank go round the ranks, which attend to one rank's at a time.

After Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context"
(https://arxiv.org/abs/2310.01889). No rank has the keys of more than two ranks at a time, nor scores of more than its
own queries with the keys of one rank. The backward pass computes the scores again: keys and values go round once more,
followed by their gradients, which are complete when they come home.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumen.core.dtypes import wide_dtype
from lumen.errors import LossError
from lumen.parallel.context.block_attention import Partial, Queries, Visibility, attend, attend_backward, chunks
from lumen.parallel.context.ring_shift import RingShift, pack, rotated, unpack
from lumen.parallel.tensor.autograd_collectives import TPGroup


class _Ring(NamedTuple):
    """The ranks, and what attention computes."""

    group: TPGroup
    causal: bool
    scale: float

    def visibility(self, q: Tensor, mask: Tensor | None, documents: Tensor | None) -> Visibility:
        """Which keys this rank's queries may see."""
        return Visibility(mask, documents, self.causal, self.group.index, q.shape[-2])


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    group: TPGroup,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """The attention of this rank's queries, `[..., heads, positions, features]`, to the keys of all ranks.

    Keys and values have as many heads as queries, or a divisor. A `mask` is of all keys,
    `[..., heads or 1, positions or 1, all positions]`; `documents` number all positions, `[rows, all positions]`.
    Values of 16 bits are computed with in float32.
    """
    heads, key_heads = q.shape[-3], k.shape[-3]
    k, v = (x.expand(*q.shape[:-3], *x.shape[-3:]) for x in (k, v))
    q, k, v = _autocast(q, k, v)
    if mask is not None and mask.dim() > 2:
        grouped = (1, 1) if mask.shape[-3] == 1 else (key_heads, heads // key_heads)
        mask = mask.unflatten(-3, grouped)
    ring = _Ring(group, causal, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    queries = q.unflatten(-3, (key_heads, heads // key_heads))
    out, _ = _RingAttention.apply(queries, k, v, mask, documents, ring)  # type: ignore[no-untyped-call]
    attention: Tensor = out.flatten(-4, -3)
    return attention


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast makes of the arguments of attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return [*tensors]
    dtype = torch.get_autocast_dtype(device)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Tensor | None, ring: _Ring
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            return _forward(q, k, v, ring.visibility(q, mask, documents), ring)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ring = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*tensors, out, lse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs_mask = ctx.needs_input_grad[3]
        grads: tuple[Tensor, ...] = _RingBackward.apply(grad, *ctx.saved_tensors, ctx.ring, needs_mask)  # type: ignore[no-untyped-call]
        q, k, v, *mask = grads
        return q, k, v, mask[0] if mask else None, None, None


class _RingBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        out: Tensor,
        lse: Tensor,
        ring: _Ring,
        needs_mask: bool,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(q.device.type, enabled=False):
            visible, wide = ring.visibility(q, mask, documents), wide_dtype(q.dtype)
            grad_mask = torch.zeros_like(mask, dtype=wide) if needs_mask and mask is not None else None
            grad = grad.to(wide)
            queries = Queries(q.to(wide) * ring.scale, grad, (grad * out).sum(-1, keepdim=True), lse)
            grads = _backward(queries, k, v, visible, ring, grad_mask)
            dtypes = (q.dtype, k.dtype, v.dtype) + (() if mask is None else (mask.dtype,))
            grads += () if grad_mask is None else (grad_mask,)
            return tuple(x.to(dtype) for x, dtype in zip(grads, dtypes, strict=False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise LossError(
            "the loss differentiates a gradient, and lm.context_parallel has no second derivatives of ring attention."
            " Leave the term with the second derivative out, or lm.context_parallel."
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, ring: _Ring) -> tuple[Tensor, Tensor]:
    """The attention to all keys, and the log-sum-exp of its scores."""
    wide = wide_dtype(q.dtype)
    scaled = q.to(wide) * ring.scale
    spans = [*chunks(q, k.shape[-2])]
    results: dict[int, Partial] = {}
    for source, (keys, values) in rotated((k, v), ring.group):
        if not visible.sees(source):
            continue
        keys, values = keys.to(wide), values.to(wide)
        for start, length in spans:
            result = attend(scaled.narrow(-2, start, length), keys, values, visible, start, source)
            results[start] = results[start].merged(result) if start in results else result
    out, lse = ([results[start][item] for start, _ in spans] for item in (0, 1))
    return torch.cat(out, -2).to(q.dtype), torch.cat(lse, -1)


def _backward(
    queries: Queries, k: Tensor, v: Tensor, visible: Visibility, ring: _Ring, grad_mask: Tensor | None
) -> tuple[Tensor, ...]:
    """The gradients in queries, keys and values; that in the mask is added to `grad_mask`."""
    wide = queries.q.dtype
    grad_q = torch.zeros_like(queries.q)
    shift = None
    for source, (keys, values) in rotated((k, v), ring.group):
        grads = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
        if visible.sees(source):
            keys, values = keys.to(wide), values.to(wide)
            for start, length in chunks(queries.q, k.shape[-2]):
                block = attend_backward(queries.narrow(start, length), keys, values, visible, start, source)
                grad_q.narrow(-2, start, length).add_(block.q, alpha=ring.scale)
                grads[0].add_(block.k)
                grads[1].add_(block.v)
                if grad_mask is not None:
                    own = visible.mask_block(grad_mask, start, length, source)
                    own.add_(block.scores.sum_to_size(own.shape))
        flat = pack(grads)
        shift = RingShift(flat if shift is None else flat.add_(shift.wait()), ring.group)
    assert shift is not None
    return grad_q, *unpack(shift.wait(), (k, v))
