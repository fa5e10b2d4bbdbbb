"""The same step on many devices: meshes of processes, and the transforms that spread a step over them."""

from lumen.parallel.mesh import Mesh as Mesh
from lumen.parallel.mesh import mesh as mesh
