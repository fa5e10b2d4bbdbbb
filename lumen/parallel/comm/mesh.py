"""`lm.mesh`: the processes of a run as a grid with named axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lumen.core import distributed, rules
from lumen.errors import WorldError
from lumen.parallel.comm import collectives, process_groups
from lumen.parallel.comm.init import TIMEOUT, join
from lumen.parallel.comm.process_groups import GroupRef

AXES = ("data", "shard", "tensor")
_Device: TypeAlias = torch.device  # a mesh has a property of the module's name


class Mesh:
    """Processes in a grid: `data` replicates, `shard` cuts params and state, `tensor` cuts single matrices.

    The rows of a batch are spread over `data` and `shard` together; processes along `tensor` are handed the same ones.
    Every axis exists; one that was not asked for has size 1. `device` is where this process computes.

    It lasts as long as the world that it was made in: once that was left, what needs its processes raises `WorldError`.
    """

    def __init__(self, sizes: Mapping[str, int], device: _Device, torch_mesh: DeviceMesh | None) -> None:
        self.sizes = dict(sizes)
        self.device = device
        self._torch = torch_mesh
        self._world = 0 if torch_mesh is None else process_groups.world_number()
        self._axes = {name: ProcessAxis(self, name) for name in AXES}

    def __repr__(self) -> str:
        return f"lm.mesh({', '.join(f'{name}={size}' for name, size in self.sizes.items() if size > 1)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mesh):
            return NotImplemented
        return (self.sizes, self.device, self._world) == (other.sizes, other.device, other._world)

    def __hash__(self) -> int:
        return hash((*self.sizes.items(), self.device, self._world))

    def __deepcopy__(self, _memo: Any) -> Mesh:
        return self  # what stands on it may be copied, the processes may not

    @property
    def torch(self) -> DeviceMesh | None:
        """Torch's own mesh, None where this process is alone. Its groups are destroyed when the world is left."""
        if self._torch is not None and self._world != process_groups.world_number():
            process_groups.raise_left(repr(self))
        return self._torch

    def size(self, *axes: str) -> int:
        """How many processes there are along `axes` together, by default all."""
        return math.prod(self.sizes[name] for name in axes or AXES)

    def index(self, axis: str) -> int:
        """This process's place along `axis`."""
        found = self.torch
        return 0 if found is None else found.get_local_rank(axis)

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The processes that differ from this one in their place along `axes` only; None where it is alone there.

        Do not keep it: Gloo's threads live as long as anything refers to it, also after the world was left.
        """
        wide = [name for name in axes if self.sizes[name] > 1]
        found = self.torch
        if not wide or found is None:
            return None
        if len(wide) == 1:
            return process_groups.noted(found.get_group(wide[0]))
        flat = "_".join(wide)
        with distributed.real_tensors():
            return process_groups.noted(found[tuple(wide)]._flatten(flat).get_group())

    def bound(self) -> AbstractContextManager[None]:
        """With every axis bound for `lm.psum` and its kin."""
        _ = self.torch  # raises where its world was left
        return rules.bound_axes(self._axes)


class StepMesh:
    """The processes that one step of a parallel transform runs on.

    They are those of the mesh that the transform was given, or all of the world along `axis`, and are looked up when
    the step is prepared or called for the first time. The step keeps them, so that it is known to belong to its world;
    the transform does not, and can be part of a step of another world.
    """

    def __init__(self, given: Mesh | None, axis: str) -> None:
        self._given, self._axis = given, axis

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh."""
        if self._given is not None:
            return self._given
        axes: dict[str, Any] = {self._axis: -1}
        return mesh(**axes)


class ProcessAxis:
    """An axis of a mesh, for collectives by its name."""

    process = True

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.size = mesh.size(name)
        self._mesh, self._name = mesh, name

    def index(self) -> Tensor:
        """This process's place."""
        return torch.tensor(self._mesh.index(self._name), device=self._mesh.device)

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum, maximum or minimum over the axis; the gradient of every member reaches every member."""
        group = self._mesh.group(self._name)
        return x if group is None else _Reduce.apply(x, op, GroupRef(group))  # type: ignore[no-untyped-call]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str, group: GroupRef) -> Tensor:
        out = collectives.all_reduce(x.detach().clone(memory_format=torch.contiguous_format), op, group())()
        ctx.op, ctx.group = op, group
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, out = ctx.saved_tensors
        total = _Reduce.apply(grad, "sum", ctx.group)  # type: ignore[no-untyped-call]
        if ctx.op == "sum":
            return total, None, None
        winners = (x == out).to(grad.dtype)
        return total * winners / _Reduce.apply(winners, "sum", ctx.group), None, None  # type: ignore[no-untyped-call]


def mesh(
    *,
    data: int | None = None,
    shard: int | None = None,
    tensor: int | None = None,
    device: torch.device | str | None = None,
    timeout: float = TIMEOUT,
) -> Mesh:
    """The processes that torchrun started, as a grid of `data` × `shard` × `tensor`; alone, a grid of one.

    An axis that is left out is 1; where none is given, all processes are along `data`. One may be -1: what the others
    leave of the world. The first call joins the processes; `timeout` is how many seconds a collective waits.
    `lm.Loader` cuts batches as the last mesh says: into as many parts as there are processes along data and shard.

    Raises `WorldError` where the axes do not make up the world.

    >>> import lumen as lm
    >>> lm.parallel.mesh().size()
    1
    """
    found = join(device, timeout)
    sizes = _sizes({"data": data, "shard": shard, "tensor": tensor}, distributed.world_size())
    distributed.set_tp_degree(sizes["tensor"])
    if not distributed.is_distributed():
        return Mesh(sizes, found, None)
    return Mesh(sizes, found, _grid(found.type, sizes))


def _grid(device: str, sizes: Mapping[str, int]) -> DeviceMesh:
    def make() -> DeviceMesh:
        with distributed.real_tensors():
            return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    return process_groups.mesh_of((device, *sizes.items()), make)


def _sizes(asked: Mapping[str, int | None], processes: int) -> dict[str, int]:
    for name, size in asked.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1)):
            raise WorldError(f"mesh({name}={size!r}) must be a positive number of processes, or -1 for what is left.")
    free = [name for name, size in asked.items() if size == -1]
    if all(size is None for size in asked.values()):
        free = ["data"]
    sizes = {name: 1 if size in (None, -1) else int(size or 1) for name, size in asked.items()}
    product = math.prod(sizes.values())
    if len(free) == 1 and processes % product == 0:
        sizes[free[0]] = processes // product
        return sizes
    if not free and product == processes:
        return sizes
    said = ", ".join(f"{name}={size}" for name, size in asked.items() if size is not None)
    raise WorldError(
        f"mesh({said}) does not make up the world, which has {processes} processes"
        + (": only one axis can be -1." if len(free) > 1 else f", but {product}.")
        + _advice(sizes, processes)
    )


def _advice(sizes: Mapping[str, int], processes: int) -> str:
    others = math.prod(size for name, size in sizes.items() if name != "data")
    if processes % others == 0:
        named = "".join(f", {name}={size}" for name, size in sizes.items() if name != "data" and size > 1)
        return f" Write lm.mesh(data={processes // others}{named}), or start {math.prod(sizes.values())} processes."
    return f" Start {math.prod(sizes.values())} processes: torchrun --nproc-per-node={math.prod(sizes.values())}"
