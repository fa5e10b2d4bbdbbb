"""Run a step twice under a tracker: on fake tensors in a fake world, or for real."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat
from lumen.core import distributed as processes
from lumen.core.annotations import integer_of
from lumen.core.collectives import MESH_AXES
from lumen.core.step import Step, StepFn, as_step, compose
from lumen.errors import StateError, StepError, WorldError
from lumen.parallel.comm.collectives import BROADCAST_BYTES
from lumen.parallel.comm.mesh import mesh as make_mesh
from lumen.planner.comm_trace import CollectiveCall
from lumen.planner.fake_world import copy_for_dry_run, fake_world, move_to_fake_device, sizes_of
from lumen.planner.tracker import Tracker

MakeRun = Callable[[], tuple[StepFn, Any, Any]]  # the step with its transforms, its state, and one batch


class _FakeConverter(_torch_compat.FakeTensorConverter):
    """Without weak references to fake tensors, which `module.to(dtype)` would count as other users of a param."""

    def set_tensor_memo(self, t: Tensor, v: Any) -> None:
        """Memoize the fake of a real tensor, but not that of a meta tensor."""
        if t.device.type != "meta":
            super().set_tensor_memo(t, v)

    def add_constant_storage_mapping(self, fake_tensor: Any) -> None:
        """Keep the values of integer constants, such as sizes."""
        if fake_tensor.dtype.is_floating_point:
            fake_tensor.constant = None
        else:
            super().add_constant_storage_mapping(fake_tensor)


class _FakeMode(_torch_compat.FakeTensorMode):
    """Tensors without values, freed as soon as they are unreferenced."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.fake_tensor_converter = _FakeConverter(copy_data=False, export=False)

    @property
    def avoid_device_init(self) -> bool:
        """Whether tensors from numbers are created on the CPU first: the planned device does not exist."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUSED:  # torch has no fake rule for these and would run them on zeros
            return None
        # The cache keeps arguments of operations, and so would keep storages alive.
        cached = self.cache_enabled
        self.cache_enabled = cached and _torch_compat.overload_name(func) not in _STORAGE_OVERLOADS
        try:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self.cache_enabled = cached

    def __deepcopy__(self, _memo: Any) -> _FakeMode:
        # A fake tensor references its mode, so a deep copy of a module copies the mode too. Its weak references to
        # storages are freed by address: freeing a copied one again would crash the process later.
        return self


_FUSED = {
    overload
    for packet in (
        _torch_compat.aten_fused_adam_,
        _torch_compat.aten_fused_adamw_,
        _torch_compat.aten_fused_sgd_,
        _torch_compat.aten_fused_adagrad_,
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
    if not _torch_compat.schema_of(overload).returns
}
_STORAGE_OVERLOADS = ("source_Storage", "source_Storage_storage_offset")


class RunTrace(NamedTuple):
    """What a tracker recorded of a step and its mesh axes; `compiled` if `lm.compile` was removed for it."""

    tracker: Tracker
    step: Step
    sizes: Mapping[str, int]
    world_size: int
    rank: int
    seconds: float
    compiled: bool = False


def trace_dry_run(
    load: Callable[[], MakeRun], world_size: int | None, mesh: Mapping[str, int] | None, rank: int, gloo: bool = False
) -> RunTrace:
    """Trace a run on fake tensors, as `rank` of a world of `world_size` processes.

    `load()` runs in that world with ordinary tensors. The function that it returns makes step, state and batch, on fake
    tensors.
    """
    size = _world_size(world_size, mesh)
    compiled = False
    with fake_world(size, rank):
        fake_mesh = make_mesh(**_axes(mesh)) if mesh else None
        make = load()
        mode = _FakeMode()

        def prepare() -> tuple[Step, Any, Any]:
            nonlocal compiled
            step, state, batch = make()
            compiled = any(t.level == "compile" for t in as_step(step).transforms)
            local_step = copy_for_dry_run(step, fake_mesh, on_host=gloo)
            state, batch = tree.map(lambda leaf: _fake(mode, leaf), (state, batch))
            if any(t.level == "parallel" and getattr(t, "offload", False) for t in local_step.transforms):
                if any(t.level == "remat" for t in local_step.transforms):
                    raise StepError(
                        "lm.remat inside lm.fsdp(offload=True) cannot be planned: torch aborts the process when it"
                        " recomputes on a device that does not exist. Plan it without one of the two."
                    )
                device, local_step = move_to_fake_device(local_step)
                tracker.memory.device = device.type
                batch = tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
            return local_step, state, batch

        try:
            tracker = Tracker(_is_copied_by_gloo if gloo else _is_never_copied)
            # In this thread: a fake tensor mode is active in one thread only, and autograd would use one per device.
            with mode, torch.autograd.set_multithreading_enabled(False):
                return _trace_steps(tracker, prepare, size, rank)._replace(compiled=compiled)
        except (_torch_compat.DataDependentOutputException, _torch_compat.DynamicOutputShapeException) as error:
            raise StepError(
                f"the step cannot be planned: {error.args[0]} returns a tensor whose shape depends on values, which a"
                " plan does not have. Mask instead of selecting rows: torch.where(keep, x, 0), or losses * keep."
            ) from error


def trace_real_run(make: MakeRun, world_size: int, rank: int) -> RunTrace:
    """Trace two real steps of what `make` returns, in the current world."""
    gloo = processes.is_distributed() and dist.get_backend() == dist.Backend.GLOO
    return _trace_steps(Tracker(_is_gathered_by_gloo if gloo else _is_never_copied), make, world_size, rank)


def _is_copied_by_gloo(call: CollectiveCall) -> bool:
    """Gloo reduce-scatters a copy of its input, which a tracker of a real run sees."""
    return call.kind == "reduce-scatter" or _is_gathered_by_gloo(call)


def _is_gathered_by_gloo(call: CollectiveCall) -> bool:
    """Gloo all-gathers into a buffer of its own; large shards are broadcast instead, without one."""
    return call.kind == "all-gather" and call.nbytes < BROADCAST_BYTES * len(call.ranks)


def _is_never_copied(_call: CollectiveCall) -> bool:
    return False


def _trace_steps(tracker: Tracker, make: MakeRun, world_size: int, rank: int) -> RunTrace:
    memory = tracker.memory
    with tracker, memory.track_resizes():
        with tracker.stage("make"):
            step, state, batch = make()
            step = as_step(step)
            step = compose(*step.transforms)(tracker.instrument(step.user))
            memory.claim(tree.tensors(batch), "batch")
            _claim(tracker, state)
        with tracker.stage("init"):
            state = step.init(state)
            _claim(tracker, state)
        with tracker.stage("first step"):
            state, metrics = step(state, batch)
            _claim(tracker, state)
        start = time.perf_counter()
        with tracker.stage("step"):
            state, metrics = step(state, batch)  # noqa: RUF059  (kept alive as in a training loop)
            _claim(tracker, state)
        seconds = time.perf_counter() - start
    return RunTrace(tracker, step, sizes_of(step), world_size, rank, seconds)


def _axes(mesh: Mapping[str, int]) -> dict[str, Any]:
    unknown = [name for name in mesh if name not in MESH_AXES]
    if unknown:
        raise WorldError(f"a mesh has no axis {unknown[0]!r}; its axes are {', '.join(MESH_AXES)}.")
    return dict(mesh)


def _claim(tracker: Tracker, state: Any) -> None:
    if not tree.tensors(state):
        raise StateError(
            f"a plan needs a state with tensors, or a function that returns one, not {type(state).__name__}."
        )
    tracker.claim_state(state)


def _fake(mode: _torch_compat.FakeTensorMode, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        leaf = torch.as_tensor(leaf)
    return mode.from_tensor(leaf) if isinstance(leaf, Tensor) and not mode.is_our_fake(leaf) else leaf


def _world_size(world_size: int | None, mesh: Mapping[str, int] | None) -> int:
    if world_size is not None:
        return world_size
    if not mesh:
        raise WorldError("a plan needs a world: write world_size=1024, or mesh=dict(shard=64, data=16).")
    if any(integer_of(size, low=1) is None for size in mesh.values()):
        raise WorldError(f"mesh={dict(mesh)!r} does not determine the number of processes: write world_size= as well.")
    size = 1
    for axis_size in mesh.values():
        size *= axis_size
    return size
