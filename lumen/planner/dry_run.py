"""Running a step twice under a watch: on fake tensors in a fake world, or as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorConverter,
    FakeTensorMode,
)

from lumen import tree
from lumen.core import distributed as processes
from lumen.core.step import Step, StepFn, as_step, compose
from lumen.errors import StateError, StepError, WorldError
from lumen.parallel.comm.mesh import AXES
from lumen.parallel.comm.mesh import mesh as make_mesh
from lumen.planner.fake_world import fake_world, moved, on_device, sizes_of
from lumen.planner.tracker import Watch

# Gloo gathers into a tensor of its own, and reduces a copy of what is to be scattered; only the second is a tensor of
# this thread's, which a watch over a real run sees by itself.
Make = Callable[[], tuple[StepFn, Any, Any]]  # the step with its transforms, its state, and one batch


class _Converter(FakeTensorConverter):
    """Torch's own keeps weak references to what it makes, which `module.to(dtype)` takes for other users of a param."""

    def set_tensor_memo(self, t: Tensor, v: Any) -> None:
        """Remember what stands for a real tensor, and nothing else."""
        if t.device.type != "meta":
            super().set_tensor_memo(t, v)

    def add_constant_storage_mapping(self, fake_tensor: Any) -> None:
        """Remember the value of a constant where it is a whole number, as sizes are."""
        if fake_tensor.dtype.is_floating_point:
            fake_tensor.constant = None
        else:
            super().add_constant_storage_mapping(fake_tensor)


class _Mode(FakeTensorMode):
    """Tensors without values, which end when nobody holds them any more."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.fake_tensor_converter = _Converter(copy_data=False, export=False)

    @property
    def avoid_device_init(self) -> bool:
        """Whether tensors of numbers are made on the CPU first: the device of a plan is not there."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUSED:  # torch has no rule for these, and would run them, on whole tensors of zeros
            return None
        # Torch's own remembers operations by their arguments, and so would hold a storage for ever.
        cached = self.cache_enabled
        self.cache_enabled = cached and func._overloadname not in _OF_STORAGE
        try:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self.cache_enabled = cached

    def __deepcopy__(self, _memo: Any) -> _Mode:
        # A fake tensor has its mode in its `__dict__`, so a deep copy of a module would reach it. The mode has weak
        # references to storages that free themselves by address: a second of the same one ends the process, later.
        return self


_FUSED = {
    overload
    for packet in (
        torch.ops.aten._fused_adam_,
        torch.ops.aten._fused_adamw_,
        torch.ops.aten._fused_sgd_,
        torch.ops.aten._fused_adagrad_,
    )
    for overload in (getattr(packet, each) for each in packet.overloads())
    if not overload._schema.returns
}
_OF_STORAGE = ("source_Storage", "source_Storage_storage_offset")


class Seen(NamedTuple):
    """What was seen of a run, of which step, and over which axes; `compiled` where `lm.compile` was left out."""

    watch: Watch
    step: Step
    sizes: Mapping[str, int]
    world_size: int
    rank: int
    seconds: float
    compiled: bool = False


def planned(
    load: Callable[[], Make], world_size: int | None, mesh: Mapping[str, int] | None, rank: int, gloo: bool = False
) -> Seen:
    """A run, on tensors without values, as `rank` of a world of `world_size` processes.

    `load()` is called in that world, with ordinary tensors; what it returns gives the run's parts, on such without.
    """
    size = _world_size(world_size, mesh)
    compiled = False
    with fake_world(size, rank):
        grid = make_mesh(**_axes(mesh)) if mesh else None
        make = load()
        mode = _Mode()

        def made() -> tuple[Step, Any, Any]:
            nonlocal compiled
            step, state, batch = make()
            compiled = any(t.level == "compile" for t in as_step(step).transforms)
            found = moved(step, grid)
            state, batch = tree.map(lambda leaf: _fake(mode, leaf), (state, batch))
            if any(getattr(t, "offload", False) for t in found.transforms):
                if any(t.level == "remat" for t in found.transforms):
                    raise StepError(
                        "a plan cannot follow lm.remat inside lm.fsdp(offload=True): torch ends the process where it"
                        " computes again on a device that is not there. Plan it without one of the two."
                    )
                device, found = on_device(found)
                watch.memory.device = device.type
                batch = tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
            return found, state, batch

        try:
            watch = Watch(("all-gather", "reduce-scatter") if gloo else ())
            # In this thread: autograd would go to a device's own, and a mode over fake tensors serves one.
            with mode, torch.autograd.set_multithreading_enabled(False):
                return _watched(watch, made, size, rank)._replace(compiled=compiled)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise StepError(
                f"the step cannot be planned: {error.args[0]} gives a tensor whose shape depends on values, and a plan"
                " has none. Mask instead of selecting rows: torch.where(keep, x, 0), or losses * keep."
            ) from error


def observed(make: Make, world_size: int, rank: int) -> Seen:
    """Two steps of what `make` gives, in the world that this process is in."""
    gloo = processes.is_distributed() and dist.get_backend() == dist.Backend.GLOO
    return _watched(Watch(("all-gather",) if gloo else ()), make, world_size, rank)


def _watched(watch: Watch, make: Make, world_size: int, rank: int) -> Seen:
    memory = watch.memory
    with watch, memory.resizes():
        with watch.stage("make"):
            step, state, batch = make()
            step = as_step(step)
            step = compose(*step.transforms)(watch.watched(step.user))
            memory.claim(tree.tensors(batch), "batch")
            _claim(watch, state)
        with watch.stage("init"):
            state = step.init(state)
            _claim(watch, state)
        with watch.stage("first step"):
            state, metrics = step(state, batch)
            _claim(watch, state)
        began = time.perf_counter()
        with watch.stage("step"):
            state, metrics = step(state, batch)  # noqa: RUF059  (held as long as a loop holds them)
            _claim(watch, state)
        seconds = time.perf_counter() - began
    return Seen(watch, step, sizes_of(step), world_size, rank, seconds)


def _axes(mesh: Mapping[str, int]) -> dict[str, Any]:
    unknown = [name for name in mesh if name not in AXES]
    if unknown:
        raise WorldError(f"a mesh has no axis {unknown[0]!r}; its axes are {', '.join(AXES)}.")
    return dict(mesh)


def _claim(watch: Watch, state: Any) -> None:
    if not tree.tensors(state):
        raise StateError(f"a plan needs a state with tensors, or a function that makes it, not {type(state).__name__}.")
    watch.claim_state(state)


def _fake(mode: FakeTensorMode, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        leaf = torch.as_tensor(leaf)
    return mode.from_tensor(leaf) if isinstance(leaf, Tensor) and not mode.is_our_fake(leaf) else leaf


def _world_size(world_size: int | None, mesh: Mapping[str, int] | None) -> int:
    if world_size is not None:
        return world_size
    if not mesh:
        raise WorldError("a plan needs a world: write world_size=1024, or mesh=dict(shard=64, data=16).")
    if any(type(size) is not int or size < 1 for size in mesh.values()):
        raise WorldError(f"mesh={dict(mesh)!r} leaves open how many processes there are: write world_size= beside it.")
    size = 1
    for each in mesh.values():
        size *= each
    return size
