"""`lm.plan`: predict memory, communication and time of a run on many devices, without any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lumen.core import distributed as processes
from lumen.core.arguments import checked_first
from lumen.core.step import StepFn
from lumen.planner.dry_run import MakeRun, trace_dry_run, trace_real_run
from lumen.planner.report import Plan
from lumen.planner.roofline import device as device_of


@checked_first
def plan(
    step: StepFn,
    state: Any,
    batch: Any,
    *,
    world_size: int | None = None,
    mesh: Mapping[str, int] | None = None,
    rank: int = 0,
    device: str = "h100",
    **figures: float,
) -> Plan:
    """Memory, communication and time of `step` in a world of `world_size` processes, without starting them.

    The step, with its transforms, runs twice on tensors without values, as `rank` of a simulated world. Every storage,
    operation and collective is counted, but nothing is computed, sent or allocated: a model that fills a thousand
    devices can be planned on a laptop.

    `state` is a state before `step.init`, or a function that returns one and then needs no memory either; `batch` is
    the batch of one process, or a function. `mesh` names the axes, such as `dict(shard=64, data=16)`, and replaces
    the mesh of `lm.ddp` or `lm.fsdp` in the step; `world_size` is their product by default. `device` is one of
    "h100", "h200", "a100" and "cpu"; `figures` replace its `memory`, `bandwidth`, `flops`, `inside` and
    `between` (bandwidths within a node and between nodes), `per_node`, `efficiency` and latencies.

    Raises `WorldError` if the axes do not match the world size, or in a process that already belongs to a world, and
    `StepError` if the shape of a tensor depends on values.

    >>> import lumen as lm, torch
    >>> from lumen.planner.plan import plan
    >>> def step(state, batch):
    ...     def loss_fn(params, batch):
    ...         return state.apply(params, batch)[0].square().mean()
    ...     loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> report = plan(
    ...     lm.fsdp()(step),
    ...     lambda: lm.TrainState.create(torch.nn.Linear(65_536, 65_536, bias=False), lm.optim.sgd(0.1)),
    ...     torch.zeros(8, 65_536),
    ...     mesh=dict(shard=1024),
    ... )
    >>> report.peak.nbytes // 2**30, report.fits, report.trace.sizes["shard"]
    (32, True, 1024)
    """
    make: MakeRun = lambda: (step, _value(state), _value(batch))  # noqa: E731
    return plan_loaded(lambda: make, world_size=world_size, mesh=mesh, rank=rank, device=device, **figures)


def plan_loaded(
    load: Callable[[], MakeRun],
    *,
    world_size: int | None = None,
    mesh: Mapping[str, int] | None = None,
    rank: int = 0,
    device: str = "h100",
    **figures: float,
) -> Plan:
    """`plan` of `(step, state, batch)` from `load()()`; both calls run in the simulated world, the second on fake
    tensors."""
    target = device_of(device, **figures)
    return Plan(trace_dry_run(load, world_size, mesh, rank, gloo=device == "cpu"), target)


@checked_first
def measure(step: StepFn, state: Any, batch: Any, *, device: str = "cpu", **figures: float) -> Plan:
    """The same numbers for a real run: two steps on real tensors, in the current world.

    `trace.seconds` is the time of the second step, with tracking.
    """
    make: MakeRun = lambda: (step, _value(state), _value(batch))  # noqa: E731
    return Plan(trace_real_run(make, processes.world_size(), processes.rank()), device_of(device, **figures))


def _value(value: Any | Callable[[], Any]) -> Any:
    return value() if callable(value) else value
