"""What of torch has no public way: each function says for which versions of torch it holds."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh


def release_groups(mesh: DeviceMesh) -> None:
    """Have a mesh hold its process groups no longer; its sizes and names stay.

    torch 2.11 to 2.13: `_pg_registry` of the mesh that others were cut from holds the groups of all of them, for
    `torch.compile` to look them up. Elsewhere a mesh keeps their names.
    """
    getattr(mesh, "_pg_registry", {}).clear()
