"""A world in which only this process exists, and a copy of a step to run in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen.core import _torch_compat, distributed
from lumen.core.annotations import integer_of
from lumen.core.step import Step, StepFn, Transform, as_step, compose
from lumen.errors import WorldError
from lumen.parallel.comm import process_groups
from lumen.parallel.comm.mesh import Mesh


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    """Inside this context, the process is `rank` of a world of `size` without other processes.

    Collectives return at once and send nothing. Their results have the right shapes but no meaning, so use tensors
    without values. Raises `WorldError` inside a world, and for a rank outside `size`.

    >>> import lumen as lm
    >>> from lumen.planner.fake_world import fake_world
    >>> with fake_world(1024, rank=70):
    ...     mesh = lm.mesh(shard=64, data=16)
    ...     mesh.index("data"), mesh.index("shard")
    (1, 6)
    """
    if distributed.is_distributed():
        raise WorldError(
            f"this process is rank {distributed.rank()} of {distributed.world_size()} already, and a plan creates a"
            " simulated world. Plan from one process, without torchrun."
        )
    if integer_of(size, low=1) is None:
        raise WorldError(f"world_size={size!r} must be a number of processes, at least 1.")
    if integer_of(rank, low=0) is None or rank >= size:
        raise WorldError(f"rank={rank!r} is not in a world of {size}: give a number from 0 to {size - 1}.")

    hook = sys.excepthook  # torch wraps it in each world, and leaves it wrapped
    dist.init_process_group("fake", store=_torch_compat.FakeStore(), rank=int(rank), world_size=int(size))
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
        process_groups.release()


def copy_for_dry_run(step: StepFn, mesh: Mesh | None, *, on_host: bool = False) -> Step:
    """`step` without `lm.compile`, with its parallel transforms on `mesh` unless that is None.

    If it is planned `on_host`, `lm.remat(offload=True)` has nowhere to move activations to.
    """
    composed = as_step(step)
    transforms = [_on_mesh(transform, mesh) for transform in composed.transforms if transform.level != "compile"]
    if on_host:
        transforms = [t.replace(offload=False) if t.level == "remat" else t for t in transforms]
    return compose(*transforms)(composed.user)


def _on_mesh(transform: Transform, mesh: Mesh | None) -> Transform:
    return transform if mesh is None or _mesh_of(transform) is None else transform.replace(mesh=mesh)


def _mesh_of(transform: Transform) -> Mesh | None:
    """The mesh of a transform that takes one."""
    mesh = getattr(transform, "mesh", None)
    return mesh if isinstance(mesh, Mesh) and "mesh" in transform._settings else None


def move_to_fake_device(step: Step) -> tuple[torch.device, Step]:
    """A fake device, and `step` on it, so that host memory is counted separately.

    The device has no memory, and its tensors have no values. Autograd requires a backend for it even for fake tensors,
    so one is registered once per process; outside of plans it reports no devices.
    """
    if _torch_compat.get_privateuse1_backend_name() != _DEVICE:
        _register()
    device = torch.device(_DEVICE, 0)
    moved = []
    for transform in step.transforms:
        mesh = _mesh_of(transform)
        if mesh is not None:
            transform = transform.replace(mesh=Mesh(mesh.sizes, device, mesh.torch))
        moved.append(transform)
    return device, compose(*moved)(step.user)


_DEVICE = "planned"


def _register() -> None:
    class Hook(_torch_compat.DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return distributed.is_dry_run()

    setup: Any = _torch_compat.setup_privateuseone_for_python_backend
    setup(_DEVICE, backend_module=_FakeDeviceModule(), hook=Hook())
    _fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _AUTOCAST_OPERATIONS:
        operation = getattr(torch.ops.aten, name.partition(".")[0])
        _library.impl(name, _autocast(operation), "AutocastPrivateUse1")


# What autocast computes in 16 bits, as in torch's rules for its own devices.
_AUTOCAST_OPERATIONS = (
    *("linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "scaled_dot_product_attention"),
    *("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding"),
    *("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"),
)
_library = torch.library.Library("aten", "IMPL")  # it unregisters its kernels when it is freed
_fallbacks = torch.library.Library("_", "IMPL")
_AUTOCAST_KEY = _torch_compat.DispatchKeySet(_torch_compat.DispatchKey.AutocastPrivateUse1)


def _autocast(operation: Callable[..., Any]) -> Callable[..., Any]:
    """`operation` on tensors that are cast like under autocast."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(_DEVICE)

        def cast(x: Any) -> Any:
            casts = isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64
            return x.to(dtype) if casts else x

        with _torch_compat.ExcludeDispatchKeyGuard(_AUTOCAST_KEY):
            return operation(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run


class _FakeDeviceModule:
    """The device module that torch queries: one device during a plan, without random numbers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return distributed.is_dry_run()

    def device_count(self) -> int:
        return int(distributed.is_dry_run())

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        with distributed.real_tensors():
            return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


def sizes_of(step: Step) -> Mapping[str, int]:
    """The mesh axes of the step's parallel transform; empty if there is none."""
    meshes = [_mesh_of(t) for t in step.transforms if t.level in ("parallel", "context", "pipeline")]
    return next((mesh.sizes for mesh in meshes if mesh is not None), {})
