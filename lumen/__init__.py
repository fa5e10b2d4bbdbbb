"""Lumen: train PyTorch models as pure functions.

Write `step(state, batch) -> (state, metrics)`; wrap it in transforms; call it, or let a `Runner` drive it.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from lumen import checkpoint, data, extend, losses, metrics, optim, parallel, random, sinks, tree
from lumen.core.collectives import all_gather, axis_index, pmax, pmean, pmin, psum
from lumen.core.distributed import rank, world_size
from lumen.core.flops import flops_of, peak_flops
from lumen.core.grad_cache import grad_cache
from lumen.core.gradient import value_and_grad
from lumen.core.inspect import check_purity, inspect
from lumen.core.metrics import Last, Max, Mean, Metric, Min, PerEpoch, Sum, compute_metrics, merge_metrics
from lumen.core.module import Apply, Pure, pure
from lumen.core.primitives import Aux
from lumen.core.pytree_dataclass import dataclass, row_field, static
from lumen.core.state import TrainState, apply_gradients
from lumen.core.step import Step, Transform, compose
from lumen.data import Loader
from lumen.errors import DonatedError, GraphBreakWarning, InexactWarning, LumenError, NonFiniteError, SpikeError
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.context.context_parallel import context_parallel
from lumen.parallel.ddp.ddp import ddp
from lumen.parallel.fsdp.fsdp import fsdp
from lumen.parallel.local.local import local
from lumen.parallel.tensor.tensor_parallel import tensor_parallel
from lumen.train.callbacks import Callback, CallbackContext
from lumen.train.checkpointer import Checkpointer
from lumen.train.clock import Epochs, Every, Seconds, Steps, Tokens
from lumen.train.early_stop import EarlyStop
from lumen.train.halving_result import HalvingResult, Trial
from lumen.train.lr_find import LRFinderResult, lr_find
from lumen.train.memory_snapshot import MemorySnapshot
from lumen.train.predict import predict
from lumen.train.profile import Profile
from lumen.train.replay import replay
from lumen.train.result import Result
from lumen.train.rewind import Rewind
from lumen.train.runner import Runner
from lumen.train.signals import Interrupted
from lumen.train.successive_halving import successive_halving
from lumen.train.summary import Summary, summary
from lumen.train.validate import Validate, evaluate
from lumen.transforms._accumulate import accumulate
from lumen.transforms._chunked_logits import chunked_logits
from lumen.transforms._clip import clip
from lumen.transforms._compile import compile  # noqa: A004
from lumen.transforms._donate import donate
from lumen.transforms._dp_sgd import dp_sgd
from lumen.transforms._ema import ema
from lumen.transforms._ensemble import ensemble, sweep
from lumen.transforms._guard import guard
from lumen.transforms._precision import Policy, precision
from lumen.transforms._quantized_matmul import quantized_matmul
from lumen.transforms._remat import remat
from lumen.transforms._sam import sam
from lumen.transforms._seeded import seeded
from lumen.transforms._unroll import stack, unroll

if TYPE_CHECKING:
    from lumen import bridges, planner
    from lumen.bridges.quantize import quantize
    from lumen.parallel.deepspeed.deepspeed import deepspeed
    from lumen.parallel.pipeline.pipeline import pipeline
    from lumen.planner.plan import plan

    __version__: str

__all__ = [
    "Apply",
    "Aux",
    "Callback",
    "CallbackContext",
    "Checkpointer",
    "DonatedError",
    "EarlyStop",
    "Epochs",
    "Every",
    "GraphBreakWarning",
    "HalvingResult",
    "InexactWarning",
    "Interrupted",
    "LRFinderResult",
    "Last",
    "Loader",
    "LumenError",
    "Max",
    "Mean",
    "MemorySnapshot",
    "Metric",
    "Min",
    "NonFiniteError",
    "PerEpoch",
    "Policy",
    "Profile",
    "Pure",
    "Result",
    "Rewind",
    "Runner",
    "Seconds",
    "SpikeError",
    "Step",
    "Steps",
    "Sum",
    "Summary",
    "Tokens",
    "TrainState",
    "Transform",
    "Trial",
    "Validate",
    "accumulate",
    "all_gather",
    "apply_gradients",
    "axis_index",
    "bridges",
    "check_purity",
    "checkpoint",
    "chunked_logits",
    "clip",
    "compile",
    "compose",
    "compute_metrics",
    "context_parallel",
    "data",
    "dataclass",
    "ddp",
    "deepspeed",
    "donate",
    "dp_sgd",
    "ema",
    "ensemble",
    "evaluate",
    "extend",
    "flops_of",
    "fsdp",
    "grad_cache",
    "guard",
    "inspect",
    "local",
    "losses",
    "lr_find",
    "merge_metrics",
    "mesh",
    "metrics",
    "optim",
    "parallel",
    "peak_flops",
    "pipeline",
    "plan",
    "planner",
    "pmax",
    "pmean",
    "pmin",
    "precision",
    "predict",
    "psum",
    "pure",
    "quantize",
    "quantized_matmul",
    "random",
    "rank",
    "remat",
    "replay",
    "row_field",
    "sam",
    "seeded",
    "sinks",
    "stack",
    "static",
    "successive_halving",
    "summary",
    "sweep",
    "tensor_parallel",
    "tree",
    "unroll",
    "value_and_grad",
    "world_size",
]


# Most runs use none of these, so their modules are imported when a name is first used.
_LAZY_MODULES = {
    "bridges": "lumen.bridges",
    "deepspeed": "lumen.parallel.deepspeed.deepspeed",
    "pipeline": "lumen.parallel.pipeline.pipeline",
    "plan": "lumen.planner.plan",
    "planner": "lumen.planner",
    "quantize": "lumen.bridges.quantize",
}

if not TYPE_CHECKING:  # a type checker would take every name for one that `__getattr__` knows

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.metadata.version("lumen-torch")
        if name not in _LAZY_MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(_LAZY_MODULES[name])
        value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
