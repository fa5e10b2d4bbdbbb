"""The transform around another one that reduces the gradients of rows: `lm.ddp`, `lm.fsdp` or `lm.deepspeed`."""

from __future__ import annotations

from collections.abc import Sequence

from lumen.core.step import Transform
from lumen.errors import OrderError, WorldError
from lumen.parallel.comm.mesh import Mesh


def check_context(transform: Transform, mesh: Mesh, inside: Sequence[Transform] | None = None) -> None:
    """Raise `OrderError` where `mesh` has ranks along `context`, and none of the transforms `inside` uses them.

    They would compute the same rows, and what is summed over ranks, such as a buffer, would count each of them twice.
    By default `inside` is the step that is being prepared, if there is one.
    """
    if inside is None:
        if transform.within is None:
            return
        inside = transform.within.transforms
    size = mesh.size("context")
    if size > 1 and not any(t.level == "context" for t in inside):
        raise OrderError(
            f"{transform!r} has {size} processes along context, which shard sequences under lm.context_parallel, and"
            f" without it would all count the same rows. Write lm.{transform.name}(mesh)(lm.context_parallel(mesh)"
            "(step)), or a mesh without context."
        )


def row_reducer(transform: Transform, mesh: Mesh, call: str) -> Transform | None:
    """What reduces the gradients of rows around `transform`, which has `mesh` and is written as `call`, if anything.

    Raises `OrderError` where `mesh` divides rows and nothing reduces them, and `WorldError` where it has another mesh.
    """
    around = () if transform.within is None else transform.within.transforms
    reducer = next((t for t in around if t.level == "parallel"), None)
    if reducer is None:
        if mesh.size("data", "shard") > 1:
            raise OrderError(
                f"{mesh!r} divides rows over data and shard, and nothing reduces their gradients. Write"
                f" lm.ddp(mesh)({call}(step)), or lm.fsdp(mesh) in place of lm.ddp(mesh)."
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
