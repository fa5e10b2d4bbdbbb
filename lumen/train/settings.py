"""`RunSettings`: the arguments of a `Runner`, as one call of `fit` reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lumen import tree
from lumen.core.flops import peak_flops
from lumen.core.step import Step
from lumen.sinks import Sink, run_info
from lumen.train.batch_size import TokenCount
from lumen.train.callbacks import Callbacks
from lumen.train.checkpointer import Checkpointer
from lumen.train.clock import Every
from lumen.train.rewind import Rewind
from lumen.transforms._precision import precision


@dataclass(frozen=True)
class RunSettings:
    """The arguments of a `Runner`, and the metrics that the optimizer's `reduce_on_plateau` monitors."""

    step: Step
    checkpoint: Checkpointer | None
    sinks: Sequence[Sink]
    callbacks: Callbacks
    config: Mapping[str, Any]
    log_every: Every
    tokens: TokenCount | None
    mfu: bool | float
    progress: bool | str
    time_fn: Callable[[], float]
    plateau_monitors: Sequence[str] = ()
    rewind: Rewind | None = None

    @cached_property
    def description(self) -> dict[str, Any]:
        """A description of the run as plain data: its configuration, step and transforms, versions and commit."""
        return {"config": self.config, "step": repr(self.step), **run_info()}

    def best_metric(self) -> dict[str, str]:
        """The metric that the best checkpoints are chosen by, and whether "min" or "max" is best."""
        checkpoint = self.checkpoint
        return {} if checkpoint is None or checkpoint.monitor is None else {checkpoint.monitor: checkpoint.mode}

    def peak_flops(self, state: Any) -> float | None:
        """The peak FLOP/s that `mfu` is relative to."""
        if self.mfu is True:
            leaf = next((t for t in tree.tensors(getattr(state, "params", state)) if t.is_floating_point()), None)
            compute_dtypes = [t.policy.compute for t in self.step.transforms if isinstance(t, precision)]
            return None if leaf is None else peak_flops(leaf.device, *compute_dtypes or [leaf.dtype])
        return float(self.mfu) or None
