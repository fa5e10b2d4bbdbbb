"""The check of a loss function before its first gradient: shards of the sequences must give what full ones give.

It computes the loss of the first row, with few positions, twice: on each rank alone, and sharded. Where the results
differ, the model does something along the sequence that `lm.context_parallel` does not see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core.device import Generators
from lumen.core.dtypes import NARROW
from lumen.core.metrics import Max, Mean, Min, Sum, is_value
from lumen.core.primitives import Aux, Gradient, user_loss
from lumen.errors import LossError
from lumen.parallel.context.function_mode import CallSites
from lumen.parallel.context.metrics import check_aux
from lumen.parallel.tensor.autograd_collectives import TPGroup

_MOST = 61  # positions of a rank in the check
_EXACT, _ROUNDED = 1e-3, 5e-2  # relative differences that rounding explains, in float32 and in 16 bits


def local_length(local: int) -> int:
    """How many positions a rank has in the check of a loss with `local`: a prime, and another number if possible.

    >>> local_length(1024), local_length(4), local_length(2)
    (61, 3, 2)
    """
    limit = min(local - 1, _MOST)
    primes = [n for n in range(3, limit + 1) if all(n % d for d in range(2, n))]
    return primes[-1] if primes else local


class Comparison:
    """The results of the two computations, and what their difference says."""

    def __init__(
        self, full: Gradient, group: TPGroup, max_over_ranks: Callable[[Tensor], Tensor], is_rounded: bool
    ) -> None:
        self._full, self._group, self._max_over_ranks = full, group, max_over_ranks
        self._tolerance = _ROUNDED if is_rounded else _EXACT
        self._is_rounded = is_rounded

    def check_form(self, loss_fn: Any) -> None:
        """Raise `LossError` for a loss or metrics that do not say what they count."""
        if self._full.scalar:
            raise LossError(
                f"the loss of {_name(loss_fn)} is a plain scalar, and under lm.context_parallel it must say over how"
                " many positions it is a mean, as ranks may have different numbers that count. Return"
                " lm.Mean.of(losses), one for each position, or lm.Mean(total, count), such as"
                " lm.Mean(F.cross_entropy(logits, labels, reduction='sum'), (labels != -100).sum())."
            )
        check_aux(self._full.aux)

    def check_values(self, loss_fn: Any, sharded: Gradient, sites: CallSites) -> bool:
        """Raise `LossError`, on every rank, where the results differ; False where no position counted."""
        own = torch.stack([_double(sharded.loss.total), _double(sharded.loss.weight)])  # type: ignore[union-attr]
        total, weight = self._group.reduce(own, "sum").tolist()
        loss: Any = self._full.loss
        count, size = float(loss.weight), self._group.size
        if count and self._is_close(weight, size * count):  # of features that were summed over the ranks
            total, weight = total / size, weight / size
        pairs = {"loss": (float(loss.total), total), "weight of the loss": (count, weight)}
        if not self._is_rounded:
            pairs |= _metric_pairs(self._full.aux, sharded.aux)
        differs = [name for name, (a, b) in pairs.items() if not self._is_close(a, b)]
        flags = torch.tensor([float(bool(differs)), float(weight == 0)], device=own.device, dtype=torch.float64)
        any_differs, any_empty = self._max_over_ranks(flags).tolist()
        if any_differs:
            name = differs[0] if differs else "loss"
            raise LossError(_message(loss_fn, name, *pairs[name], sites))
        return not any_empty

    def _is_close(self, a: float, b: float) -> bool:
        if a != a or b != b:
            return a != a and b != b
        return abs(a - b) <= self._tolerance * max(abs(a), abs(b)) + 1e-6


def is_rounded(params: Any, transforms: Any) -> bool:
    """Whether a loss may be computed in 16 bits."""
    return any(x.dtype in NARROW for x in tree.tensors(params)) or any(t.level == "precision" for t in transforms)


def same_draws(params: Any) -> Callable[[], None]:
    """A function that sets torch's generators to what they are now."""
    generators = Generators(params)
    states = generators.get()
    return functools.partial(generators.set, states)


def _metric_pairs(full: Any, sharded: Any) -> dict[str, tuple[float, float]]:
    if isinstance(full, Aux):
        full, sharded = full.metrics, sharded.metrics
    if full is None:
        return {}
    names = tree.paths(full, is_value)
    values = zip(names, tree.leaves(full, is_value), tree.leaves(sharded, is_value), strict=True)
    pairs = {}
    for name, a, b in values:
        if type(a) is Mean:
            pairs[f"weight of the metric {name!r}"] = float(a.weight), float(b.weight)
        if type(a) in (Mean, Sum, Max, Min) and a.compute().numel() == 1:
            pairs[f"metric {name!r}"] = float(a.compute()), float(b.compute())
    return pairs


def _double(x: Tensor) -> Tensor:
    return x.detach().double()


def _name(loss_fn: Any) -> str:
    return getattr(user_loss(loss_fn), "__qualname__", "the loss function")


def _message(loss_fn: Any, what: str, full: float, sharded: float, sites: CallSites) -> str:
    mixing = f" It calls {', '.join(sorted(sites.mixing))}." if sites.mixing else ""
    return (
        f"the {what} of {_name(loss_fn)} is {full:.6g} on full sequences, and {sharded:.6g} on the same ones sharded by"
        f" lm.context_parallel, so the step would not be that of one process.{mixing} Shift labels before the gradient,"
        " lm.losses.shift_labels(input_ids), and give them to a model of transformers as shift_labels=. Pass"
        " position_ids in the batch if the model computes positions in its own way. Let a metric count each position"
        " once. Convolutions, recurrence, pooling, noise, and attention other than F.scaled_dot_product_attention"
        " cannot be sharded along the sequence."
    )
