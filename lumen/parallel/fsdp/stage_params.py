"""Stage 3 around `lm.pipeline`: the params of a process's pipeline stages are all-gathered once for each gradient.

A microbatch of the schedule would otherwise all-gather and reduce-scatter every unit again, and an error in one stage
would leave other processes waiting in the middle of the schedule. Between gradients params are shards as elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen.core import rules
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.core.step import Transform
from lumen.errors import OrderError
from lumen.parallel.ddp.grad_reduction import DataParallelRule
from lumen.parallel.fsdp.shard import gather
from lumen.parallel.fsdp.sharded_states import ShardedStates
from lumen.parallel.fsdp.unit_plan import UnitPlans

if TYPE_CHECKING:
    from lumen.parallel.fsdp.fsdp import fsdp


def has_pipeline(transforms: Sequence[Transform]) -> bool:
    """Whether `lm.pipeline` is one of `transforms`."""
    return any(transform.level == "pipeline" for transform in transforms)


def check_pipeline(transform: fsdp, inside: Sequence[Transform]) -> None:
    """Raise `OrderError` for settings that mean nothing where a stage's params are gathered together."""
    if not has_pipeline(inside):
        return
    if transform.offload:
        raise OrderError(
            "lm.fsdp(offload=True) brings one unit to the device at a time, and lm.pipeline needs all params of its"
            " stage for many microbatches. Leave offload out: lm.fsdp(mesh)(lm.pipeline(mesh, ...)(step))."
        )
    if transform.patterns is not None or transform.prefetch != 1:
        raise OrderError(
            f"{transform!r} around lm.pipeline gathers the params of a stage together, and no units. Leave wrap and"
            " prefetch out."
        )


def gather_params(plans: UnitPlans, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full params, on every rank of the fsdp group; those of other pipeline stages are empty."""
    shapes = [plans.shapes[name] for name in params]
    wire_dtype = plans.param_dtype
    return dict(zip(params, gather(plans.layout, [*params.values()], shapes, wire_dtype), strict=True))


def apply_gathered(states: ShardedStates, rule: DataParallelRule, next: Next, call: ApplyCall) -> Any:
    """APPLY: in a loss function, params are full; outside of one they are all-gathered."""
    plans = None if rules.is_inside_loss() else states.of_model(call.target, call.params)
    if plans is not None and not _is_full(plans, call.params):
        call = call.replace(params=gather_params(plans, call.params))
    return rule.apply(next, call)


def _is_full(plans: UnitPlans, params: Mapping[str, Tensor]) -> bool:
    shapes = {name: torch.Size(param.shape) for name, param in params.items()}
    return shapes == plans.shapes and any(plans.layout.shape(s) != s for s in shapes.values())
