"""Typed metric values: quantities that merge exactly over microbatches, steps and ranks.

A value holds what it is computed from (a mean its total and weight), not the finished number, so the merged value
of microbatches is that of the batch. Totals are float32 at least: a bfloat16 counter stops at 256.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lumen import tree
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import LossError, MetricError

_WIDE = (torch.float32, torch.float64)


class Metric:
    """Base of the typed values: `merge` joins two values, `compute` gives the number.

    A custom value is an `@lm.dataclass` class of tensors that defines both.

    >>> import lumen as lm, torch
    >>> @lm.dataclass
    ... class Count(lm.Metric):
    ...     total: torch.Tensor
    ...     def merge(self, other):
    ...         return Count(self.total + other.total)
    ...     def compute(self):
    ...         return self.total
    >>> Count(torch.tensor(2)).merge(Count(torch.tensor(3))).compute()
    tensor(5)
    """

    def merge(self, other: Self) -> Self:
        """The merged value."""
        raise NotImplementedError

    @classmethod
    def merge_all(cls, values: Sequence[Self]) -> Self:
        """The merged value of several; override it where that is faster than merging pairs."""
        return functools.reduce(lambda a, b: a.merge(b), values)

    def compute(self) -> Tensor:
        """The number, a tensor on the value's device."""
        raise NotImplementedError

    def psum(self, axis: str) -> Self:
        """The value over all members of the named axis."""
        raise NotImplementedError


@pytree_dataclass
class Mean(Metric):
    """A weighted mean as `total` and `weight`, both 0-d tensors.

    >>> import lumen as lm, torch
    >>> a = lm.Mean.of(torch.tensor([1.0, 2.0, 3.0]))
    >>> b = lm.Mean.of(torch.tensor([7.0, 0.0]), torch.tensor([True, False]))
    >>> a.merge(b).compute()
    tensor(3.2500)
    """

    total: Tensor
    weight: Tensor

    @classmethod
    def of(cls, values: Tensor, weight: Tensor | None = None) -> Mean:
        """The mean of all elements of `values`, each counted once or by `weight` (a mask or weights).

        `weight` broadcasts to the shape of `values`. Elements of weight zero count nothing, even when they are
        NaN. Booleans and integers are averaged as float32.
        """
        if not isinstance(values, Tensor):
            raise LossError(f"Mean.of takes a tensor, not {type(values).__name__}; use torch.as_tensor(value).")
        if values.dtype not in _WIDE:
            values = values.float()
        if weight is None:
            return cls(values.sum(), values.new_full((), values.numel()))
        weights = torch.as_tensor(weight, device=values.device).to(values.dtype).expand_as(values)
        return cls(torch.where(weights == 0, 0, values * weights).sum(), weights.sum())

    def merge(self, other: Mean) -> Mean:
        """The mean over the elements of both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    @classmethod
    def merge_all(cls, values: Sequence[Mean]) -> Mean:
        """The mean over the elements of all parts."""
        return Mean(_total([value.total for value in values]), _total([value.weight for value in values]))

    def compute(self) -> Tensor:
        """`total / weight`; NaN where nothing was counted."""
        return self.total / self.weight

    def psum(self, axis: str) -> Mean:
        """The mean over the elements of all members of `axis`."""
        from lumen.core.collectives import psum

        return Mean(*psum((self.total, self.weight), axis))


@pytree_dataclass
class GlobalMean(Mean):
    """A mean over the rows of all processes, identical on each of them: the loss of `value_and_grad`.

    It counts once where the values of processes merge; other values cover the rows of their own process alone.
    """

    def merge(self, other: Mean) -> Mean:  # type: ignore[override]  # with a process's own it is no longer that of all
        """The mean over the elements of both."""
        kind = type(self) if isinstance(other, GlobalMean) else Mean
        return kind(self.total + other.total, self.weight + other.weight)

    @classmethod
    def merge_all(cls, values: Sequence[Mean]) -> Mean:  # type: ignore[override]
        """The mean over the elements of all parts."""
        kind = cls if all(isinstance(value, GlobalMean) for value in values) else Mean
        return kind(_total([value.total for value in values]), _total([value.weight for value in values]))


@pytree_dataclass
class Sum(Metric):
    """A sum: of tokens seen, of errors, of anything that adds up.

    >>> import lumen as lm, torch
    >>> lm.Sum.of(torch.ones(3)).merge(lm.Sum.of(torch.ones(2))).compute()
    tensor(5.)
    """

    total: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Sum:
        """The sum of all elements; integers and booleans add as int64."""
        return cls(values.sum() if not values.is_floating_point() else _wide(values).sum())

    def merge(self, other: Sum) -> Sum:
        """The sum of both."""
        return Sum(self.total + other.total)

    @classmethod
    def merge_all(cls, values: Sequence[Sum]) -> Sum:
        """The sum of all values."""
        return Sum(_total([value.total for value in values]))

    def compute(self) -> Tensor:
        """The total."""
        return self.total

    def psum(self, axis: str) -> Sum:
        """The sum over all members of `axis`."""
        from lumen.core.collectives import psum

        return Sum(psum(self.total, axis))


@pytree_dataclass
class Max(Metric):
    """A maximum; of no elements it is the lowest number of their dtype, -inf for floats, which merges as if not there.

    >>> import lumen as lm, torch
    >>> lm.Max.of(torch.tensor([1.0, 4.0])).merge(lm.Max.of(torch.tensor([2.0]))).compute()
    tensor(4.)
    """

    value: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The largest element."""
        return cls(values.amax() if values.numel() else values.new_full((), extremes(values.dtype)[0]))

    def merge(self, other: Max) -> Max:
        """The larger of both."""
        return Max(torch.maximum(self.value, other.value))

    def compute(self) -> Tensor:
        """The largest element seen."""
        return self.value

    def psum(self, axis: str) -> Max:
        """The largest over all members of `axis`."""
        from lumen.core.collectives import pmax

        return Max(pmax(self.value, axis))


@pytree_dataclass
class Min(Metric):
    """A minimum; of no elements it is the highest number of their dtype, inf for floats, which merges as if not there.

    >>> import lumen as lm, torch
    >>> lm.Min.of(torch.tensor([3.0, 4.0])).merge(lm.Min.of(torch.tensor([2.0]))).compute()
    tensor(2.)
    """

    value: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The smallest element."""
        return cls(values.amin() if values.numel() else values.new_full((), extremes(values.dtype)[1]))

    def merge(self, other: Min) -> Min:
        """The smaller of both."""
        return Min(torch.minimum(self.value, other.value))

    def compute(self) -> Tensor:
        """The smallest element seen."""
        return self.value

    def psum(self, axis: str) -> Min:
        """The smallest over all members of `axis`."""
        from lumen.core.collectives import pmin

        return Min(pmin(self.value, axis))


@pytree_dataclass
class Last(Metric):
    """The newest of several values: a learning rate, a loss scale, a picture.

    >>> import lumen as lm, torch
    >>> lm.Last(torch.tensor(1)).merge(lm.Last(torch.tensor(2))).compute()
    tensor(2)
    """

    value: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Self:
        """The value as it is, of any shape."""
        return cls(value)

    def merge(self, other: Last) -> Last:
        """The other, which is the newer."""
        return other

    def compute(self) -> Tensor:
        """The newest value."""
        return self.value

    def psum(self, axis: str) -> Last:
        """The value as it is: members of an axis have no order in time."""
        return self


@pytree_dataclass
class PerEpoch(Metric):
    """A value that the Runner logs once for each epoch, merged over its steps, instead of at every logging point.

    `PerEpoch.of` takes a typed value, or a plain number or 0-d tensor, whose mean over the steps it then is. At the end
    of a run in the middle of an epoch, the value of that part of the epoch is logged. Anywhere else, such as in an
    evaluation, it is the value that it holds.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     return state, {"x": batch, "epoch_x": lm.PerEpoch.of(batch)}
    >>> runner = lm.Runner(step, log_every=2, progress=False)
    >>> data = [torch.tensor(float(i)) for i in range(4)]
    >>> metrics = runner.fit({}, data, until=lm.Epochs(1)).metrics
    >>> metrics["train/x"], metrics["train/epoch_x"]
    (2.5, 1.5)
    """

    value: Metric

    @classmethod
    def of(cls, value: Metric | Tensor | float) -> PerEpoch:
        """The value, logged per epoch; raises `MetricError` for what is no metric."""
        return value if isinstance(value, PerEpoch) else cls(as_value(value))

    def merge(self, other: PerEpoch) -> PerEpoch:
        """The value of both."""
        return PerEpoch(self.value.merge(other.value))

    @classmethod
    def merge_all(cls, values: Sequence[PerEpoch]) -> PerEpoch:
        """The value of all."""
        return PerEpoch(type(values[0].value).merge_all([value.value for value in values]))

    def compute(self) -> Tensor:
        """The number of the value."""
        return self.value.compute()

    def psum(self, axis: str) -> PerEpoch:
        """The value over all members of `axis`."""
        return PerEpoch(self.value.psum(axis))


def extremes(dtype: torch.dtype) -> tuple[float, float]:
    """The lowest and the highest number of a dtype: what a maximum and a minimum of nothing are."""
    if dtype.is_floating_point:
        return -torch.inf, torch.inf
    return (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def is_value(node: Any) -> bool:
    """Whether `node` is a typed value; for `is_leaf`."""
    return isinstance(node, Metric)


def merge_metrics(metrics: Sequence[Any]) -> Any:
    """One metrics tree for several steps: typed values merge, plain numbers and tensors are averaged.

    A name that only some of the dicts have is merged over those that have it.

    >>> import lumen as lm, torch
    >>> steps = [{"loss": lm.Mean.of(torch.ones(3)), "scale": 2.0}, {"loss": lm.Mean.of(torch.zeros(1)), "scale": 4.0}]
    >>> {k: float(v) for k, v in lm.compute_metrics(lm.merge_metrics(steps)).items()}
    {'loss': 0.75, 'scale': 3.0}
    """
    first = metrics[0]
    if type(first) is dict and all(type(step) is dict for step in metrics):
        if all(step.keys() == first.keys() for step in metrics):
            return {name: _merge_column([step[name] for step in metrics]) for name in first}
        names = dict.fromkeys(name for step in metrics for name in step)
        return {name: _merge_column([step[name] for step in metrics if name in step]) for name in names}
    return _merge_column(metrics)


def _merge_column(column: Sequence[Any]) -> Any:
    """The merged value of one metric; all at once where they are of one type, as they nearly always are."""
    kind = type(column[0])
    if len(column) > 1 and all(type(value) is kind for value in column):
        if issubclass(kind, Metric):
            return kind.merge_all(column)
        if kind is Tensor:
            total = _total([_wide(value) for value in column])
            return Mean(total, total.new_full((), len(column)))
        if kind is dict:
            return merge_metrics(column)
    typed = [tree.map(as_value, value, is_leaf=is_value) for value in column]
    return tree.map(lambda *values: type(values[0]).merge_all(values), *typed, is_leaf=is_value)


def _total(totals: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(totals)).sum(0)


def compute_metrics(metrics: Any) -> Any:
    """The same tree with each typed value replaced by its number (a tensor).

    >>> import lumen as lm, torch
    >>> lm.compute_metrics({"loss": lm.Mean.of(torch.tensor([1.0, 3.0])), "lr": 0.1})
    {'loss': tensor(2.), 'lr': 0.1}
    """
    return tree.map(lambda v: v.compute() if is_value(v) else v, metrics, is_leaf=is_value)


def as_value(leaf: Any) -> Metric:
    """A typed value as it is; a plain number or tensor as a mean of one, which is how several of them merge."""
    if isinstance(leaf, Metric):
        return leaf
    if not isinstance(leaf, Tensor | int | float | complex | np.ndarray | np.generic):
        fix = "Log text by a sink or a callback instead."
        if hasattr(leaf, "update") and hasattr(leaf, "compute"):
            fix = "Before the step write metric = lm.metrics.from_torchmetrics(m), and in it metric.of(preds, target)."
        raise MetricError(
            f"a metric is {leaf!r:.60}, of type {type(leaf).__name__}; it must be a number, a tensor or an lm.Metric."
            f" {fix}"
        )
    tensor = torch.as_tensor(leaf)
    tensor = _wide(tensor)
    return Mean(tensor, torch.ones((), dtype=tensor.dtype, device=tensor.device))


def without_rows(leaf: Any, dummy_rows: int) -> Any:
    """A metric that was computed from `dummy_rows` dummy rows, as the value that leaves others unchanged in a merge.

    >>> without_rows(Mean.of(torch.ones(2)), 2)
    Mean(total=tensor(0.), weight=tensor(0.))
    """
    if isinstance(leaf, Mean | Sum):
        return tree.map(torch.zeros_like, leaf)
    if isinstance(leaf, Max | Min):
        low, high = extremes(leaf.value.dtype)
        return type(leaf)(torch.full_like(leaf.value, low if isinstance(leaf, Max) else high))
    if isinstance(leaf, PerEpoch):
        return PerEpoch(without_rows(leaf.value, dummy_rows))
    if isinstance(leaf, Metric):
        empty = getattr(getattr(leaf, "metric", None), "init", None)  # a torchmetrics metric
        return leaf if empty is None else empty()
    if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == dummy_rows:
        return leaf[:0]
    return leaf


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in _WIDE else values.float()
