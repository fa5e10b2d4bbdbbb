"""`lm.Runner`: drives a step over data until it is told to end."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from lumen.checkpoint import json_tree
from lumen.core.step import Transform, as_step, compose
from lumen.data._per_rank import per_rank
from lumen.errors import StepError
from lumen.sinks import Sink
from lumen.train.batch_size import TokenCount
from lumen.train.callbacks import Callback, Callbacks
from lumen.train.checkpointer import Checkpointer
from lumen.train.clock import Every, Steps, Until
from lumen.train.device_feed import opened
from lumen.train.distributed import ProcessGroupContext, check_world, join_world
from lumen.train.fit import Fit
from lumen.train.lr_find import LRFinderResult, lr_find
from lumen.train.monitored_metrics import Monitors, names_of
from lumen.train.plateau import check_plateau
from lumen.train.predict import joined
from lumen.train.predict import predict as predict_batches
from lumen.train.result import Result
from lumen.train.settings import RunSettings
from lumen.train.step_batches import without_unroll
from lumen.train.validate import Validate, check_limit, evaluate


class Runner:
    """Runs `step` under `transforms` (outermost first) over data, with validation, checkpoints, logging and progress.

    Args:
        step: the training step, `(state, batch) -> (state, metrics)`.
        transforms: what it runs under.
        checkpoint: when to save, and where; see `lm.Checkpointer`.
        sinks: get the merged numbers each `log_every` steps: metrics as `train/…`, those of validation under its name,
            the learning rate, and the throughput.
        callbacks: watch the run; see `lm.Callback`.
        plateau: the validation metric that `lm.optim.reduce_on_plateau` is told, such as "val/loss". A name that
            validations do not give is a `StepError` at the first one.
        config: what the run was made with, a mapping or a dataclass: logged, and kept in checkpoints.
        log_every: steps between two logging points.
        tokens: counts the tokens of a batch, for `lm.Tokens` and the throughput.
        mfu: log the model FLOPs utilization: True takes the published peak of the GPU, a number is the peak in FLOP/s.
        progress: True (a bar on a terminal or in a notebook, lines elsewhere), "bar", "lines" or False.
        time_fn: gives seconds, for tests.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     def loss_fn(params, batch):
    ...         out, _ = state.apply(params, batch["x"])
    ...         return ((out - batch["y"]) ** 2).mean()
    ...     loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> data = {"x": torch.ones(8, 2), "y": torch.zeros(8, 1)}
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    >>> result = lm.Runner(step, progress=False).fit(state, lm.Loader(data, batch_size=4), until=lm.Epochs(3))
    >>> result.clock.step, result.reason
    (6, 'Epochs(3)')
    """

    def __init__(
        self,
        step: Callable[[Any, Any], tuple[Any, Any]],
        *,
        transforms: Sequence[Transform] = (),
        checkpoint: Checkpointer | None = None,
        sinks: Sequence[Sink] = (),
        callbacks: Sequence[Callback] = (),
        plateau: str | None = None,
        config: Any = None,
        log_every: int = 50,
        tokens: TokenCount | None = None,
        mfu: bool | float = False,
        progress: bool | str = True,
        time_fn: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transforms = tuple(transforms)
        self.step = compose(*transforms)(step) if transforms else as_step(step)
        self.checkpoint = checkpoint
        self.sinks = tuple(sinks)
        self.callbacks = Callbacks(callbacks)
        self.plateau = plateau
        self.log_every = Every(steps=log_every)
        self.tokens = tokens
        self.progress = progress
        self.now = time_fn
        self.mfu = mfu
        self._config = _mapping(config)

    def fit(
        self,
        state: Any,
        data: Iterable[Any],
        *,
        until: Until,
        validate: Validate | Sequence[Validate] | None = None,
        limit: int | None = None,
        resume: str | os.PathLike[str] = "never",
    ) -> Result:
        """Train from `state` on `data` until told to end, and return the `Result`.

        `data` is an `lm.Loader`, or any iterable of batches; it is iterated anew for each epoch, of which `limit`
        bounds the batches. What shuffles by the epoch, however deep inside a DataLoader, is told its number. A one-shot
        iterator is one epoch. Numpy batches become tensors; batches are moved to the state's device.

        `resume="auto"` goes on from the newest whole checkpoint of the run's directory, if there is one; a path goes
        on from that checkpoint; "never" begins anew, in a directory without checkpoints. What follows is bitwise what
        would have followed without the interruption, with an `lm.Loader` at any place; other data says once where
        it cannot promise that.

        SIGTERM and SIGINT end the run after its step, with a checkpoint: `lm.Interrupted` is raised, a `SystemExit`
        with code 75 that has the `result`; at a prompt and in a notebook Ctrl-C returns the result instead. A second
        signal ends it at once.

        Under torchrun each process calls this, with the same data: each batch of an `lm.Loader` or of a DataLoader over
        a map-style set is cut by rank, a Hugging Face stream is split; rows of any other data must be said to be this
        rank's own, by `lm.data.per_rank`. The first one writes checkpoints, sinks and the display, and its time
        counts; numbers are those of all. Under transforms that spread the state, such as `lm.fsdp`, each process writes
        its parts of a checkpoint, and reads what it needs: the directory is to be on a file system that all share. A
        signal to any process ends all after the same step, and so does an error: the others raise `WorldError` with the
        first. Then nothing is saved; the last checkpoint stands.

        Raises `BatchError` where the data is empty, has no batch where a run that goes on needs one, is not known to be
        cut by rank, or has different numbers of batches for the processes, `WorldError` where
        another process failed, hangs or is gone, `CheckpointError` where there is nothing to go on from or no way
        to save. What the step raises comes through as it is, with a note that says at which step and batch.
        """
        if not isinstance(until, Until):
            raise StepError(f"until={until!r} is not a limit; write until=lm.Steps(1000) or lm.Epochs(10).")
        check_limit(limit)
        validations = [validate] if isinstance(validate, Validate) else list(validate or ())
        check_plateau(state, self.plateau, names_of(validations))
        settings = self._settings()
        Monitors(settings, names_of(validations)).check_before()
        state = self.step.init(state)  # where the processes of a parallel transform join
        check_world(self.step.transforms)
        return Fit(settings, state, data, until, validations, limit).run(resume)

    def evaluate(
        self, step: Callable[[Any, Any], Any], state: Any, data: Iterable[Any], *, limit: int | None = None
    ) -> dict[str, float]:
        """The merged metrics of `step(state, batch) -> metrics` over all of `data`, in evaluation mode."""
        check_limit(limit)
        return evaluate(step, state, data, self.step.transforms, limit=limit)

    def predict(
        self, step: Callable[[Any, Any], Any], state: Any, data: Iterable[Any], *, limit: int | None = None
    ) -> Any:
        """What `step(state, batch) -> outputs` gives for all of `data`, in evaluation mode, as one tree on the CPU.

        Tensors are joined along their first dim, lists are appended, in the order of the data; anything else comes as
        a list with an entry for each batch. For more than fits into memory use `lm.predict`, which yields batch by
        batch.

        >>> import lumen as lm, torch
        >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
        >>> def predict_step(state, batch):
        ...     return {"y": state.apply(state.params, batch)[0]}
        >>> data = lm.Loader(torch.ones(5, 2), batch_size=2, shuffle=False)
        >>> lm.Runner(lambda state, batch: (state, {})).predict(predict_step, state, data)["y"].shape
        torch.Size([5, 1])
        """
        check_limit(limit)
        return joined(predict_batches(step, state, data, self.step.transforms, limit=limit))

    def smoke(
        self, state: Any, data: Iterable[Any], *, validate: Validate | Sequence[Validate] | None = None
    ) -> Result:
        """One batch of everything: a training step, each validation, a checkpoint saved and read back.

        Nothing is logged, no callback is called, and the run's own directory is not touched. The state given is left
        as it is.
        """
        validations = [validate] if isinstance(validate, Validate) else list(validate or ())
        brief = [dataclasses.replace(each, limit=1, every=Every(steps=1)) for each in validations]
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = Checkpointer(directory, every=Every(steps=1))
            trial = self._with(checkpoint=checkpoint, plateau=self.plateau)
            trial.fit(state, data, until=Steps(1), validate=brief, limit=1)
            return trial.fit(state, data, until=Steps(1), validate=brief, limit=1, resume="auto")

    def overfit(self, state: Any, data: Iterable[Any], *, batches: int = 1, until: Until | None = None) -> Result:
        """Train on the first few batches again and again: a model that works brings their loss to nearly nothing.

        `until` is 100 steps unless given. Metrics go to the display and the result, not to the sinks, and nothing is
        saved. The state given is left as it is.
        """
        check_limit(batches)
        join_world(self.transforms)
        source = opened(data, state, ProcessGroupContext(state))
        few = list(itertools.islice(source, batches))
        quick = self._with(progress=self.progress, log_every=10)
        return quick.fit(state, per_rank(few), until=until or Steps(100))

    def lr_find(self, state: Any, data: Iterable[Any], **options: Any) -> LRFinderResult:
        """Smith's learning-rate range test with this Runner's step: see `lm.lr_find` for the options.

        The state given is left as it is.
        """
        single, _ = without_unroll(self.step)
        begun = self.step.init(state)
        return lr_find(single, begun, opened(data, state, ProcessGroupContext(state)), **options)

    def description(self) -> dict[str, Any]:
        """What the run is made of, as plain data: its configuration, step and transforms, versions and commit."""
        return self._settings().description

    def _settings(self) -> RunSettings:
        return RunSettings(
            step=self.step,
            checkpoint=self.checkpoint,
            sinks=self.sinks,
            callbacks=self.callbacks,
            plateau=self.plateau,
            config=self._config,
            log_every=self.log_every,
            tokens=self.tokens,
            mfu=self.mfu,
            progress=self.progress,
            time_fn=self.now,
        )

    def _with(self, **changes: Any) -> Runner:
        """A Runner of the same step that leaves no traces."""
        quiet = {"progress": False, "log_every": 10**9, "time_fn": self.now, "tokens": self.tokens}
        return Runner(self.step, **{**quiet, **changes})


def _mapping(config: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    elif hasattr(config, "__dict__") and not isinstance(config, Mapping):
        config = vars(config)
    if config is not None and not isinstance(config, Mapping):
        raise StepError(f"config={config!r} must be a mapping or a dataclass: config={{'lr': 3e-4}}")
    return {str(key): _jsonable(each) for key, each in (config or {}).items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(each) for key, each in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray):  # OmegaConf's lists, too
        return [_jsonable(each) for each in value]
    if isinstance(value, float):
        return json_tree.number(value)
    return str(value)
