"""`lm.plan`: what a run on many devices will hold, send and take, found out by one process that has none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lumen.core import distributed as processes
from lumen.core.step import StepFn
from lumen.planner.dry_run import Make, observed, planned
from lumen.planner.report import Plan
from lumen.planner.roofline import device as device_of


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
    """Memory, communication and time of `step` in a world of `world_size` processes, without any of them.

    The step, with its transforms, runs twice on tensors without values, as `rank` of a world that only this process
    knows of. Every storage, operation and collective of it is counted. So nothing is computed, sent or allocated: a
    model that fills a thousand devices is planned on a laptop.

    `state` is a state before `step.init`, or a function that makes one, which then needs no memory either; `batch` is
    one process's batch, or a function too. `mesh` names the axes, such as `dict(shard=64, data=16)`, and takes the
    place of that of `lm.ddp` or `lm.fsdp` in the step; `world_size` is their product by default. `device` is one of
    "h100", "h200", "a100" and "cpu"; `figures` put others in place of its `memory`, `bandwidth`, `flops`, `inside` and
    `between` (of the wires in a node and between nodes), `per_node`, `efficiency` and latencies.

    Raises `WorldError` where the axes do not make up the world, or in a process that belongs to one, and `StepError`
    where the shape of a tensor depends on values.

    >>> import lumen as lm, torch
    >>> from lumen.planner.plan import plan
    >>> def step(state, batch):
    ...     def loss_fn(params, batch):
    ...         return state.apply(params, batch)[0].square().mean()
    ...     loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> found = plan(
    ...     lm.fsdp()(step),
    ...     lambda: lm.TrainState.create(torch.nn.Linear(65_536, 65_536, bias=False), lm.optim.sgd(0.1)),
    ...     torch.zeros(8, 65_536),
    ...     mesh=dict(shard=1024),
    ... )
    >>> found.peak.nbytes // 2**30, found.fits, found.seen.sizes["shard"]
    (32, True, 1024)
    """
    made: Make = lambda: (step, _value(state), _value(batch))  # noqa: E731
    return plan_loaded(lambda: made, world_size=world_size, mesh=mesh, rank=rank, device=device, **figures)


def plan_loaded(
    load: Callable[[], Make],
    *,
    world_size: int | None = None,
    mesh: Mapping[str, int] | None = None,
    rank: int = 0,
    device: str = "h100",
    **figures: float,
) -> Plan:
    """`plan` of what `load()()` returns, `(step, state, batch)`: both are called inside the world that is thought of,
    and the second on tensors without values."""
    found = device_of(device, **figures)
    return Plan(planned(load, world_size, mesh, rank, gloo=device == "cpu"), found)


def measure(step: StepFn, state: Any, batch: Any, *, device: str = "cpu", **figures: float) -> Plan:
    """The same numbers of a real run, in the world that this process is in: two steps on tensors with values.

    `seen.seconds` is how long the second step took, watched.
    """
    made: Make = lambda: (step, _value(state), _value(batch))  # noqa: E731
    return Plan(observed(made, processes.world_size(), processes.rank()), device_of(device, **figures))


def _value(given: Any | Callable[[], Any]) -> Any:
    return given() if callable(given) else given
