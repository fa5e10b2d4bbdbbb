"""The process groups of this world: one owner, who can let go of all of them.

Gloo's threads live as long as anything refers to their group, whether it was destroyed or not, and one that still lives
when the interpreter ends can abort the process. So only torch's own meshes hold groups, those meshes are made here, and
all else keeps a `GroupRef`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NoReturn, Protocol

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lumen.core._torch_compat import release_default_groups, release_groups
from lumen.errors import WorldError


class Closable(Protocol):
    """What has a thread, or groups of its own, while the world lasts."""

    def close(self) -> None:
        """Let go of them; doing so again does nothing."""


class GroupRef:
    """A process group that is not kept alive: a call gives it, or raises `WorldError` where its world was left."""

    __slots__ = ("_find", "_world", "index", "size")

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._find = weakref.ref(noted(group))
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


_number = 0  # of worlds that this process has been in
_world: weakref.ref[Any] | None = None  # the newest of them
_meshes: dict[Hashable, DeviceMesh] = {}  # and its meshes
_closables: list[weakref.ref[Closable]] = []
_noted: weakref.WeakSet[Any] = weakref.WeakSet()  # groups that somebody outside may have kept


def world_number() -> int:
    """Which of the worlds that this process has joined it is in, from 1; 0 in none."""
    global _number, _world
    world = dist.group.WORLD
    if world is None:
        return 0
    if _world is None or _world() is not world:
        release()
        _number, _world = _number + 1, weakref.ref(world)
    return _number


def mesh_of(key: Hashable, make: Callable[[], DeviceMesh]) -> DeviceMesh:
    """Torch's mesh of this form: one is made for each, as its groups have threads and connections of their own."""
    world_number()
    if key not in _meshes:
        _meshes[key] = make()
    return _meshes[key]


def release() -> None:
    """Have the meshes of a world that was left hold no group any more, whoever holds the meshes."""
    while _meshes:
        release_groups(_meshes.popitem()[1])


def release_all() -> None:
    """The same, and torch's own functions."""
    release()
    release_default_groups()


def noted(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group, which is handed out."""
    _noted.add(group)
    return group


def survivors() -> list[str]:
    """Names of groups, handed out by now, that somebody still refers to: where none should be alive any more."""
    return sorted(group.group_name for group in _noted)


def close_on_leave(thing: Closable) -> None:
    """Close `thing` before this world is left, unless nothing refers to it by then."""
    _closables[:] = [each for each in _closables if each() is not None]
    if not any(each() is thing for each in _closables):
        _closables.append(weakref.ref(thing))


def closables() -> list[Closable]:
    """What is to be closed now, the newest last; it is not asked for again."""
    found = [thing for each in _closables if (thing := each()) is not None]
    _closables.clear()
    return found


def raise_left(what: str) -> NoReturn:
    """Raise `WorldError`."""
    raise WorldError(
        f"{what} belongs to a world of processes that this one has left. Make the mesh, and the steps on it, anew in"
        " the world that they are to run in: mesh = lm.mesh(data=-1)."
    )
