"""The transform around another one that reduces the gradients of rows: `lm.ddp`, `lm.fsdp` or `lm.deepspeed`."""

from __future__ import annotations

from lumen.core.step import Transform
from lumen.errors import OrderError, WorldError
from lumen.parallel.comm.mesh import Mesh


def row_reducer(transform: Transform, mesh: Mesh, call: str) -> Transform | None:
    """What reduces the gradients of rows around `transform`, which has `mesh` and is written as `call`, if anything.

    Raises `OrderError` where `mesh` divides rows and nothing reduces them, and `WorldError` where it has another mesh.
    """
    around = () if transform.within is None else transform.within.transforms
    reducer = next((t for t in around if t.level == "parallel"), None)
    if reducer is None:
        if mesh.size("data", "shard") > 1:
            choice = "" if "fsdp" in transform.incompatible else ", or lm.fsdp(mesh) in place of lm.ddp(mesh)"
            raise OrderError(
                f"{mesh!r} divides rows over data and shard, and nothing reduces their gradients. Write"
                f" lm.ddp(mesh)({call}(step)){choice}."
            )
        return None
    other = getattr(reducer, "mesh", mesh)
    if other.sizes != mesh.sizes:
        axis = transform.level
        raise WorldError(
            f"{reducer!r} has {other!r} and lm.{transform.name} has {mesh!r}: they must share one mesh. Write"
            f" mesh = lm.mesh(data=..., {axis}=...), lm.{reducer.name}(mesh) and {call}."
        )
    return reducer
