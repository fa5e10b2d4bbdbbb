"""`lm.Runner`: drives a step over data until it is told to end.

Between two logging points the loop does nothing but fetch a batch, call the step and count: no number leaves the
device, nothing is synchronised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lumen import tree
from lumen.core.step import Step, StepFn, Transform, as_step, compose
from lumen.errors import BatchError, StepError
from lumen.optim import learning_rate
from lumen.train.callbacks import Callback, Callbacks, View
from lumen.train.clock import NEVER, Clock, Every, Timer, Until
from lumen.train.meter import Meter
from lumen.train.progress import Silent, make_progress
from lumen.train.validate import Validate, evaluate, params_for
from lumen.transforms.unroll import stack, unroll


class Sink(Protocol):
    """Where numbers go: see `lm.sinks`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one point in time."""

    def close(self) -> None:
        """Write out what is held."""


@dataclass(frozen=True)
class Result:
    """How a run ended: its last `state`, the newest of each of its `metrics`, its `clock`, and the `reason`.

    The state still has the slots of the run's transforms (`lm.ema.params(result.state)`), and can be given to
    `Runner.fit` again; `export()` gives the plain one.
    """

    state: Any
    metrics: dict[str, float]
    clock: Clock
    reason: str
    step: Step = field(repr=False)

    def export(self) -> Any:
        """The plain state, without slots and in ordinary places."""
        return self.step.export(self.state)


class Runner:
    """Runs `step` under `transforms` (outermost first) over data, with validation, logging and progress.

    `sinks` get the merged numbers each `log_every` steps: metrics as `train/…`, those of validation under its name, the
    learning rate and the steps per second. `progress` is True (a bar on a terminal or in a notebook, lines elsewhere),
    "bar", "lines" or False. `clock` gives seconds, for tests.

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
        step: StepFn,
        *,
        transforms: Sequence[Transform] = (),
        sinks: Sequence[Sink] = (),
        callbacks: Sequence[Callback] = (),
        log_every: int = 50,
        progress: bool | str = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transforms = tuple(transforms)
        self.step = as_step(compose(*transforms)(step)) if transforms else as_step(step)
        self.sinks = tuple(sinks)
        self.log_every = Every(steps=log_every)
        self.progress = progress
        self._single, self._unrolled = _without_unroll(self.step)
        self._callbacks = Callbacks(tuple(callbacks))
        self._now = clock

    def fit(
        self,
        state: Any,
        data: Iterable[Any],
        *,
        until: Until,
        validate: Validate | Sequence[Validate] | None = None,
    ) -> Result:
        """Train from `state` on `data` until told to end, and return the `Result`.

        `data` is an `lm.Loader`, or any iterable of batches; it is iterated anew for each epoch. A one-shot iterator
        is one epoch. Numpy batches become tensors; batches are moved to the state's device.

        Raises `BatchError` where the data is empty. What the step raises comes through as it is, with a note that says
        at which step and batch.
        """
        if not isinstance(until, Until):
            raise StepError(f"until={until!r} is not a limit; write until=lm.Steps(1000) or lm.Epochs(10).")
        validations = [validate] if isinstance(validate, Validate) else list(validate or ())
        return _Fit(self, self.step.init(state), data, until, validations).run()

    def evaluate(self, step: Callable[[Any, Any], Any], state: Any, data: Iterable[Any]) -> dict[str, float]:
        """The merged metrics of `step(state, batch) -> metrics` over all of `data`, in evaluation mode."""
        return evaluate(step, state, _Feed(data, state).epoch(0), self.step.transforms)


class _Fit:
    """One call of `fit`."""

    def __init__(
        self, runner: Runner, state: Any, data: Iterable[Any], until: Until, validations: list[Validate]
    ) -> None:
        self.runner = runner
        self.state = state
        self.until = until
        self.validations = validations
        self.feed = _Feed(data, state)
        self.clock = Clock(step=_step_of(state))
        self.reason = ""
        self.metrics: dict[str, float] = {}
        self.meter = Meter()
        self.progress = make_progress(runner.progress)
        self._began = runner._now() - self.clock.seconds
        self._log_timer = Timer(runner.log_every, self.clock)
        self._timers = [Timer(validate.every, self.clock) for validate in validations]
        self._last_log = (self.clock.step, self.clock.seconds)
        self._listens = runner._callbacks.listens("on_step")
        # Something looks at every step: a display, a callback, or a limit that is not a number of steps.
        timed = any(validate.every.seconds is not None for validate in validations)
        self._watched = self._listens or timed or not isinstance(self.progress, Silent) or not until.only_steps()
        self._wake = self._next_event()

    def run(self) -> Result:
        callbacks = self.runner._callbacks
        self.progress.start(self._total(), self.clock.step)
        try:
            callbacks.call("on_start", self._view({}))
            self._epochs()
            self._log()
            callbacks.call("on_end", self._view(self.metrics))
        except BaseException as error:
            error.add_note(f"raised in step {self.clock.step + 1} (epoch {self.clock.epoch}, batch {self.clock.batch})")
            callbacks.call("on_exception", self._view(self.metrics), error)
            raise
        finally:
            self.progress.stop()
            for sink in self.runner.sinks:
                sink.close()
        return Result(self.state, self.metrics, self.clock, self.reason, self.runner.step)

    def _epochs(self) -> None:
        while not self._over():
            before = self.clock.step
            self._epoch()
            if self.reason and self.clock.batch != self.feed.length:
                return
            if self.clock.step == before:
                self._no_batch()
                return
            self.clock.epoch += 1
            self.clock.batch = 0
            self.clock.seconds = self.runner._now() - self._began
            self._events()

    def _epoch(self) -> None:
        for run, batch, count in self._calls(self.feed.epoch(self.clock.epoch)):
            self.state, metrics = run(self.state, batch)
            self.meter.add(metrics)
            self.clock.step += count
            self.clock.batch += count
            if self.clock.step < self._wake and not self._watched:
                continue
            if self._listens:
                self.runner._callbacks.call("on_step", self._view(metrics))
            self._tick()
            if self.reason or self._over():
                return

    def _calls(self, batches: Iterator[Any]) -> Iterator[tuple[StepFn, Any, int]]:
        """`(step, batch, how many optimizer steps)`: one by one, or stacked in groups where the step unrolls."""
        single, size = self.runner._single, self.runner._unrolled
        if size == 1:
            for batch in batches:
                yield single, batch, 1
            return
        group: list[Any] = []
        for batch in batches:
            group.append(batch)
            if len(group) < min(size, self._steps_left()):
                continue
            yield from _stacked(group, size, self.runner.step, single)
            group = []
        yield from _stacked(group, size, self.runner.step, single)

    def _tick(self) -> None:
        self.clock.seconds = self.runner._now() - self._began
        self.progress.tick(self.clock)
        self._events(epoch_end=False)
        self._wake = self._next_event()

    def _events(self, epoch_end: bool = True) -> None:
        if self._log_timer.due(self.clock):
            self._log()
        for validate, timer in zip(self.validations, self._timers, strict=True):
            if (epoch_end or validate.every.epochs is None) and timer.due(self.clock):
                self._validate(validate)

    def _validate(self, validate: Validate) -> None:
        self._log()
        feed = _Feed(validate.data, self.state).epoch(0)
        state = params_for(validate, self.state)
        values = evaluate(validate.step, state, feed, self.runner.step.transforms)
        values = {f"{validate.name}/{name}": value for name, value in values.items()}
        self._publish(values)
        self.runner._callbacks.call("on_validate", self._view(self.metrics))
        self._last_log = (self.clock.step, self.runner._now() - self._began)  # throughput is that of training alone

    def _log(self) -> None:
        if not self.meter:
            return
        values = self.meter.read("train/")
        steps, seconds = self.clock.step - self._last_log[0], self.clock.seconds - self._last_log[1]
        if steps and seconds > 0:
            values["steps_per_second"] = steps / seconds
        self._last_log = (self.clock.step, self.clock.seconds)
        lr = learning_rate(getattr(self.state, "opt_state", None))
        if lr is not None and lr.dim() == 0:
            values["lr"] = float(lr)
        self._publish(values)

    def _publish(self, values: dict[str, float]) -> None:
        self.metrics.update(values)
        for sink in self.runner.sinks:
            sink.log(self.clock.step, {"epoch": self.clock.epoch, **values})
        self.progress.show(self.clock, values)

    def _over(self) -> bool:
        if self.until.reached(self.clock):
            self.reason = repr(self.until)
        return bool(self.reason)

    def _stop(self, reason: str) -> None:
        self.reason = reason

    def _no_batch(self) -> None:
        if self.clock.epoch == 0:
            raise BatchError(
                "the data is empty: it gave no batch. Check the dataset's length, and that batch_size with"
                " drop_last=True is not larger than it; a generator that was used before is empty too."
            )
        self.reason = f"the data ended after {self.clock.epoch} epochs"

    def _view(self, metrics: Any) -> View:
        return View(self.clock, self.state, metrics, stop=self._stop, log=self._publish)

    def _next_event(self) -> int:
        """The step before which nothing but steps happens."""
        return min(self._log_timer.next_step, *(timer.next_step for timer in self._timers), self.until.steps() or NEVER)

    def _steps_left(self) -> int:
        """Steps until the next event that must not be passed over."""
        due = [timer.next_step for timer in self._timers] + [self.until.steps() or NEVER]
        return max(1, min(due) - self.clock.step)

    def _total(self) -> int | None:
        ends = [self.until.steps()]
        epochs = self.until.epochs()
        if epochs is not None and self.feed.length is not None:
            ends.append(epochs * self.feed.length)
        return min((n for n in ends if n is not None), default=None)


class _Feed:
    """Batches from whatever the user has, on the state's device."""

    def __init__(self, data: Iterable[Any], state: Any) -> None:
        if not hasattr(data, "__iter__") and not hasattr(data, "epoch"):
            raise BatchError(f"the data must be an lm.Loader or an iterable of batches, not {type(data).__name__}.")
        self._data = data
        tensors = tree.tensors(state)
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self.length = len(data) if isinstance(data, Sized) else None

    def epoch(self, number: int) -> Iterator[Any]:
        """The batches of one epoch."""
        batches = self._data.epoch(number) if hasattr(self._data, "epoch") else iter(self._data)
        first = next(batches, None)
        if first is None:
            return iter(())
        chained = _chain(first, batches)
        return map(self._place, chained) if self._must_place(first) else chained

    def _must_place(self, batch: Any) -> bool:
        leaves = tree.leaves(batch)
        return any(isinstance(x, np.ndarray) or (isinstance(x, Tensor) and x.device != self._device) for x in leaves)

    def _place(self, batch: Any) -> Any:
        def place(leaf: Any) -> Any:
            if isinstance(leaf, Tensor | np.ndarray):
                return torch.as_tensor(leaf).to(self._device, non_blocking=True)
            return leaf

        return tree.map(place, batch)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _stacked(group: list[Any], size: int, step: StepFn, single: StepFn) -> Iterator[tuple[StepFn, Any, int]]:
    """The group in one call where it is complete and its batches are alike, else one by one."""
    if len(group) == size and _alike(group):
        yield step, stack(group), size
        return
    for batch in group:
        yield single, batch, 1


def _alike(group: list[Any]) -> bool:
    shapes = [[leaf.shape for leaf in tree.tensors(batch)] for batch in (group[0], group[-1])]
    return shapes[0] == shapes[1]


def _without_unroll(step: Step) -> tuple[StepFn, int]:
    """The step without its `unroll`, for what does not fill a group, and by how many it unrolls."""
    unrolls = [t for t in step.transforms if isinstance(t, unroll)]
    if not unrolls:
        return step, 1
    others = [t for t in step.transforms if not isinstance(t, unroll)]
    return compose(*others)(step.user), unrolls[0].k


def _step_of(state: Any) -> int:
    step = getattr(state, "step", None)
    return int(step.max()) if isinstance(step, Tensor) else 0
