"""The process groups of this world, with one owner that can release all of them.

Gloo's threads stay alive as long as anything refers to their group, whether it was destroyed or not. A thread that is
alive when the interpreter ends can abort the process. So only torch's own meshes refer to groups, those meshes are made
here, and all other code keeps a `GroupRef`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NoReturn, Protocol

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lumen.core._torch_compat import release_groups
from lumen.errors import WorldError
from lumen.parallel.comm.default_groups import release_default_groups


class Closable(Protocol):
    """An object with a thread or process groups of its own, which must be closed before the world is left."""

    def close(self) -> None:
        """Release them; a second call does nothing."""


class GroupRef:
    """A weak reference to a process group: calling it returns the group, or raises `WorldError` after its world."""

    __slots__ = ("_find", "_world", "index", "size")

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._find = weakref.ref(hand_out(group))
        world_number()
        self._world = _world  # of the group: the newest
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)

    def __call__(self) -> dist.ProcessGroup:
        """The group."""
        group, world = self._find(), dist.group.WORLD
        if group is None or world is None or self._world is None or self._world() is not world:
            raise_left("this step")
        return group


_number = 0  # of worlds that this process has joined so far
_world: weakref.ref[Any] | None = None  # the newest of them
_meshes: dict[Hashable, DeviceMesh] = {}  # and its meshes
_closables: list[weakref.ref[Closable]] = []
_handed_out: weakref.WeakSet[Any] = weakref.WeakSet()  # groups that code outside may still refer to


def world_number() -> int:
    """The number of this process's current world, counted from 1; 0 outside of any."""
    global _number, _world
    world = dist.group.WORLD
    if world is None:
        return 0
    if _world is None or _world() is not world:
        release()
        _number, _world = _number + 1, weakref.ref(world)
    return _number


def mesh_of(key: Hashable, make: Callable[[], DeviceMesh]) -> DeviceMesh:
    """Torch's mesh for this key, made once, as its groups have threads and connections of their own."""
    world_number()
    if key not in _meshes:
        _meshes[key] = make()
    return _meshes[key]


def release() -> None:
    """Remove the groups from the meshes of a world that was left, which may still be referenced."""
    while _meshes:
        release_groups(_meshes.popitem()[1])


def release_all() -> None:
    """The same, and remove them from torch's own functions."""
    release()
    release_default_groups()


def hand_out(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group, recorded for `survivors`."""
    _handed_out.add(group)
    return group


def survivors() -> list[str]:
    """Names of the groups that are still referenced, asked when none should be."""
    return sorted(group.group_name for group in _handed_out)


def close_on_leave(closable: Closable) -> None:
    """Close `closable` before this world is left, unless it has been deleted by then."""
    _closables[:] = [reference for reference in _closables if reference() is not None]
    if not any(reference() is closable for reference in _closables):
        _closables.append(weakref.ref(closable))


def closables() -> list[Closable]:
    """The objects to close now, the newest last; the list is empty afterwards."""
    alive = [closable for reference in _closables if (closable := reference()) is not None]
    _closables.clear()
    return alive


def raise_left(what: str) -> NoReturn:
    """Raise `WorldError`."""
    raise WorldError(
        f"{what} belongs to a world that this process has left. Make the mesh, and the steps on it, again in the"
        " current world: mesh = lm.mesh(data=-1)."
    )
