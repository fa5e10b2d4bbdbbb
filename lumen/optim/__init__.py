"""Optimizers and schedules: `chain` them, `partition` them by name, `vmap` them, or run them fused."""

from lumen.optim.adafactor import adafactor as adafactor
from lumen.optim.adam import adam as adam
from lumen.optim.adam import adamw as adamw
from lumen.optim.adam import scale_by_adam as scale_by_adam
from lumen.optim.adaptive import adagrad as adagrad
from lumen.optim.adaptive import rmsprop as rmsprop
from lumen.optim.base import Transform as Transform
from lumen.optim.base import apply_updates as apply_updates
from lumen.optim.clip import (
    clip_by_global_norm as clip_by_global_norm,
)
from lumen.optim.clip import (
    clip_by_value as clip_by_value,
)
from lumen.optim.clip import (
    global_norm as global_norm,
)
from lumen.optim.combine import chain as chain
from lumen.optim.combine import freeze as freeze
from lumen.optim.combine import partition as partition
from lumen.optim.finite import apply_if_finite as apply_if_finite
from lumen.optim.hyper import Schedule as Schedule
from lumen.optim.hyper import learning_rate as learning_rate
from lumen.optim.interop import from_torch as from_torch
from lumen.optim.lamb import lamb as lamb
from lumen.optim.lamb import scale_by_trust_ratio as scale_by_trust_ratio
from lumen.optim.lion import lion as lion
from lumen.optim.lookahead import lookahead as lookahead
from lumen.optim.lookahead import lookahead_slow_params as lookahead_slow_params
from lumen.optim.muon import muon as muon
from lumen.optim.nadam import nadam as nadam
from lumen.optim.nadam import radam as radam
from lumen.optim.names import matrices as matrices
from lumen.optim.plateau import plateau_step as plateau_step
from lumen.optim.plateau import reduce_on_plateau as reduce_on_plateau
from lumen.optim.scaling import (
    add_decayed_weights as add_decayed_weights,
)
from lumen.optim.scaling import (
    identity as identity,
)
from lumen.optim.scaling import (
    scale as scale,
)
from lumen.optim.scaling import (
    scale_by_learning_rate as scale_by_learning_rate,
)
from lumen.optim.scaling import (
    scale_by_schedule as scale_by_schedule,
)
from lumen.optim.scaling import (
    trace as trace,
)
from lumen.optim.schedule_free import (
    schedule_free as schedule_free,
)
from lumen.optim.schedule_free import (
    schedule_free_eval_params as schedule_free_eval_params,
)
from lumen.optim.schedules import (
    constant as constant,
)
from lumen.optim.schedules import (
    cosine as cosine,
)
from lumen.optim.schedules import (
    exponential as exponential,
)
from lumen.optim.schedules import (
    join as join,
)
from lumen.optim.schedules import (
    linear as linear,
)
from lumen.optim.schedules import (
    one_cycle as one_cycle,
)
from lumen.optim.schedules import (
    piecewise as piecewise,
)
from lumen.optim.schedules import (
    polynomial as polynomial,
)
from lumen.optim.schedules import (
    step_decay as step_decay,
)
from lumen.optim.schedules import (
    warmup_cosine as warmup_cosine,
)
from lumen.optim.sgd import sgd as sgd
