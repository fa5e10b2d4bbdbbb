"""`Validate`: evaluates the model on other data during a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lumen import tree
from lumen.core.annotations import integer_of
from lumen.core.arguments import checked, checked_first
from lumen.core.step import StepFn, Transform, compose
from lumen.errors import BatchError, StepError
from lumen.train.clock import Every
from lumen.train.device_feed import open_batches
from lumen.train.distributed import ProcessGroupContext, join_world
from lumen.train.metric_buffer import MetricAccumulator
from lumen.train.metric_merge import MetricMerger
from lumen.transforms._ema import ema

EvalStep = Callable[[Any, Any], Any]

# A step cannot read the state without these transforms: they decide its sharding, dtype and number of lanes.
_NEEDED = ("ensemble", "parallel", "tensor", "pipeline", "precision")


@checked
@dataclass
class Validate:
    """Run `step(state, batch) -> metrics` over all of `data` every so often, and merge its metrics.

    The state is in evaluation mode, without gradients. Metrics merge by type, so an uneven last batch counts by its
    rows. `use="ema"` evaluates the averaged params of `lm.ema`. `limit` bounds the batches. Names are prefixed with
    `name` and a slash; `data` may be a dict of several data sets, whose names follow: `val/clean/loss`.

    `last=True` also runs it at the end of `fit`, if the last step is not one of `every`. What is logged then depends on
    where runs end: a run that is extended has one row more than one that was as long from the start, and
    `reduce_on_plateau` and `EarlyStop` have counted it.

    >>> import lumen as lm
    >>> lm.Validate(lambda state, batch: {}, [], every=lm.Every(steps=100)).name
    'val'
    """

    step: EvalStep
    data: Iterable[Any] | Mapping[str, Iterable[Any]]
    every: Every = field(default_factory=lambda: Every(epochs=1))
    name: str = "val"
    use: str = "params"
    limit: int | None = None
    last: bool = False

    def __post_init__(self) -> None:
        if self.use not in ("params", "ema"):
            raise StepError(f"Validate(use={self.use!r}) is unknown; give 'params' or 'ema'.")
        check_limit(self.limit)
        if isinstance(self.data, Mapping) and not self.data:
            raise BatchError("Validate got an empty dict of data; give it one data set, or several by name.")

    def loaders(self) -> list[tuple[str, Iterable[Any]]]:
        """Each data set with the prefix of its metrics."""
        if isinstance(self.data, Mapping):
            return [(f"{self.name}/{name}", data) for name, data in self.data.items()]
        return [(self.name, self.data)]


@checked_first
def evaluate(
    step: EvalStep,
    state: Any,
    data: Iterable[Any],
    transforms: tuple[Transform, ...] = (),
    *,
    limit: int | None = None,
) -> dict[str, float]:
    """The merged metrics of `step(state, batch) -> metrics` over all batches of `data`, or the first `limit`.

    With several processes the data is sharded by rank as that of training is. Each rank evaluates its rows, which may
    be none, and gets the numbers of all. A batch without rows is skipped, unless the step runs under a transform that
    gathers params for it. Raises `BatchError` without any batch, `StepError` if the step returns no dict.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    >>> def largest(state, batch):
    ...     return {"largest": lm.Max.of(batch), "mean": lm.Mean.of(batch)}
    >>> lm.evaluate(largest, state, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    {'largest': 6.0, 'mean': 3.0}
    """
    join_world(transforms)
    merger = MetricMerger(ProcessGroupContext(state))
    batches = open_batches(data, state, merger.group)
    numbers = evaluate_until(step, state, batches, transforms, merger, limit=limit, stop=lambda: False)
    assert numbers is not None
    return numbers


def evaluate_until(
    step: EvalStep,
    state: Any,
    data: Iterable[Any],
    transforms: tuple[Transform, ...],
    merger: MetricMerger,
    *,
    limit: int | None,
    stop: Callable[[], bool],
    key: str = "",
) -> dict[str, float] | None:
    """`evaluate`, or None if `stop` became true; `key` identifies the data set among those of a run."""
    # A rank has no rows of a small batch.
    skips_empty = merger.group.size > 1 and not any(t.shards for t in transforms)
    batches = (batch for batch in itertools.islice(data, limit) if not (skips_empty and _is_empty(batch)))
    accumulator = accumulate_metrics(step, state, batches, transforms, stop)
    if accumulator is None:
        return None
    has_batches = bool(accumulator)
    numbers = accumulator.read("", merger, key)
    if not numbers and not merger.group.any(has_batches):
        raise BatchError("the data to evaluate on is empty: it gave no batch.")
    return numbers


def accumulate_metrics(
    step: EvalStep,
    state: Any,
    batches: Iterable[Any],
    transforms: tuple[Transform, ...],
    stop: Callable[[], bool] = lambda: False,
) -> MetricAccumulator | None:
    """The metrics of `step` over the batches, on the device and in evaluation mode; None if `stop` became true."""
    run = _as_step(step, transforms)
    accumulator = MetricAccumulator()
    with torch.no_grad():
        state = evaluated(state)
        for batch in batches:
            if stop():
                return None
            accumulator.add(run(state, batch)[1])
    return accumulator


def evaluated(state: Any) -> Any:
    """The state in evaluation mode, if it has one."""
    return state.eval() if hasattr(state, "eval") else state


def needed(transforms: tuple[Transform, ...]) -> tuple[Transform, ...]:
    """The transforms without which a step cannot read the state."""
    return tuple(t for t in transforms if t.level in _NEEDED)


def check_limit(limit: int | None) -> None:
    """Raise `BatchError` unless `limit` is None or a number of batches."""
    if limit is not None and integer_of(limit, low=1) is None:
        raise BatchError(f"limit={limit!r} must be a number of batches, at least 1, or None for all.")


def params_for(validate: Validate, state: Any) -> Any:
    """The state to evaluate: `state`, or with its averaged params."""
    return state.replace(params=ema.params(state)) if validate.use == "ema" else state


def _is_empty(batch: Any) -> bool:
    first = next(iter(tree.tensors(batch)), None)
    return first is not None and first.dim() > 0 and not len(first)


def _as_step(step: EvalStep, transforms: tuple[Transform, ...]) -> StepFn:
    def adapted(state: Any, batch: Any) -> tuple[Any, Any]:
        try:
            metrics = step(state, batch)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                error.add_note(
                    "an evaluation runs without gradients. For a derivative in an input write torch.func.grad(...), or"
                    " with torch.enable_grad(): ... around torch.autograd.grad"
                )
            raise
        if isinstance(metrics, tuple) or not hasattr(metrics, "keys"):
            raise StepError(
                f"an evaluation step returns a dict of metrics, but {getattr(step, '__name__', step)!r} returned"
                f" {type(metrics).__name__}. Write: return {{'loss': lm.Mean.of(losses)}}"
            )
        return state, metrics

    adapted.__name__ = getattr(step, "__name__", type(step).__name__)  # for messages
    return compose(*needed(transforms))(adapted)
