"""Attention of this rank's queries to the keys of one rank at a time, and the merge of several such results.

Each result comes with the log-sum-exp of its scores, by which results of different keys are merged (FlashAttention-2,
https://arxiv.org/abs/2307.08691, section 3.1). Heads that share their keys are a dim of their own: queries are
`[..., key heads, queries per key head, queries, features]`, keys `[..., key heads, keys, features]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_SCORES = 2**24  # numbers in the largest matrix of scores: longer blocks of queries are computed in chunks


class Partial(NamedTuple):
    """The attention to some of the keys, and the log-sum-exp of its scores; -inf where a query sees none of them."""

    out: Tensor
    lse: Tensor

    def merged(self, other: Partial) -> Partial:
        """The attention to the keys of both."""
        lse = torch.logaddexp(self.lse, other.lse)
        base = _finite(lse)
        mine, theirs = ((x.lse - base).exp().unsqueeze(-1) for x in (self, other))
        return Partial(self.out * mine + other.out * theirs, lse)


class Visibility:
    """Which of the keys of all ranks, `local` of each, the queries of rank `index` may see.

    A `mask` is `[..., key heads or 1, queries per key head or 1, local or 1, all positions]`; `documents` are
    `[rows, all positions]`.
    """

    def __init__(self, mask: Tensor | None, documents: Tensor | None, causal: bool, index: int, local: int) -> None:
        self._mask, self._documents, self._causal = mask, documents, causal
        self._index, self._local = index, local

    def sees(self, source: int) -> bool:
        """Whether any query may see a key of the rank `source`, as far as its position decides."""
        return not (self._causal and source > self._index)

    def mask_block(self, mask: Tensor, start: int, queries: int, source: int) -> Tensor:
        """The view of a mask, or of its gradient, for some queries, from `start` on, and the keys of one rank."""
        block = mask.narrow(-1, source * self._local, self._local)
        return block if block.shape[-2] == 1 else block.narrow(-2, start, queries)

    def masked(self, scores: Tensor, start: int, source: int) -> Tensor:
        """The scores of queries, from `start` on, and the keys of rank `source`: -inf for pairs that do not see."""
        queries = scores.shape[-2]
        if self._mask is not None:
            block = self.mask_block(self._mask, start, queries, source)
            scores = scores.masked_fill(~block, -torch.inf) if block.dtype == torch.bool else scores + block
        if self._causal and source == self._index:
            later = torch.ones(queries, self._local, dtype=torch.bool, device=scores.device).triu(start + 1)
            scores = scores.masked_fill(later, -torch.inf)
        if self._documents is None:
            return scores
        own = self._documents.narrow(1, self._index * self._local + start, queries)
        others = self._documents.narrow(1, source * self._local, self._local)
        differs = own[:, :, None] != others[:, None, :]
        shape = (differs.shape[0], *[1] * (scores.dim() - 3), *differs.shape[1:])
        return scores.masked_fill(differs.view(shape), -torch.inf)


def chunks(queries: Tensor, keys: int) -> Iterator[tuple[int, int]]:
    """The starts and lengths of chunks of queries, whose scores with so many keys are not too many at once."""
    length = queries.shape[-2]
    scores_of_one = max(1, queries.shape[:-2].numel() * keys)
    step = max(1, min(length, _SCORES // scores_of_one))
    return ((start, min(step, length - start)) for start in range(0, length, step))


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, start: int, source: int) -> Partial:
    """The attention of scaled queries, from `start` on, to the keys of the rank `source`."""
    scores = visible.masked(_by_key_head(q, k.mT), start, source)
    lse = scores.logsumexp(-1)
    return Partial(_by_key_head(_weights(scores, lse), v), lse)


class BlockGradients(NamedTuple):
    """The gradients in scaled queries, keys, values and scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor


class Queries(NamedTuple):
    """Scaled queries, and what their result with all keys was: the gradient in it, their product, its log-sum-exp."""

    q: Tensor
    grad: Tensor
    delta: Tensor  # the sum over features of result times gradient, [..., queries, 1]
    lse: Tensor

    def narrow(self, start: int, length: int) -> Queries:
        """Those of a chunk."""
        dims = (-2, -2, -2, -1)
        return Queries(*(x.narrow(dim, start, length) for x, dim in zip(self, dims, strict=True)))


def attend_backward(
    queries: Queries, k: Tensor, v: Tensor, visible: Visibility, start: int, source: int
) -> BlockGradients:
    """The gradients of `attend`, as a part of the attention to all keys."""
    weights = _weights(visible.masked(_by_key_head(queries.q, k.mT), start, source), queries.lse)
    scores = weights * (_by_key_head(queries.grad, v.mT) - queries.delta)
    return BlockGradients(
        q=_by_key_head(scores, k),
        k=scores.flatten(-3, -2).mT @ queries.q.flatten(-3, -2),
        v=weights.flatten(-3, -2).mT @ queries.grad.flatten(-3, -2),
        scores=scores,
    )


def _by_key_head(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix`, for queries that share a matrix at once."""
    product: Tensor = (x.flatten(-3, -2) @ matrix).unflatten(-2, x.shape[-3:-1])
    return product


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - _finite(lse).unsqueeze(-1)).exp()


def _finite(lse: Tensor) -> Tensor:
    """0 for -inf, so that the weights of a query that sees nothing are 0, not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0)
