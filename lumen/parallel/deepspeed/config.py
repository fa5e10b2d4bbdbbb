"""The configuration of a DeepSpeed engine: the user's, and that of the transforms whose work the engine does."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lumen.core.step import Transform
from lumen.errors import HyperparameterError, OrderError
from lumen.transforms._accumulate import accumulate
from lumen.transforms._clip import clip
from lumen.transforms._precision import Policy, precision

Config = dict[str, Any]

_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the configuration's keys

_ONE_BIT = ("onebitadam", "zerooneadam", "onebitlamb")  # of DeepSpeed's earlier versions

# Transforms that can be combined with the engine, by name. Others are refused: those of INSTEAD at composition.
_COMBINABLE = ("deepspeed", "seeded", "remat", "ema")
INSTEAD = {
    "compile": 'it cannot trace the engine, which has its own: {"compile": {"deepcompile": true}}',
    "donate": "the engine updates in place",
    "guard": 'the engine computes the update, and skips overflows with lm.precision("fp16"); else use lm.fsdp()',
    "dp_sgd": "train it in one process",
    "ensemble": "an engine holds one model; train lanes in one process",
    "sweep": "an engine holds one model; train lanes in one process",
    "unroll": "call the step itself",
    "tensor_parallel": "use lm.fsdp() around it",
}


class Setup(NamedTuple):
    """The engine's `config`, and the settings in it that Lumen needs."""

    config: Config
    stage: int
    microbatches: int
    clip: float
    casts: precision | None  # around a model that computes in other dtypes than the params'


def read(config: Mapping[str, Any] | str | os.PathLike[str]) -> Config:
    """The user's configuration, a copy: a mapping, or the path of a JSON file.

    >>> read({"zero_optimization": {"stage": 2}})
    {'zero_optimization': {'stage': 2}}
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if isinstance(config, str | os.PathLike):
        options = json.loads(Path(config).read_text())
        if isinstance(options, dict):
            return options
    raise HyperparameterError(
        f"lm.deepspeed takes DeepSpeed's configuration, a dict or the path of a JSON file, not {config!r:.80}. Write"
        ' lm.deepspeed({"zero_optimization": {"stage": 2}})'
    )


def stage_of(config: Mapping[str, Any]) -> int:
    """ZeRO's stage: 0 shards nothing, 1 the optimizer state, 2 the gradients too, 3 the params as well."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise HyperparameterError(f'"stage": {stage!r} of "zero_optimization" is unknown; ZeRO has 0, 1, 2 and 3.')
    return int(stage)


def setup(user_config: Config, transforms: Sequence[Transform]) -> Setup:
    """The configuration for an engine among these `transforms`.

    Raises `OrderError` for a transform that cannot be combined with an engine, and `HyperparameterError` where one
    contradicts the configuration, or the configuration has settings that are Lumen's own.
    """
    config, stage = copy.deepcopy(user_config), stage_of(user_config)
    _refuse_keys(config)
    casts: precision | None = None
    for transform in transforms:
        if isinstance(transform, accumulate):
            _set(config, "gradient_accumulation_steps", _microbatches(transform), transform)
        elif isinstance(transform, clip):
            if transform.norm is None:
                raise OrderError(f"{transform!r}: DeepSpeed bounds gradients by their norm alone. Write lm.clip(1.0).")
            _set(config, "gradient_clipping", float(transform.norm), transform)
        elif isinstance(transform, precision):
            casts = _precision(config, transform)
        elif transform.name not in _COMBINABLE:
            raise OrderError(
                f"{transform!r} cannot stand beside lm.deepspeed, whose engine computes the gradients and the update:"
                " use lm.fsdp()."
            )
    casts = casts or _casts_of(config)
    _check_combination(transforms, stage, casts)
    if stage == 0 and casts is not None:
        raise HyperparameterError(
            "lm.deepspeed keeps 32-bit params of a 16-bit model from ZeRO's stage 1 on. Write"
            ' {"zero_optimization": {"stage": 1}}.'
        )
    config.setdefault("train_micro_batch_size_per_gpu", 1)  # used in its reports only
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("gradient_clipping", 0.0)  # by default the engine clips to 1.0
    config.setdefault("gradient_accumulation_steps", 1)
    return Setup(config, stage, int(config["gradient_accumulation_steps"]), float(config["gradient_clipping"]), casts)


def _refuse_keys(config: Config) -> None:
    kind = str(config.get("optimizer", {}).get("type", ""))
    if kind.lower() in _ONE_BIT:
        raise HyperparameterError(
            f'"optimizer": {{"type": {kind!r}}}: DeepSpeed has no 1-bit optimizers any more. To send fewer bytes write'
            ' lm.ddp(reduce_dtype="bf16"), or ZeRO++ in the configuration: {"zero_quantized_gradients": true}.'
        )
    for key, instead in (
        ("optimizer", "state.tx is the optimizer: lm.TrainState.create(net, lm.optim.adamw(3e-4))"),
        ("scheduler", "a schedule is part of state.tx: lm.optim.adamw(lm.optim.warmup_cosine(3e-4, ...))"),
        ("train_batch_size", "batches are as large as the data makes them"),
    ):
        if key in config:
            raise HyperparameterError(f'"{key}" in the configuration of lm.deepspeed: {instead}. Leave it out.')
    zero = config.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            raise HyperparameterError(
                f'"{key}": {{"device": "nvme"}}: Lumen has the optimizer state, which stays in memory. Write'
                f' "{key}": {{"device": "cpu"}}.'
            )


def _set(config: Config, key: str, value: Any, transform: Transform) -> None:
    if key in config and config[key] != value:
        raise HyperparameterError(
            f'{transform!r} and "{key}": {config[key]!r} in the configuration of lm.deepspeed differ. Leave one out.'
        )
    config[key] = value


def _microbatches(transform: accumulate) -> int:
    if transform.auto or transform.k is None:
        raise OrderError(
            f"{transform!r}: every rank computes the same number of backward passes. Write lm.accumulate(4)."
        )
    return transform.k


def _precision(config: Config, transform: precision) -> precision | None:
    """Add the transform to the configuration; None where it casts nothing."""
    policy = transform.policy
    wide = policy.param in (None, torch.float32) and policy.output == torch.float32
    if not wide or policy.compute not in (torch.float32, torch.float16, torch.bfloat16):
        raise HyperparameterError(
            f"{transform!r}: an engine keeps float32 params and computes in float32, bfloat16 or float16. Write"
            ' lm.precision("bf16").'
        )
    key = next((key for key, dtype in _NARROW.items() if dtype == policy.compute), None)
    for other in _NARROW:
        if other != key and config.get(other, {}).get("enabled"):
            raise HyperparameterError(f'{transform!r} and "{other}" in the configuration differ. Leave one out.')
    if key is None:
        return None
    options = config.setdefault(key, {})
    _set(options, "enabled", True, transform)
    if key == "fp16" and policy.loss_scale is not None:
        power = torch.tensor(policy.loss_scale).log2()
        if power != power.round():
            raise HyperparameterError(f"{transform!r}: DeepSpeed's loss scale begins with a power of two.")
        _set(options, "initial_scale_power", int(power), transform)
        _set(options, "loss_scale_window", policy.growth_interval, transform)
    # The engine's params have 16 bits themselves, so the whole model is cast whatever the transform says.
    return precision(policy, cast="model", keep=transform.keep)


def _casts_of(config: Config) -> precision | None:
    for key, dtype in _NARROW.items():
        if config.get(key, {}).get("enabled"):
            return precision(Policy(compute=dtype), cast="model")
    return None


def _check_combination(transforms: Sequence[Transform], stage: int, casts: precision | None) -> None:
    for transform in transforms:
        if transform.name == "remat" and stage == 3:
            raise OrderError(
                f"{transform!r}: at ZeRO's stage 3 the engine's own hooks run the model. Write lm.deepspeed with stage"
                " 2, or lm.fsdp(), which recomputes."
            )
        if transform.name == "ema" and (stage == 3 or casts is not None):
            raise OrderError(
                f"{transform!r}: the 32-bit params are the engine's own{', in shards' if stage == 3 else ''}."
                " Use stage 2 in float32, or lm.fsdp()."
            )
