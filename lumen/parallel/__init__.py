"""The same step on many devices: meshes of processes, and the transforms that spread a step over them."""

from lumen.parallel.agree import check_equal as check_equal
from lumen.parallel.ddp import ddp as ddp
from lumen.parallel.fsdp import fsdp as fsdp
from lumen.parallel.logs import setup_logging as setup_logging
from lumen.parallel.mesh import Mesh as Mesh
from lumen.parallel.mesh import mesh as mesh
