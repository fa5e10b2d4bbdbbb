"""The same step on many devices: meshes of processes, and the transforms that spread a step over them."""

from lumen.core.distributed import rows
from lumen.parallel.comm.consistency import check_equal
from lumen.parallel.comm.logging import setup_logging
from lumen.parallel.comm.mesh import Mesh, mesh
from lumen.parallel.tensor import plans
from lumen.parallel.tensor.styles import Colwise, Region, ReplicatedParams, Rowwise, SequenceParallel, Style

__all__ = [
    "Colwise",
    "Mesh",
    "Region",
    "ReplicatedParams",
    "Rowwise",
    "SequenceParallel",
    "Style",
    "check_equal",
    "mesh",
    "plans",
    "rows",
    "setup_logging",
]


def __dir__() -> list[str]:
    return sorted(__all__)
