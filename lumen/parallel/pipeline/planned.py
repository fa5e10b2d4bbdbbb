"""What a plan knows of the last stage on the processes of others: the forms of the loss and aux, without values."""

from __future__ import annotations

from typing import Any

import torch

from lumen import tree
from lumen.core import gradient, rules
from lumen.core.device import forked_rng
from lumen.core.primitives import Gradient, GradientCall
from lumen.errors import OrderError
from lumen.parallel.pipeline.absent import Absent
from lumen.parallel.pipeline.job import GradientJob
from lumen.parallel.pipeline.probe import Probe
from lumen.parallel.pipeline.split import STAGE
from lumen.parallel.pipeline.stage_run import SplitModel


class _FormProbe(Probe):
    """Follows a microbatch through all stages and through the rest of the loss function."""

    def leave(self, out: Any) -> None:
        """Go on."""


def planned_result(call: GradientCall, job: GradientJob, model: SplitModel) -> Gradient:
    """The loss and aux of one microbatch, as the process of the last stage would have them."""
    params = model.tensors_of(None, call.params)
    microbatch, rows = job.first_microbatch
    call = call.replace(batch=microbatch, params=params, summed=True, reduction=None)
    device = next(iter(call.params.values())).device
    with forked_rng(device), rules.inside_loss, rules.bound_axis(STAGE, _FormProbe(model.count)):
        _, loss, aux, scalar = gradient.objective_of(call, params, rows)
    loss, aux = tree.map(_zeros_of, (loss, aux))
    return Gradient(loss, None, aux, scalar, rows)


def _zeros_of(leaf: Any) -> Any:
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Absent) else leaf


def cannot_plan_turns() -> OrderError:
    """The error for a model that is applied outside of a gradient."""
    return OrderError(
        "lm.plan cannot plan a step that applies the model outside of its loss function under lm.pipeline, where"
        " processes wait for each other's output. Plan the training step alone."
    )
