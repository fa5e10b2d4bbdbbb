"""The cross-entropy of a head that is sharded over the vocabulary: each rank computes the logits of its own classes.

The ranks share, for each token, the largest logit, the sum of exponentials and the logit of the target; the logits
themselves are not communicated. So did Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lumen.core.sharding import LeafSpec
from lumen.losses._lazy_logits import LazyLogits, lazy_logits
from lumen.losses._linear_cross_entropy import mean_loss
from lumen.parallel.lazy_param import LazyParam, unsharded
from lumen.parallel.tensor.autograd_collectives import TPGroup


@dataclass(frozen=True)
class VocabularyShard:
    """The `lumen.losses._chunked.VocabularyShard` of this rank."""

    tp_group: TPGroup
    classes: int

    @property
    def first(self) -> int:
        """The first class of this rank."""
        return self.tp_group.index * (self.classes // self.tp_group.size)

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum or the maximum over the ranks."""
        return self.tp_group.reduce(x, op)

    def gather(self, logits: Tensor) -> Tensor:
        """The logits of all classes."""
        return self.tp_group.gather(logits, -1)


def answer(tp_group: TPGroup, layouts: Mapping[str, LeafSpec], func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The result of `func` on a head's shard; NotImplemented for functions and layouts that need the full weight."""
    if func is mean_loss:
        hidden, weight, targets, weights, bias, options = args
    elif func is lazy_logits:
        hidden, weight, bias, chunk = args
    else:
        return NotImplemented
    layout = layouts.get(weight.key) if isinstance(weight, LazyParam) else None
    if layout is None or layout.dim != 0 or layout.groups != 1:
        return NotImplemented
    shard = VocabularyShard(tp_group, layout.shape[0])
    hidden, weight = tp_group.collective("copy", hidden), unsharded(weight.shard)
    bias = _own(bias, tp_group)
    if func is mean_loss:
        return mean_loss(hidden, weight, targets, weights, bias, options, shard)
    lazy = lazy_logits(hidden, weight, bias, chunk)
    assert isinstance(lazy, LazyLogits)
    return LazyLogits.of(lazy.head._replace(shard=shard), lazy.dtype)


def _own(bias: Tensor | None, tp_group: TPGroup) -> Tensor | None:
    """This rank's shard of a bias of all classes."""
    if isinstance(bias, LazyParam):
        return unsharded(bias.shard)  # type: ignore[no-any-return]
    return None if bias is None else tp_group.slice(bias, 0)
