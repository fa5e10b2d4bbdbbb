"""Scaled dot-product attention of queries, keys and values of which each rank has its own positions.

Where the ranks divide the heads, an all-to-all exchanges positions for heads before and after (DeepSpeed-Ulysses,
https://arxiv.org/abs/2309.14509), so that each rank attends over all positions with its own heads. Otherwise keys and
values go round the ranks, and each rank attends from its own positions with all heads (`ring_attention`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen.core import distributed
from lumen.errors import LossError
from lumen.parallel.context.all_to_all import all_to_all
from lumen.parallel.context.ring_attention import ring_attention
from lumen.parallel.tensor.autograd_collectives import TPGroup

Method = Literal["auto", "ulysses", "ring"]


class _Heads(NamedTuple):
    """Queries, keys and values, each `[..., heads, positions, features]`."""

    q: Tensor
    k: Tensor
    v: Tensor


class ShardedAttention:
    """Attention for one call of a loss function, on `local` positions of each rank of `group`; None is one process.

    `documents` are the numbers of the documents of all positions, `[rows, positions]`. A position sees its own document
    alone. What is wrong with a mask that maybe one rank alone has is added to `failures`, for all to raise after their
    collectives.
    """

    def __init__(
        self,
        group: TPGroup | None,
        local: int,
        documents: Tensor | None,
        failures: list[LossError],
        method: Method = "auto",
    ) -> None:
        self._ranks, self.local, self._documents, self._failures = group, local, documents, failures
        self._method = method
        self.size, self._index = (1, 0) if group is None else (group.size, group.index)
        self.length = local * self.size
        self._allowed: dict[bool, Tensor] = {}
        self._own_masks: list[tuple[Tensor, bool]] = []  # masks of own keys that were seen, and whether they are causal

    @property
    def _group(self) -> TPGroup:
        assert self._ranks is not None
        return self._ranks

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What `scaled_dot_product_attention` returns for this rank's queries."""
        lengths = query.shape[-2], key.shape[-2]
        if self.local not in lengths or (self.size == 1 and self._documents is None):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self._check(lengths, dropout_p)
        if attn_mask is not None and self.size > 1:
            attn_mask, is_causal = self._of_all_keys(attn_mask, is_causal)
        if query.dim() == 3:
            attn_mask = attn_mask.unsqueeze(-3) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
            q, k, v = (x.unsqueeze(-3) for x in (query, key, value))
            return self._attend(_Heads(q, k, v), attn_mask, is_causal, scale).squeeze(-3)
        return self._attend(_Heads(query, key, value), attn_mask, is_causal, scale)

    def _attend(self, heads: _Heads, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        if self.size == 1:
            return self._with_all_positions(heads, mask, causal, scale)
        if self._is_ring(heads):
            return self._round_the_ring(heads, mask, causal, scale)
        return self._with_own_heads(heads, mask, causal, scale)

    def _is_ring(self, heads: _Heads) -> bool:
        """Whether keys go round, rather than heads being exchanged; the same on all ranks."""
        total = heads.q.shape[-3]
        if self._method == "ulysses" and total % self.size:
            raise _undivided(total, self.size)
        if self._method != "auto":
            return self._method == "ring"
        key_heads = total if self._may_differ else heads.k.shape[-3]
        return bool(total % self.size or key_heads % self.size)

    @property
    def _may_differ(self) -> bool:
        """Whether a model may repeat keys on some ranks only, as it does where it makes a mask of documents."""
        return self._documents is not None

    def _with_own_heads(self, heads: _Heads, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        """All positions of this rank's heads."""
        total = heads.q.shape[-3]
        q, k, v = (all_to_all(self._divisible(x, total), self._group, -3, -2) for x in heads)
        mask = None if mask is None else self._own_heads_of(mask, total)
        out = self._with_all_positions(_Heads(q, k, v), mask, causal, scale)
        return all_to_all(out, self._group, -2, -3)

    def _with_all_positions(self, heads: _Heads, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        mask, causal = self._with_documents(mask, causal, heads.q)
        grouped = heads.k.shape[-3] != heads.q.shape[-3]
        return F.scaled_dot_product_attention(*heads, mask, is_causal=causal, scale=scale, enable_gqa=grouped)

    def _round_the_ring(self, heads: _Heads, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        """This rank's positions of all heads."""
        q, k, v = heads
        if self._may_differ or k.shape[-3] != v.shape[-3]:
            k, v = (_repeated(x, q.shape[-3]) for x in (k, v))
        if mask is not None and mask.shape[-2] == self.length:
            mask = mask.narrow(-2, self._index * self.local, self.local)
        self._check_documents(q)
        return ring_attention(q, k, v, mask, self._documents, self._group, causal=causal, scale=scale)

    def _divisible(self, x: Tensor, heads: int) -> Tensor:
        """Keys or values with as many heads as queries, where the ranks do not divide their own number."""
        keep = x.shape[-3] % self.size == 0 and not self._may_differ
        return x if keep else _repeated(x, heads)

    # ------------------------------------------------------------------------------------------------- masks

    def _own_heads_of(self, mask: Tensor, heads: int) -> Tensor:
        """A mask of all heads, maybe of this rank's queries, as one of all queries and this rank's heads."""
        has_heads = mask.dim() > 2 and mask.shape[-3] != 1
        if mask.shape[-2] != self.local or self.local == 1:
            own = heads // self._group.size
            return mask.narrow(-3, self._group.index * own, own) if has_heads else mask
        if has_heads:
            return all_to_all(mask, self._group, -3, -2)
        if mask.dtype == torch.bool:  # which not every backend gathers
            return self._group.collective("gather", mask.to(torch.uint8), dim=-2).bool()
        return self._group.collective("all_gather_reduce_grad", mask, dim=-2)

    def _with_documents(self, mask: Tensor | None, causal: bool, q: Tensor) -> tuple[Tensor | None, bool]:
        """The mask, and `is_causal`, with positions of other documents masked."""
        if self._documents is None:
            return mask, causal
        self._check_documents(q)
        allowed = self._allowed_pairs(self._documents, causal)
        allowed = allowed.view(allowed.shape[0], *[1] * (q.dim() - 3), *allowed.shape[1:])
        return _both(mask, allowed), False

    def _check_documents(self, q: Tensor) -> None:
        if self._documents is not None and self._documents.shape[0] != q.shape[0]:
            raise LossError(
                f"documents number the positions of {self._documents.shape[0]} rows, and attention runs on a tensor of"
                f" {q.shape[0]}. Keep rows along the first dim, or give a mask of its own: attn_mask of shape"
                f" [..., {self.local}, {self.length}]."
            )

    def _allowed_pairs(self, numbers: Tensor, causal: bool) -> Tensor:
        """Which positions may see which by their documents: `[rows, queries, keys]`."""
        if causal not in self._allowed:
            same = numbers[:, None, :] == numbers[:, :, None]
            self._allowed[causal] = same.tril() if causal else same
        return self._allowed[causal]

    def _of_all_keys(self, mask: Tensor, causal: bool) -> tuple[Tensor | None, bool]:
        """A mask that has all keys; one of this rank's keys alone must be what `documents` say."""
        if mask.dim() > 1 and mask.shape[-1] == self.length and mask.shape[-2] in (1, self.local, self.length):
            return mask, causal
        local = (self.local, self.local)
        if self._documents is not None and mask.shape[-2:] == local:
            return None, self._is_causal_mask(mask)
        self._fail(
            f"attention has a mask of shape {tuple(mask.shape)}, which says nothing of the keys of other ranks: under"
            f" lm.context_parallel each has {self.local} of {self.length} positions. Leave it out where"
            " is_causal=True is enough (of padding, ignore the labels), name the documents of packed rows,"
            ' lm.context_parallel(mesh, documents="document_ids"), or give a mask of shape'
            f" [..., {self.length}, {self.length}], from a leaf of the batch that sequence_dims does not name."
        )
        return None, causal

    def _is_causal_mask(self, mask: Tensor) -> bool:
        """Whether a model's mask of local positions is causal; raises where it is not that of the documents."""
        for known, causal in self._own_masks:
            if known is mask:
                return causal
        causal = distributed.is_dry_run() or self._fits_causal(mask)
        self._own_masks.append((mask, causal))
        return causal

    def _fits_causal(self, mask: Tensor) -> bool:
        """Whether a mask of this rank's keys is causal; each rank decides alone, as others may have none."""
        assert self._documents is not None
        own = self._documents.narrow(1, self._index * self.local, self.local)
        same = (own[:, None, :] == own[:, :, None]).view(len(own), *[1] * (mask.dim() - 3), self.local, self.local)
        seen = mask if mask.dtype == torch.bool else mask == 0
        if bool((seen == same.tril()).all()):
            return True
        if bool((seen == same).all()):
            return False
        self._fail(
            f"the model makes a mask of shape {tuple(mask.shape)} for the positions of one rank, and it is neither that"
            " of the documents nor that and causal. Leave out attention_mask, let position_ids start at 0 in each"
            " document, and check the leaf that lm.context_parallel(documents=...) names."
        )
        return True

    def _fail(self, message: str) -> None:
        self._failures.append(LossError(message))

    def _check(self, lengths: tuple[int, int], dropout_p: float) -> None:
        if lengths[0] != lengths[1]:
            raise LossError(
                f"attention of {lengths[0]} queries and {lengths[1]} keys under lm.context_parallel, of whose positions"
                f" each rank has {self.local}. Cross-attention and caches of keys are not supported: give a model with"
                " self-attention only, and use_cache=False."
            )
        if dropout_p > 0:
            raise LossError(
                f"attention draws dropout with dropout_p={dropout_p}, and lm.context_parallel cannot draw what one"
                " process draws there. Set it to 0 (attention_dropout=0.0 or attn_pdrop=0.0 in a config of"
                " transformers); other dropout is supported."
            )


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values with as many heads as queries."""
    return x.repeat_interleave(heads // x.shape[-3], -3)


def _undivided(heads: int, size: int) -> LossError:
    return LossError(
        f'lm.context_parallel(attention="ulysses") divides the heads of attention over the {size} ranks along context,'
        f' which do not divide {heads}. Write attention="ring", or leave it out: keys then go round the ranks where'
        " heads cannot be divided."
    )


def _both(mask: Tensor | None, allowed: Tensor) -> Tensor:
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)


def refuse_composite(*_: Any, **__: Any) -> Tensor:
    """In place of `F.multi_head_attention_forward`, inside which no mode sees the attention."""
    raise LossError(
        "nn.MultiheadAttention (also in nn.TransformerEncoderLayer) hides its attention from lm.context_parallel. Call"
        " torch.nn.functional.scaled_dot_product_attention in the model instead."
    )
