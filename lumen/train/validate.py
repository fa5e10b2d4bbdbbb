"""`Validate`: measure the model on held-out data now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from lumen.core.step import StepFn, Transform, compose
from lumen.errors import BatchError, StepError
from lumen.train.clock import Every
from lumen.train.meter import Meter
from lumen.transforms.ema import ema

EvalStep = Callable[[Any, Any], Any]

# Transforms without which a step cannot even read the state: where params live, in which dtype, in how many lanes.
_NEEDED = ("ensemble", "parallel", "precision")


@dataclass
class Validate:
    """Run `step(state, batch) -> metrics` over all of `data` every so often, and merge its metrics.

    The state comes in evaluation mode, without gradients. Metrics merge by type, so uneven last batches count by their
    rows. `use="ema"` evaluates the averaged params that `lm.ema` keeps. Names are prefixed with `name` and a slash.

    >>> import lumen as lm
    >>> lm.Validate(lambda state, batch: {}, [], every=lm.Every(steps=100)).name
    'val'
    """

    step: EvalStep
    data: Iterable[Any]
    every: Every = field(default_factory=lambda: Every(epochs=1))
    name: str = "val"
    use: str = "params"

    def __post_init__(self) -> None:
        if self.use not in ("params", "ema"):
            raise StepError(f"Validate(use={self.use!r}) is unknown; give 'params' or 'ema'.")


def evaluate(
    step: EvalStep, state: Any, data: Iterable[Any], transforms: tuple[Transform, ...] = ()
) -> dict[str, float]:
    """The merged metrics of `step(state, batch) -> metrics` over all batches of `data`.

    Raises `BatchError` where there is no batch, `StepError` where the step returns no dict.
    """
    run = _as_step(step, transforms)
    if hasattr(state, "eval"):
        state = state.eval()
    meter = Meter()
    with torch.no_grad():
        for batch in data:
            _, metrics = run(state, batch)
            meter.add(metrics)
    if not meter:
        raise BatchError("the data to evaluate on is empty: it gave no batch.")
    return meter.read()


def params_for(validate: Validate, state: Any) -> Any:
    """The state to evaluate: as it is, or with its averaged params."""
    return state.replace(params=ema.params(state)) if validate.use == "ema" else state


def _as_step(step: EvalStep, transforms: tuple[Transform, ...]) -> StepFn:
    def adapted(state: Any, batch: Any) -> tuple[Any, Any]:
        metrics = step(state, batch)
        if isinstance(metrics, tuple) or not hasattr(metrics, "keys"):
            raise StepError(
                f"an evaluation step returns a dict of metrics, but {getattr(step, '__name__', step)!r} returned"
                f" {type(metrics).__name__}. Write: return {{'loss': lm.Mean.of(losses)}}"
            )
        return state, metrics

    return compose(*(t for t in transforms if t.level in _NEEDED))(adapted)
