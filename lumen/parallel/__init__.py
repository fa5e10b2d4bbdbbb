"""The same step on many devices: meshes of processes, and the transforms that spread a step over them."""

from lumen.core.world import rows as rows
from lumen.parallel import plans as plans
from lumen.parallel.agree import check_equal as check_equal
from lumen.parallel.ddp import ddp as ddp
from lumen.parallel.deepspeed import deepspeed as deepspeed
from lumen.parallel.fsdp import fsdp as fsdp
from lumen.parallel.logs import setup_logging as setup_logging
from lumen.parallel.mesh import Mesh as Mesh
from lumen.parallel.mesh import mesh as mesh
from lumen.parallel.plan import measure as measure
from lumen.parallel.plan import plan as plan
from lumen.parallel.plan_report import Plan as Plan
from lumen.parallel.plan_world import fake_world as fake_world
from lumen.parallel.tensor import tensor_parallel as tensor_parallel
from lumen.parallel.tensor_styles import Colwise as Colwise
from lumen.parallel.tensor_styles import Region as Region
from lumen.parallel.tensor_styles import Rowwise as Rowwise
from lumen.parallel.tensor_styles import SequenceParallel as SequenceParallel
from lumen.parallel.tensor_styles import Style as Style
