"""Scaled dot-product attention of queries, keys and values of which each rank has the positions of its shard.

Where the ranks divide the heads, an all-to-all exchanges positions for heads before and after (DeepSpeed-Ulysses,
https://arxiv.org/abs/2309.14509), so that each rank attends over all positions with its own heads. Otherwise keys and
values are all-gathered, and each rank attends from its own positions with all heads (as in Llama 3,
https://arxiv.org/abs/2407.21783, section 3.3.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lumen.core import distributed
from lumen.errors import LossError
from lumen.parallel.context.all_to_all import all_to_all
from lumen.parallel.tensor.autograd_collectives import TPGroup


class _Heads(NamedTuple):
    """Queries, keys and values, each `[..., heads, positions, features]`."""

    q: Tensor
    k: Tensor
    v: Tensor


class ShardedAttention:
    """Attention for one call of a loss function, on `local` positions of each rank of `group`.

    `documents` are the numbers of the documents of all positions, `[rows, positions]`.
    """

    def __init__(self, group: TPGroup, local: int, documents: Tensor | None) -> None:
        self._group, self.local, self._documents = group, local, documents
        self.length = local * group.size
        self._allowed: dict[tuple[bool, bool], Tensor] = {}
        self._own_masks: list[tuple[Tensor, bool]] = []  # local masks that were seen, and whether they are causal

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
        if self.local not in lengths:  # along another dim than the positions
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self._check(lengths, dropout_p)
        if attn_mask is not None:
            attn_mask, is_causal = self._whole_keys(attn_mask, is_causal)
        if query.dim() == 3:
            attn_mask = attn_mask.unsqueeze(-3) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
            q, k, v = (x.unsqueeze(-3) for x in (query, key, value))
            return self._attend(_Heads(q, k, v), attn_mask, is_causal, scale).squeeze(-3)
        return self._attend(_Heads(query, key, value), attn_mask, is_causal, scale)

    def _attend(self, heads: _Heads, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        if heads.q.shape[-3] % self._group.size:
            return self._with_gathered_keys(heads, mask, causal, scale)
        return self._with_own_heads(heads, mask, causal, scale)

    def _with_own_heads(self, heads: _Heads, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        """All positions of this rank's heads."""
        total = heads.q.shape[-3]
        q, k, v = (all_to_all(self._divisible(x, total), self._group, -3, -2) for x in heads)
        mask = None if mask is None else self._own_heads_of(mask, total)
        mask, causal = self._with_documents(mask, causal, heads.q, own=False)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=k.shape[-3] != q.shape[-3]
        )
        return all_to_all(out, self._group, -2, -3)

    def _with_gathered_keys(self, heads: _Heads, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        """This rank's positions of all heads."""
        k, v = (self._group.collective("all_gather_reduce_grad", x, dim=-2) for x in (heads.k, heads.v))
        if causal:
            mask, causal = _both(mask, self._allowed_pairs(causal=True, own=True, documents=False)), False
        mask, causal = self._with_documents(mask, causal, heads.q, own=True)
        return F.scaled_dot_product_attention(
            heads.q, k, v, mask, scale=scale, enable_gqa=k.shape[-3] != heads.q.shape[-3]
        )

    def _divisible(self, x: Tensor, heads: int) -> Tensor:
        """Keys or values with as many heads as queries, where the ranks do not divide their own number."""
        own = x.shape[-3]
        return x if own % self._group.size == 0 else x.repeat_interleave(heads // own, -3)

    # ------------------------------------------------------------------------------------------------- masks

    def _own_heads_of(self, mask: Tensor, heads: int) -> Tensor:
        """A mask of this rank's queries and all heads as one of all queries and this rank's heads."""
        has_heads = mask.dim() > 2 and mask.shape[-3] != 1
        if mask.shape[-2] == 1:
            own = heads // self._group.size
            return mask.narrow(-3, self._group.index * own, own) if has_heads else mask
        if has_heads:
            return all_to_all(mask, self._group, -3, -2)
        if mask.dtype == torch.bool:  # which not every backend gathers
            return self._group.collective("gather", mask.to(torch.uint8), dim=-2).bool()
        return self._group.collective("all_gather_reduce_grad", mask, dim=-2)

    def _with_documents(self, mask: Tensor | None, causal: bool, q: Tensor, own: bool) -> tuple[Tensor | None, bool]:
        """The mask, and `is_causal`, with positions of other documents masked."""
        if self._documents is None:
            return mask, causal
        if self._documents.shape[0] != q.shape[0]:
            raise LossError(
                f"documents number the positions of {self._documents.shape[0]} rows, and attention runs on a tensor of"
                f" {q.shape[0]}. Keep rows along the first dim, or give a mask of its own: attn_mask of shape"
                f" [..., {self.local}, {self.length}]."
            )
        allowed = self._allowed_pairs(causal, own, documents=True)
        allowed = allowed.view(allowed.shape[0], *[1] * (q.dim() - 3), *allowed.shape[1:])
        return _both(mask, allowed), False

    def _allowed_pairs(self, causal: bool, own: bool, documents: bool) -> Tensor:
        """Which queries, this rank's `own` or all, may see which keys: `[rows, queries, keys]`, or without rows."""
        cached = self._allowed.get((causal, own)) if documents else None
        if cached is not None:
            return cached
        device = None if self._documents is None else self._documents.device
        positions = torch.arange(self.length, device=device)
        queries = positions.narrow(0, self._group.index * self.local, self.local) if own else positions
        allowed = positions <= queries[:, None] if causal else positions.new_ones((), dtype=torch.bool)
        if not documents or self._documents is None:
            return allowed
        numbers = self._documents
        allowed = allowed & (numbers[:, None, :] == numbers[:, queries][:, :, None])
        self._allowed[causal, own] = allowed
        return allowed

    def _whole_keys(self, mask: Tensor, causal: bool) -> tuple[Tensor | None, bool]:
        """A mask that has all keys; one of this rank's keys alone must be what `documents` say."""
        if mask.dim() > 1 and mask.shape[-1] == self.length and mask.shape[-2] in (1, self.local):
            return mask, causal
        local = (self.local, self.local)
        if self._documents is not None and mask.shape[-2:] == local:
            return None, self._is_causal_mask(mask)
        raise LossError(
            f"attention has a mask of shape {tuple(mask.shape)}, which says nothing of the keys of other ranks: under"
            f" lm.context_parallel each has {self.local} of {self.length} positions. Leave it out where"
            ' is_causal=True is enough (of padding, ignore the labels), name the documents of packed rows,'
            ' lm.context_parallel(mesh, documents="document_ids"), or give a mask of shape'
            f" [..., {self.local}, {self.length}], by sequence_dims={{\"attention_mask\": 2}} from the batch."
        )

    def _is_causal_mask(self, mask: Tensor) -> bool:
        """Whether a model's mask of local positions is causal; raises where it is not that of the documents."""
        for known, causal in self._own_masks:
            if known is mask:
                return causal
        causal = True if distributed.is_dry_run() else self._agreed_causal(mask)
        self._own_masks.append((mask, causal))
        return causal

    def _agreed_causal(self, mask: Tensor) -> bool:
        assert self._documents is not None
        own = self._documents.narrow(1, self._group.index * self.local, self.local)
        same = (own[:, None, :] == own[:, :, None]).view(len(own), *[1] * (mask.dim() - 3), self.local, self.local)
        seen = mask if mask.dtype == torch.bool else mask == 0
        fits = [bool((seen == same.tril()).all()), bool((seen == same).all())]
        fits_all = self._group.reduce(torch.tensor([not fit for fit in fits], device=mask.device).int(), "max").tolist()
        if all(fits_all):
            raise LossError(
                f"the model makes a mask of shape {tuple(mask.shape)} for the positions of one rank, and it is neither"
                " that of the documents nor that and causal. Leave out attention_mask, let position_ids start at 0 in"
                ' each document, and check the leaf that lm.context_parallel(documents=...) names.'
            )
        return not fits_all[0]

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
