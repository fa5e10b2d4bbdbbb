"""`lm.successive_halving`: searches the lanes of a step, and drops the worst of them at each rung."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from lumen.core import distributed
from lumen.core.arguments import checked_first
from lumen.core.step import StepFn
from lumen.data import Loader
from lumen.errors import BatchError, HyperparameterError, OrderError, WorldError
from lumen.optim._hyperparams import check_count
from lumen.parallel.comm.init import launched_size
from lumen.train.arguments import check_state
from lumen.train.batch_stream import BatchStream
from lumen.train.device_feed import open_batches
from lumen.train.distributed import ProcessGroupContext
from lumen.train.halving_checkpoints import HalvingCheckpoints
from lumen.train.halving_metric import MonitoredMetric, check_monitor
from lumen.train.halving_result import HalvingResult
from lumen.train.halving_rungs import make_rungs
from lumen.train.halving_search import HalvingSearch
from lumen.train.lane_steps import LaneSteps
from lumen.train.progress import make_progress
from lumen.train.validate import Validate

# Levels of transforms that cannot be around or in the lanes of a search, by the reason.
_REFUSED = {
    **dict.fromkeys(("parallel", "context", "tensor", "pipeline"), "lanes cannot be reduced over processes"),
    "unroll": "a rung ends after any number of steps",
}


@checked_first
def successive_halving(
    step: StepFn,
    state: Any,
    data: Iterable[Any],
    *,
    monitor: str,
    min_steps: int,
    max_steps: int,
    mode: Literal["min", "max"] = "min",
    eta: int = 3,
    lanes: int | None = None,
    validate: Validate | None = None,
    directory: str | os.PathLike[str] | None = None,
    resume: Literal["never", "auto"] = "never",
    progress: bool | str = True,
) -> HalvingResult:
    """Search the lanes of `step` for the best one, by successive halving: train all briefly, and the best for longer.

    `step` has an `lm.sweep` or `lm.ensemble` among its transforms, each lane of which is a trial. After `min_steps`
    steps (a rung) the trials are compared by `monitor`, and the best 1/`eta` of them go on to the next rung, after
    `eta` times as many steps; the last rung is at `max_steps`. The memory of the others is freed: the state then has
    fewer lanes, and a compiled step is compiled again. This is the synchronous rule of Jamieson and Talwalkar,
    "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (2016, arXiv:1502.07943), with the rungs of
    Hyperband (arXiv:1603.06560): rung i has ⌊n / eta^i⌋ of the n trials.

    Law: each trial is trained as it would be alone by `result.step`, on the same batches, up to the order of floating
    sums; so `lanes` changes nothing. As under `lm.ensemble`, dropout masks differ. A resumed search is bitwise the
    uninterrupted one.

    Args:
        step: the training step, with its transforms.
        state: what `step.init` takes: a plain state, a list of one for each lane, or a function from 0 … n-1 to one. It
            does not change.
        data: the batches, the same for all trials: an `lm.Loader` or a list of batches; anything iterable, if all
            trials run at once and the search is not saved.
        monitor: the metric that trials are compared by: `val/loss` is what the evaluation step of `validate` returns as
            `loss`, `train/loss` what the step returns, merged over all steps since the last rung. NaN is the worst
            value. Of equal trials the first in the order of the lanes is better.
        min_steps: how many steps every trial is trained.
        max_steps: how many steps the best trials are trained. Steps count from the start of the search.
        mode: whether smaller ("min") or larger ("max") is better.
        eta: one in `eta` trials goes on, from 2. With 2, halves are dropped.
        lanes: how many trials to train at once; all by default. The others wait, on the host.
        validate: what to evaluate at each rung. Leave out its `every` and `last`.
        directory: where to save the search, after each group of lanes, so that it can resume.
        resume: "auto" continues the search that was saved in `directory`, if there is one.
        progress: True (a bar on a terminal or in a notebook, lines elsewhere), "bar", "lines" or False.

    Raises:
        StepError: the step has no lanes, or does not return the metric.
        HyperparameterError: a number outside its range.
        OrderError: `step` has a transform that joins processes, `lm.unroll`, or lanes with a batch each.
        WorldError: several processes were started.
        BatchError: the data cannot be read again from an earlier batch, and has to be; or it is empty.
        NonFiniteError: the metric is NaN in all trials.
        CheckpointError: `directory` has another search.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     def loss_fn(params, batch):
    ...         out, _ = state.apply(params, batch)
    ...         return (out - 1).square().mean()
    ...     loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(1.0))
    >>> runs = lm.sweep(lr=[1e-4, 1e-3, 1e-2, 1e-1])(step)
    >>> result = lm.successive_halving(
    ...     runs, state, [torch.ones(4, 2)], monitor="train/loss", min_steps=5, max_steps=20, eta=2, progress=False
    ... )
    >>> result.best.values, [trial.steps for trial in result.trials]
    ({'lr': 0.1}, [5, 5, 10, 20])
    """
    eta, min_steps = check_count("eta", eta, low=2), check_count("min_steps", min_steps, low=1)
    max_steps = check_count("max_steps", max_steps, low=min_steps)
    if lanes is not None:
        lanes = check_count("lanes", lanes, low=1)
    if mode not in ("min", "max"):
        raise HyperparameterError(f"mode={mode!r} is unknown; give 'min' or 'max'.")
    if resume not in ("never", "auto"):
        raise HyperparameterError(f'resume={resume!r} is unknown; give "never" or "auto".')
    check_state(state)
    steps = LaneSteps(step)
    _check_transforms(steps)
    _check_alone()
    check_monitor(monitor, validate)
    _check_data(data, lanes is not None and lanes < steps.lanes.n, directory is not None)
    rungs = make_rungs(steps.lanes.n, eta, min_steps, max_steps)
    first = steps.start(state, 0)
    settings = {"lanes": repr(steps.lanes), "rungs": [rung.step for rung in rungs], "eta": eta}
    checkpoints = HalvingCheckpoints(directory, resume, {**settings, "monitor": monitor, "mode": mode})
    metric = MonitoredMetric(monitor, validate, first)
    stream = BatchStream(open_batches(data, first, ProcessGroupContext(first)))
    at_once, display = lanes or steps.lanes.n, make_progress(progress)
    with checkpoints.open():
        return HalvingSearch(steps, state, rungs, mode, at_once, metric, stream, checkpoints, display).run()


def _check_transforms(steps: LaneSteps) -> None:
    for transform in steps.transforms:
        if transform.level in _REFUSED:
            raise OrderError(
                f"lm.successive_halving does not take lm.{transform.name}: {_REFUSED[transform.level]}. Leave it out."
            )
    if steps.lanes.batch_dim is not None:
        raise OrderError(
            f"lm.successive_halving gives all trials the same batches, and {steps.lanes!r} takes one for each lane."
            " Leave out batch_dim."
        )


def _check_alone() -> None:
    size = max(distributed.world_size(), launched_size())
    if size > 1:
        raise WorldError(
            f"lm.successive_halving runs in one process, and this is one of {size} that were started together: each"
            " would do the same search. Start it without torchrun, or give each process trials of its own."
        )


def _check_data(data: Any, repeats: bool, saves: bool) -> None:
    if (repeats or saves) and not isinstance(data, Loader | Sequence):
        why = "trials that run one after another" if repeats else "a resumed search"
        raise BatchError(
            f"{why} must get the batches that others had before, and a {type(data).__name__} may not give them again."
            f" Give an lm.Loader or a list of batches, or leave out {'lanes' if repeats else 'directory'}."
        )
