"""`StepBatches`: the batches of a run, one by one or stacked, each with the step function to call on it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lumen import tree
from lumen.core.flops import flops_of
from lumen.core.step import Step, StepFn, compose
from lumen.errors import BatchError
from lumen.train.clock import Clock, Until
from lumen.train.device_feed import DeviceIterator
from lumen.train.run_log import RunLogger
from lumen.train.schedule import Schedule
from lumen.transforms._unroll import stack, unroll


class StepBatches:
    """Fetches batches from the position of the clock on; `limit` bounds the batches of an epoch.

    With `mfu`, the FLOPs of a step are counted on the first one.
    """

    def __init__(
        self,
        feed: DeviceIterator,
        step: Step,
        clock: Clock,
        schedule: Schedule,
        logger: RunLogger,
        *,
        limit: int | None,
        mfu: bool,
    ) -> None:
        self._feed = feed
        self._step = step
        self._single, self._unroll = without_unroll(step)
        self._clock = clock
        self._schedule = schedule
        self._logger = logger
        self._limit = limit
        self._mfu = mfu
        self._resumed_at: int | None = None  # the step of the checkpoint

    def epoch(self, state: Any) -> Iterator[tuple[StepFn, Any, int]]:
        """`(step, batch, number of optimizer steps)` for the remaining epoch, which begins with `state`."""
        if self._unroll == 1:
            return zip(itertools.repeat(self._single), self._batches(state), itertools.repeat(1))
        return self._unrolled(self._groups(state))

    def epoch_length(self) -> int | None:
        """The number of batches in an epoch, or None if that is unknown."""
        return min((n for n in (self._feed.length, self._limit) if n is not None), default=None)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data."""
        return self._feed.state_dict(self._clock.epoch, self._clock.batch)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position that `state_dict` returned, to which the clock is set already."""
        self._feed.load_state_dict(state)
        self._resumed_at = self._clock.step

    # ---------------------------------------------------------------------------------------- fetching

    def _batches(self, state: Any) -> Iterator[Any]:
        batches = self._feed.epoch(self._clock.epoch, self._clock.batch)
        if self._must_count_flops():
            batches = self._count_flops(state, batches)
        if self._limit is None:
            return batches
        return itertools.islice(batches, max(0, self._limit - self._clock.batch))

    def _must_count_flops(self) -> bool:
        return self._mfu and self._logger.throughput.flops_per_step is None

    def _count_flops(self, state: Any, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, after counting the FLOPs of a step on the first one."""
        for batch in batches:
            self._logger.throughput.flops_per_step = flops_of(self._step, state, batch)
            return itertools.chain([batch], batches)
        return iter(())

    def _unrolled(self, groups: Iterator[tuple[Any, int]]) -> Iterator[tuple[StepFn, Any, int]]:
        for batch, count in groups:
            yield self._step if count > 1 else self._single, batch, count

    def _groups(self, state: Any) -> Iterator[tuple[Any, int]]:
        """Stacked batches with their number; single ones if an event or the epoch's end is nearer than the unroll."""

        def group_size() -> int:
            return self._unroll if self._schedule.steps_left() >= self._unroll else 1

        groups = None
        if not self._must_count_flops():  # they are counted on a single batch
            stop = sys.maxsize if self._limit is None else self._limit
            groups = self._feed.stacked(self._clock.epoch, self._clock.batch, stop, group_size)
        return _stacked(self._batches(state), group_size) if groups is None else groups

    # ---------------------------------------------------------------------------------------- the end of data

    def no_batch(self, until: Until) -> str:
        """Why the run ends, after its data gave no batch; raises `BatchError` if that must not end it."""
        clock = self._clock
        if clock.epoch == 0:
            raise BatchError(
                "the data is empty: it gave no batch. Check the dataset's length, and that batch_size with"
                " drop_last=True is not larger than it; a generator that was used before is empty too."
            )
        if self._resumed_at == clock.step:
            raise BatchError(
                f"the run resumed at step {clock.step}, in epoch {clock.epoch}, and its data gave no batch, although it"
                f" is to train until {until!r}: nothing would be trained. A generator, or an iterator that was used"
                " before, has one epoch: give data that can be iterated again, or a limit that is reached already."
            )
        return f"the data ended after {clock.epoch} epochs"

    def check_resumed(self, first: int) -> None:
        """Raise `BatchError` if an epoch was to continue from the batch `first`, and the data gave none."""
        length, ended = self._feed.length, self._clock.batch == first
        limited = self._limit is not None and first >= self._limit
        if first and ended and not limited and length is not None and first != length:
            raise BatchError(
                f"the run resumes at batch {first} of epoch {self._clock.epoch}, and its data gave none, while an epoch"
                f" has {length}: it is not the data of the checkpoint, or its saved state is that of a finished epoch."
            )


def without_unroll(step: Step) -> tuple[StepFn, int]:
    """The step without its `unroll`, for batches that do not fill a group, and the size of a group."""
    unrolls = [t for t in step.transforms if isinstance(t, unroll)]
    if not unrolls:
        return step, 1
    transforms = [t for t in step.transforms if not isinstance(t, unroll)]
    return compose(*transforms)(step.user), unrolls[0].k


def _stacked(batches: Iterator[Any], group_size: Callable[[], int]) -> Iterator[tuple[Any, int]]:
    """Groups of batches: stacked if a group is complete and its batches have the same shapes, else one by one."""
    for first in batches:
        group = [first, *itertools.islice(batches, (count := group_size()) - 1)]
        if len(group) == count > 1 and _have_same_shapes(group[0], group[-1]):
            yield stack(group), count
            continue
        for batch in group:
            yield batch, 1


def _have_same_shapes(a: Any, b: Any) -> bool:
    return [leaf.shape for leaf in tree.tensors(a)] == [leaf.shape for leaf in tree.tensors(b)]
