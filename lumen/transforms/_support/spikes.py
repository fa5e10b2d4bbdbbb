"""Outliers of the loss and of the gradient's norm, for `lm.guard(spike=…)`.

The rule is that of OLMo-core's `SkipStepOptimizer` (Allen Institute for AI, `olmo_core/optim/skip_step_optimizer.py`;
2024): a value is an outlier if it is more than `factor` standard deviations above the mean of the
values before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lumen import tree
from lumen.core import sharding
from lumen.core.metrics import Mean
from lumen.core.primitives import Gradient, UpdateCall
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import StepError
from lumen.optim._clip import total_norm
from lumen.optim._norms import LeafNorms

SERIES = ("the loss", "the global norm of the gradient")  # the rows of `SpikeWindow.values`
SMALLEST_WINDOW = 20  # with fewer values a standard deviation says little


@pytree_dataclass
class SpikeWindow:
    """The latest `values` of both series (2 × window, float32), in a ring: entry `count % window` is the next one.

    `outlier` has the value of the outlier that is to be reported, with the mean and the standard deviation before it;
    `spikes` counts the steps with an outlier.
    """

    values: Tensor
    count: Tensor
    outlier: Tensor
    spikes: Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device) -> SpikeWindow:
        """A window of `size` values."""
        count, spikes = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        return cls(torch.zeros(2, size, device=device), count, torch.zeros(3, device=device), spikes)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation (unbiased) of each series."""
        is_filled = torch.arange(self._size, device=self.count.device) < self.count
        number = is_filled.sum()
        mean = torch.where(is_filled, self.values, 0).sum(1) / number.clamp(min=1)
        deviations = torch.where(is_filled, self.values - mean[:, None], 0)
        return mean, (deviations.square().sum(1) / (number - 1).clamp(min=1)).sqrt()

    def is_decisive(self) -> Tensor:
        """Whether there are enough values before this one to judge it."""
        return self.count + 1 >= max(SMALLEST_WINDOW, self._size // 2)

    def including(self, values: Tensor, is_counted: Tensor) -> SpikeWindow:
        """The window with `values`, one of each series, in the place of the oldest, if they are counted."""
        is_next = torch.arange(self._size, device=self.count.device) == self.count % self._size
        entries = torch.where(is_next & is_counted, values[:, None], self.values)
        return self.replace(values=entries, count=self.count + is_counted)  # type: ignore[attr-defined,no-any-return]

    @property
    def _size(self) -> int:
        return self.values.shape[1]


class SpikeCheck:
    """Compares the loss and the gradient's norm of one step with those in the window."""

    def __init__(self, window: SpikeWindow, factor: float) -> None:
        self._window = window
        self._factor = factor
        self._loss: Tensor | None = None
        self._verdict: tuple[Tensor, Tensor, Tensor] | None = None  # values; which are outliers; those with statistics

    def add(self, result: Gradient) -> None:
        """Note the loss of a gradient; those of several are added."""
        loss = result.loss.compute() if isinstance(result.loss, Mean) else result.loss
        loss = loss.detach().to(self._window.values)
        self._loss = loss if self._loss is None else self._loss + loss

    def is_spike(self, call: UpdateCall, norms: LeafNorms | None, differs_by_rank: bool) -> Tensor:
        """Whether this update's gradient, or the loss, is an outlier; the same on all ranks."""
        if self._verdict is not None:
            raise StepError(
                "lm.guard(spike=...) compares the loss and the gradient of a step with those of the steps before, and"
                " this step makes several updates. Write lm.guard(), or update once: one state whose params are all"
                " that is trained, with one optimizer made by lm.optim.partition."
            )
        leaves = tree.leaves(call.grads)
        unused_fn = getattr(call.tx, "unused_fn", None)
        known = None if norms is None else norms.of(leaves)
        norm = total_norm(call.grads, known, None if unused_fn is None else unused_fn(call.params))
        norm = norm.detach().to(self._window.values)
        values = torch.stack([torch.zeros_like(norm) if self._loss is None else self._loss, norm])
        self._verdict = self._judge(sharding.mean_of_ranks(values, differs_by_rank))
        return self._verdict[1].any()

    def _judge(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = self._window.statistics()
        is_outlier = (values - mean > self._factor * std) & values.isfinite().all() & self._window.is_decisive()
        return values, is_outlier, torch.stack([values, mean, std])

    def result(self, keeps_outlier: Tensor | None) -> tuple[SpikeWindow, Tensor, Tensor]:
        """The next window, whether the step had an outlier, and the index of its series.

        The outlier to be reported is this step's, unless `keeps_outlier` is given and true. What is not finite does not
        enter the window, and neither does a gradient of zeros: that of a step whose loss scale was too large.
        """
        window = self._window
        if self._verdict is None:
            return window, torch.zeros_like(window.count, dtype=torch.bool), torch.zeros_like(window.count)
        values, is_outlier, report = self._verdict
        is_spike = is_outlier.any()
        index = torch.where(is_outlier[0], 0, 1)
        latest = torch.where(is_outlier[0], report[:, 0], report[:, 1])
        window = window.including(values, values.isfinite().all() & (values[1] > 0))
        replaces = is_spike if keeps_outlier is None else is_spike & ~keeps_outlier
        changes = {"outlier": torch.where(replaces, latest, window.outlier), "spikes": window.spikes + is_spike}
        return window.replace(**changes), is_spike, index  # type: ignore[attr-defined]
