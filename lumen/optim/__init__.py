"""Optimizers and schedules, to `chain`, `partition` by name, run under `vmap`, or run fused."""

from lumen.optim._adafactor import adafactor
from lumen.optim._adam import adam, adamw, scale_by_adam
from lumen.optim._adaptive import adagrad, rmsprop
from lumen.optim._apply_if_finite import apply_if_finite
from lumen.optim._base import GradientTransformation, apply_updates
from lumen.optim._clip import clip_by_global_norm, clip_by_value, global_norm
from lumen.optim._combine import chain, freeze, partition
from lumen.optim._from_torch import from_torch
from lumen.optim._hyperparams import Schedule, learning_rate
from lumen.optim._lamb import lamb, scale_by_trust_ratio
from lumen.optim._lion import lion
from lumen.optim._lookahead import lookahead, lookahead_slow_params
from lumen.optim._muon import muon
from lumen.optim._nadam import nadam, radam
from lumen.optim._param_names import matrices
from lumen.optim._plateau import plateau_step, reduce_on_plateau
from lumen.optim._scaling import add_decayed_weights, identity, scale, scale_by_learning_rate, scale_by_schedule, trace
from lumen.optim._schedule_free import schedule_free, schedule_free_eval_params
from lumen.optim._schedules import (
    constant,
    cosine,
    exponential,
    join,
    linear,
    one_cycle,
    piecewise,
    polynomial,
    step_decay,
    warmup_cosine,
)
from lumen.optim._sgd import sgd
from lumen.optim._with_learning_rate import with_learning_rate

__all__ = [
    "GradientTransformation",
    "Schedule",
    "adafactor",
    "adagrad",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "constant",
    "cosine",
    "exponential",
    "freeze",
    "from_torch",
    "global_norm",
    "identity",
    "join",
    "lamb",
    "learning_rate",
    "linear",
    "lion",
    "lookahead",
    "lookahead_slow_params",
    "matrices",
    "muon",
    "nadam",
    "one_cycle",
    "partition",
    "piecewise",
    "plateau_step",
    "polynomial",
    "radam",
    "reduce_on_plateau",
    "rmsprop",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "scale_by_trust_ratio",
    "schedule_free",
    "schedule_free_eval_params",
    "sgd",
    "step_decay",
    "trace",
    "warmup_cosine",
    "with_learning_rate",
]


def __dir__() -> list[str]:
    return sorted(__all__)
