"""`lm.mesh`: the ranks of a run as a grid with named axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lumen.core import _torch_compat, distributed, rules
from lumen.core.annotations import integer_of
from lumen.core.arguments import checked
from lumen.core.collectives import MESH_AXES, check_joined
from lumen.errors import WorldError
from lumen.parallel.comm import collectives, process_groups
from lumen.parallel.comm.init import TIMEOUT, join
from lumen.parallel.comm.process_groups import GroupRef

_Device: TypeAlias = torch.device  # a mesh has a property of the module's name


class Mesh:
    """A grid of ranks: `data` replicates, `shard` shards params and state, `context` sequences, `tensor` matrices.

    Along `pipeline` ranks have different stages of a model. The rows of a batch are split over `data` and `shard`
    together. Ranks along `pipeline`, `context` and `tensor` receive the same rows. Every axis exists, with size 1 by
    default. `device` is where this rank computes.

    A mesh is valid as long as the world in which it was made. After that, whatever needs its ranks raises `WorldError`.
    """

    def __init__(self, sizes: Mapping[str, int], device: _Device, torch_mesh: DeviceMesh | None) -> None:
        self.sizes = dict(sizes)
        self.device = device
        self._torch = torch_mesh
        self._world = 0 if torch_mesh is None else process_groups.world_number()
        self._axes = {name: ProcessAxis(self, name) for name in MESH_AXES}

    def __repr__(self) -> str:
        return f"lm.mesh({', '.join(f'{name}={size}' for name, size in self.sizes.items() if size > 1)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mesh):
            return NotImplemented
        return (self.sizes, self.device, self._world) == (other.sizes, other.device, other._world)

    def __hash__(self) -> int:
        return hash((*self.sizes.items(), self.device, self._world))

    def __deepcopy__(self, _memo: Any) -> Mesh:
        return self  # shared by the copies of a step on it

    @property
    def torch(self) -> DeviceMesh | None:
        """Torch's own mesh, None in a world of one rank. Its groups are destroyed when the world is left."""
        if self._torch is not None and self._world != process_groups.world_number():
            process_groups.raise_left(repr(self))
        return self._torch

    def size(self, *axes: str) -> int:
        """The number of ranks along `axes` together, by default along all axes."""
        return math.prod(self.sizes[name] for name in axes or MESH_AXES)

    def index(self, axis: str) -> int:
        """This rank's index along `axis`."""
        grid = self.torch
        return 0 if grid is None or self.sizes[axis] == 1 else grid.get_local_rank(axis)

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The group of ranks that differ from this one in their index along `axes` only; None for a group of one.

        Do not keep it: Gloo's threads stay alive as long as anything refers to it, even after the world has been left.
        """
        wide = [name for name in axes if self.sizes[name] > 1]
        grid = self.torch
        if not wide or grid is None:
            return None
        if len(wide) == 1:
            return process_groups.hand_out(grid.get_group(wide[0]))
        flat = "_".join(wide)
        with distributed.real_tensors():
            return process_groups.hand_out(_torch_compat.flattened(grid[tuple(wide)], flat).get_group())

    def bound(self) -> _BoundAxes:
        """Bind every axis for `lm.psum` and the other collectives.

        Raises `AxisError` at the end where these joined the rows of one rank alone, and not those of the others.
        """
        _ = self.torch  # raises where its world was left
        return _BoundAxes(self._axes, self.sizes)


class _BoundAxes(rules.bound_axes):
    """The axes of a mesh, while a step runs."""

    __slots__ = ("_sizes",)

    def __init__(self, axes: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        super().__init__(axes)
        self._sizes = sizes

    def __enter__(self) -> None:
        super().__enter__()
        rules.stack.joined_axes = set()

    def __exit__(self, kind: object = None, *_exc: object) -> None:
        super().__exit__()
        if kind is None and rules.stack.joined_axes:
            check_joined(self._sizes)


class StepMesh:
    """The ranks that one step of a parallel transform runs on.

    They are those of the transform's mesh, by default all of the world along `axis`. They are looked up when the step
    is prepared or called for the first time. The step keeps them, and belongs to their world. The transform does not,
    and can be part of a step in another world.
    """

    def __init__(self, mesh: Mesh | None, axis: str) -> None:
        self._mesh, self._axis = mesh, axis

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh."""
        if self._mesh is not None:
            return self._mesh
        axes: dict[str, Any] = {self._axis: -1}
        return mesh(**axes)


class ProcessAxis:
    """An axis of a mesh, for collectives by its name."""

    process = True

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.size = mesh.size(name)
        self._mesh, self._name = mesh, name

    def index(self) -> Tensor:
        """This rank's index."""
        return torch.tensor(self._mesh.index(self._name), device=self._mesh.device)

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum, maximum or minimum over the axis; the gradient of every rank reaches every rank."""
        group = self._mesh.group(self._name)
        return x if group is None else _Reduce.apply(x, op, GroupRef(group))  # type: ignore[no-untyped-call]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str, group: GroupRef) -> Tensor:
        result = collectives.all_reduce(x.detach().clone(memory_format=torch.contiguous_format), op, group())()
        ctx.op, ctx.group = op, group
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, result = ctx.saved_tensors
        total = _Reduce.apply(grad, "sum", ctx.group)  # type: ignore[no-untyped-call]
        if ctx.op == "sum":
            return total, None, None
        winners = (x == result).to(grad.dtype)
        return total * winners / _Reduce.apply(winners, "sum", ctx.group), None, None  # type: ignore[no-untyped-call]


@checked
def mesh(
    *,
    data: int | None = None,
    shard: int | None = None,
    pipeline: int | None = None,
    context: int | None = None,
    tensor: int | None = None,
    device: torch.device | str | None = None,
    timeout: float = TIMEOUT,
) -> Mesh:
    """The ranks that a launcher started, as a grid of `data` × `shard` × `pipeline` × `context` × `tensor`.

    The launcher is torchrun, `srun`, `mpirun` or another one of docs/clusters.md; without one it is a grid of one. An
    axis that is left out has size 1. Without any axis, all ranks are along `data`. One axis may be -1: the world size
    divided by the others. The first call joins the world; `timeout` is how many seconds it waits for the other ranks,
    and each collective later. `lm.Loader` splits batches by the last mesh, over as many ranks as there are along data
    and shard.

    Raises `WorldError` where the product of the axes is not the world size, where the launcher's variables contradict
    each other or give no address, and where the other ranks do not join in time.

    >>> import lumen as lm
    >>> lm.parallel.mesh().size()
    1
    """
    chosen = join(device, timeout)
    axes = {"data": data, "shard": shard, "pipeline": pipeline, "context": context, "tensor": tensor}
    sizes = _sizes(axes, distributed.world_size())
    distributed.set_row_replicas(sizes["pipeline"] * sizes["context"] * sizes["tensor"])
    if not distributed.is_distributed():
        return Mesh(sizes, chosen, None)
    return Mesh(sizes, chosen, _grid(chosen.type, sizes))


def _grid(device: str, sizes: Mapping[str, int]) -> DeviceMesh:
    # Each axis of torch's mesh has process groups, with threads of their own.
    used = {name: size for name, size in sizes.items() if size > 1 or name != "pipeline"}

    def make() -> DeviceMesh:
        with distributed.real_tensors():
            return init_device_mesh(device, tuple(used.values()), mesh_dim_names=tuple(used))

    return process_groups.mesh_of((device, *sizes.items()), make)


def _sizes(axes: Mapping[str, int | None], processes: int) -> dict[str, int]:
    for name, size in axes.items():
        if size is not None and size != -1 and integer_of(size, low=1) is None:
            raise WorldError(
                f"mesh({name}={size!r}) must be a positive number of processes, or -1 for all that remain."
            )
    free = [name for name, size in axes.items() if size == -1]
    if all(size is None for size in axes.values()):
        free = ["data"]
    sizes = {name: 1 if size in (None, -1) else int(size or 1) for name, size in axes.items()}
    product = math.prod(sizes.values())
    if len(free) == 1 and processes % product == 0:
        sizes[free[0]] = processes // product
        return sizes
    if not free and product == processes:
        return sizes
    text = ", ".join(f"{name}={size}" for name, size in axes.items() if size is not None)
    raise WorldError(_mismatch(text, free, product, processes) + _advice(sizes, processes))


def _mismatch(text: str, free: Sequence[str], product: int, processes: int) -> str:
    if len(free) > 1:
        return f"mesh({text}) has several axes of -1, and only one can be the rest of the world."
    if free:
        return f"mesh({text}) needs a multiple of {product} processes, but the world size is {processes}."
    return f"mesh({text}) needs {product} processes, but the world size is {processes}."


def _advice(sizes: Mapping[str, int], processes: int) -> str:
    others = math.prod(size for name, size in sizes.items() if name != "data")
    if processes % others == 0:
        named = "".join(f", {name}={size}" for name, size in sizes.items() if name != "data" and size > 1)
        return f" Write lm.mesh(data={processes // others}{named}), or start {math.prod(sizes.values())} processes."
    return f" Start {math.prod(sizes.values())} processes: torchrun --nproc-per-node={math.prod(sizes.values())}"
