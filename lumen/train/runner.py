"""`lm.Runner`: runs a step over data until a limit, a callback or a signal ends it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from lumen.checkpoint import json_tree
from lumen.core.arguments import checked, checked_first, named_arguments
from lumen.core.step import Transform, as_step, compose
from lumen.data._per_rank import per_rank
from lumen.errors import StepError
from lumen.sinks import Sink
from lumen.train.arguments import check_fit, check_runner
from lumen.train.batch_size import TokenCount
from lumen.train.callbacks import Callback, Callbacks
from lumen.train.checkpointer import Checkpointer
from lumen.train.clock import Every, Steps, Until
from lumen.train.device_feed import open_batches
from lumen.train.distributed import ProcessGroupContext, check_world, join_world
from lumen.train.fit import Fit
from lumen.train.lr_find import LRFinderResult, lr_find
from lumen.train.monitored_metrics import Monitors, names_of
from lumen.train.plateau import plateau_monitors
from lumen.train.predict import join_outputs
from lumen.train.predict import predict as predict_batches
from lumen.train.result import Result
from lumen.train.rewind import Rewind, checked_rewind
from lumen.train.settings import RunSettings
from lumen.train.step_batches import without_unroll
from lumen.train.validate import Validate, check_limit, evaluate


@checked
class Runner:
    """Runs `step` under `transforms` (outermost first) over data, with validation, checkpoints, logging and progress.

    Args:
        step: the training step, `(state, batch) -> (state, metrics)`.
        transforms: the transforms around the step, outermost first.
        checkpoint: where and when to save; see `lm.Checkpointer`.
        rewind: when to go back to a checkpoint, past data that made `lm.guard` skip updates; see `lm.Rewind`.
        sinks: where the merged numbers go at each logging point: metrics as `train/…`, those of a validation under
            its name, the learning rate, and the throughput.
        callbacks: observe the run; see `lm.Callback`.
        config: the configuration of the run, a mapping or a dataclass; it is logged, and saved in checkpoints.
        log_every: when to log: a number of steps, or an `lm.Every`, such as `lm.Every(epochs=1)`.
        tokens: counts the tokens of a batch, for `lm.Tokens` and the throughput.
        mfu: log the model FLOPs utilization: True takes the published peak of the GPU, a number is the peak in FLOP/s.
        progress: True (a bar on a terminal or in a notebook, lines elsewhere), "bar", "lines" or False.
        time_fn: returns the time in seconds; tests replace it.

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
        rewind: Rewind | None = None,
        sinks: Sequence[Sink] = (),
        callbacks: Sequence[Callback] = (),
        config: Any = None,
        log_every: int | Every = 50,
        tokens: TokenCount | None = None,
        mfu: bool | float = False,
        progress: bool | str = True,
        time_fn: Callable[[], float] = time.monotonic,
    ) -> None:
        check_runner(transforms, sinks, callbacks, checkpoint)
        self.transforms = tuple(transforms)
        self.step = compose(*transforms)(step) if transforms else as_step(step)
        self.checkpoint = checkpoint
        self.rewind = checked_rewind(rewind, self.step, checkpoint)
        self.sinks = tuple(sinks)
        self.callbacks = Callbacks(callbacks)
        self.log_every = log_every if isinstance(log_every, Every) else Every(steps=log_every)
        self.tokens = tokens
        self.progress = progress
        self._time_fn = time_fn
        self.mfu = mfu
        self._config = _mapping(config)

    @named_arguments
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
        """Train from `state` on `data` until a limit, a callback or a signal ends the run; returns the `Result`.

        `data` is an `lm.Loader`, or any iterable of batches. It is iterated again for each epoch, and `limit` bounds
        the batches of an epoch. Samplers and data sets with a `set_epoch`, however deep inside a DataLoader, get the
        number of the epoch. A one-shot iterator is one epoch. Numpy batches become tensors, the numbers of a `range`
        0-d int64 tensors, and batches are moved to the state's device.

        `resume="auto"` resumes from the newest undamaged checkpoint of the run's directory, if there is one. A path
        resumes from that checkpoint, and "never" starts a new run, in a directory without checkpoints. With an
        `lm.Loader` a resumed run is bitwise the uninterrupted one, from any position. Other data warns once if it
        cannot promise that.

        SIGTERM and SIGINT end the run after its step, with a checkpoint: `lm.Interrupted` is raised, a `SystemExit`
        with code 75 that has the `result`. At a prompt and in a notebook Ctrl-C returns the result instead. A second
        signal ends the process at once.

        Under torchrun each process calls this with the same data. Each batch of an `lm.Loader`, or of a DataLoader over
        a map-style data set, is sharded by rank, and a Hugging Face stream is split; any other data needs
        `lm.data.per_rank`, which says that its rows are this rank's own. Rank 0 writes checkpoints, sinks and the
        display, and its time counts; logged numbers are those of all ranks. Under transforms that shard the state, such
        as `lm.fsdp`, each process writes and reads its shards of a checkpoint, so all need to share the file system of
        the directory. A signal to any process ends all of them after the same step. An error does so too: the other
        processes raise `WorldError` with the first error, nothing is saved, and the last checkpoint remains.

        Raises `BatchError` for data that is empty, that has no batch left for a resumed run, whose sharding is unknown,
        or that has different numbers of batches on the ranks; `WorldError` if another process failed, hangs or died;
        and `CheckpointError` if there is nothing to resume from, or saving fails. An error of the step is raised as it
        is, with a note of the step and the batch.
        """
        if not isinstance(until, Until):
            raise StepError(f"until={until!r} is not a limit; write until=lm.Steps(1000) or lm.Epochs(10).")
        check_limit(limit)
        validations = check_fit(state, validate, resume, Runner.fit, until=until, limit=limit)
        settings = self._settings(plateau_monitors(state, names_of(validations)))
        Monitors(settings, names_of(validations)).check_before()
        state = self.step.init(state)  # a parallel transform joins the processes here
        check_world(self.step.transforms)
        return Fit(settings, state, data, until, validations, limit).run(resume)

    @named_arguments
    def evaluate(
        self, step: Callable[[Any, Any], Any], state: Any, data: Iterable[Any], *, limit: int | None = None
    ) -> dict[str, float]:
        """The merged metrics of `step(state, batch) -> metrics` over all of `data`, in evaluation mode."""
        check_limit(limit)
        return evaluate(step, state, data, self.step.transforms, limit=limit)

    @named_arguments
    def predict(
        self, step: Callable[[Any, Any], Any], state: Any, data: Iterable[Any], *, limit: int | None = None
    ) -> Any:
        """The outputs of `step(state, batch) -> outputs` for all of `data`, in evaluation mode, as one tree on the CPU.

        Tensors are joined along their first dim and lists are appended, in the order of the data. Anything else becomes
        a list with an entry for each batch. If the outputs do not fit into memory, use `lm.predict`, which yields batch
        by batch.

        >>> import lumen as lm, torch
        >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
        >>> def predict_step(state, batch):
        ...     return {"y": state.apply(state.params, batch)[0]}
        >>> data = lm.Loader(torch.ones(5, 2), batch_size=2, shuffle=False)
        >>> lm.Runner(lambda state, batch: (state, {})).predict(predict_step, state, data)["y"].shape
        torch.Size([5, 1])
        """
        check_limit(limit)
        return join_outputs(predict_batches(step, state, data, self.step.transforms, limit=limit))

    @checked_first
    def smoke(
        self, state: Any, data: Iterable[Any], *, validate: Validate | Sequence[Validate] | None = None
    ) -> Result:
        """Run one batch of everything: a training step, each validation, a checkpoint saved and read back.

        Nothing is logged, no callback is called, and the run's own directory is not touched. `state` does not change.
        """
        validations = check_fit(state, validate, "never")
        brief = [dataclasses.replace(validate, limit=1, every=Every(steps=1)) for validate in validations]
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = Checkpointer(directory, every=Every(steps=1))
            trial = _quiet(self, checkpoint=checkpoint)
            trial.fit(state, data, until=Steps(1), validate=brief, limit=1)
            return trial.fit(state, data, until=Steps(1), validate=brief, limit=1, resume="auto")

    @checked_first
    def overfit(self, state: Any, data: Iterable[Any], *, batches: int = 1, until: Until | None = None) -> Result:
        """Train on the first few batches again and again: a working model brings their loss to almost zero.

        `until` is 100 steps by default. Metrics go to the display and the result, not to the sinks, and nothing is
        saved. `state` does not change.
        """
        check_limit(batches)
        join_world(self.transforms)
        source = open_batches(data, state, ProcessGroupContext(state))
        first_batches = list(itertools.islice(source, batches))
        runner = _quiet(self, progress=self.progress, log_every=10)
        return runner.fit(state, per_rank(first_batches), until=until or Steps(100))

    @checked_first
    def lr_find(self, state: Any, data: Iterable[Any], **options: Any) -> LRFinderResult:
        """Smith's learning-rate range test with this Runner's step: see `lm.lr_find` for the options.

        `state` does not change.
        """
        single, initial = without_unroll(self.step)[0], self.step.init(state)
        return lr_find(single, initial, open_batches(data, state, ProcessGroupContext(state)), **options)

    def description(self) -> dict[str, Any]:
        """A description of the run as plain data: its configuration, step and transforms, versions and commit."""
        return self._settings().description

    def _settings(self, monitors: Sequence[str] = ()) -> RunSettings:
        return RunSettings(
            step=self.step,
            checkpoint=self.checkpoint,
            sinks=self.sinks,
            callbacks=self.callbacks,
            config=self._config,
            log_every=self.log_every,
            tokens=self.tokens,
            mfu=self.mfu,
            progress=self.progress,
            time_fn=self._time_fn,
            plateau_monitors=monitors,
            rewind=self.rewind,
        )


def _quiet(runner: Runner, **changes: Any) -> Runner:
    """A Runner of the same step that logs and saves nothing."""
    quiet = {"progress": False, "log_every": 10**9, "time_fn": runner._time_fn, "tokens": runner.tokens}
    return Runner(runner.step, **{**quiet, **changes})


def _mapping(config: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    elif hasattr(config, "__dict__") and not isinstance(config, Mapping):
        config = vars(config)
    if config is not None and not isinstance(config, Mapping):
        raise StepError(f"config={config!r} must be a mapping or a dataclass: config={{'lr': 3e-4}}")
    return {str(key): _jsonable(value) for key, value in (config or {}).items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray):  # also OmegaConf's lists
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return json_tree.number(value)
    return str(value)
