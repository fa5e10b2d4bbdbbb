"""Lumen: train PyTorch models as pure functions.

Write `step(state, batch) -> (state, metrics)`; wrap it in transforms; call it, or let a `Runner` drive it.
"""

from lumen import optim as optim
from lumen import random as random
from lumen import sinks as sinks
from lumen import tree as tree
from lumen.core.collectives import axis_index as axis_index
from lumen.core.collectives import pmax as pmax
from lumen.core.collectives import pmean as pmean
from lumen.core.collectives import psum as psum
from lumen.core.dataclass import state as state
from lumen.core.dataclass import static as static
from lumen.core.gradient import value_and_grad as value_and_grad
from lumen.core.inspect import check_purity as check_purity
from lumen.core.inspect import inspect as inspect
from lumen.core.module import Apply as Apply
from lumen.core.module import Pure as Pure
from lumen.core.module import pure as pure
from lumen.core.primitives import Aux as Aux
from lumen.core.primitives import apply_updates as apply_updates
from lumen.core.state import TrainState as TrainState
from lumen.core.step import Step as Step
from lumen.core.step import Transform as Transform
from lumen.core.step import compose as compose
from lumen.core.values import Last as Last
from lumen.core.values import Max as Max
from lumen.core.values import Mean as Mean
from lumen.core.values import Min as Min
from lumen.core.values import Sum as Sum
from lumen.core.values import compute_metrics as compute_metrics
from lumen.core.values import merge_metrics as merge_metrics
from lumen.data import Loader as Loader
from lumen.errors import DonatedError as DonatedError
from lumen.errors import GraphBreakWarning as GraphBreakWarning
from lumen.errors import InexactWarning as InexactWarning
from lumen.errors import LumenError as LumenError
from lumen.errors import NonFiniteError as NonFiniteError
from lumen.train.callbacks import Callback as Callback
from lumen.train.clock import Epochs as Epochs
from lumen.train.clock import Every as Every
from lumen.train.clock import Seconds as Seconds
from lumen.train.clock import Steps as Steps
from lumen.train.runner import Result as Result
from lumen.train.runner import Runner as Runner
from lumen.train.validate import Validate as Validate
from lumen.train.validate import evaluate as evaluate
from lumen.transforms.accumulate import accumulate as accumulate
from lumen.transforms.clip import clip as clip
from lumen.transforms.compile import compile as compile  # noqa: A004
from lumen.transforms.donate import donate as donate
from lumen.transforms.ema import ema as ema
from lumen.transforms.ensemble import ensemble as ensemble
from lumen.transforms.ensemble import sweep as sweep
from lumen.transforms.guard import guard as guard
from lumen.transforms.precision import Policy as Policy
from lumen.transforms.precision import precision as precision
from lumen.transforms.private import private as private
from lumen.transforms.remat import remat as remat
from lumen.transforms.seeded import seeded as seeded
from lumen.transforms.unroll import stack as stack
from lumen.transforms.unroll import unroll as unroll
