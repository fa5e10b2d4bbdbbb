"""`ProcessGroupContext`: how the processes of a run act together; in a single process it does nothing.

All processes take the same branches of the loop. For most of them they have the same numbers to decide by. What only
one process knows (a signal, the time, whether a checkpoint is among the best) reaches the others when they synchronize
between two steps, or in a collective that all call anyway.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from lumen.core import _torch_compat, distributed
from lumen.core.step import Transform, device_of
from lumen.errors import BatchError, InexactWarning, WorldError
from lumen.parallel.comm.hang_dump import HangDump
from lumen.parallel.comm.init import launched_size
from lumen.parallel.comm.rank_monitor import RankMonitor
from lumen.parallel.comm.wait_time import WAIT_TIME, StepTime

_runs = itertools.count()  # the same in each process, as all start the same runs
_JOINING = ("parallel", "context", "tensor", "pipeline")  # levels of transforms that join processes


class ProcessGroupContext:
    """The processes of one run, seen from this one; the one with `is_main` does what is done once."""

    def __init__(
        self, state: Any, time_fn: Callable[[], float] = time.monotonic, directory: Path | str | None = None
    ) -> None:
        self.rank, self.size = distributed.rank(), distributed.world_size()
        self.is_main = self.rank == 0
        self.device = device_of(state)
        self._monitor: RankMonitor | None = None
        self._time_fn = time_fn
        self._step_time = StepTime(time_fn)
        self._directory = directory  # of the run
        self._reported = False

    def __enter__(self) -> Self:
        """Monitor the other processes from here on."""
        if self.size > 1:
            store = PrefixStore(f"lumen/{next(_runs)}", _torch_compat.get_default_store())
            directory = self._directory
            hang_dump = HangDump(directory, self.rank, self.size) if isinstance(directory, Path) else None
            self._monitor = RankMonitor(store, self.rank, self.size, hang_dump=hang_dump)
            self._monitor.start()
            WAIT_TIME.time_fn = self._time_fn
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self.report_failure(error, "outside of its steps")
        finally:
            if self._monitor is not None:
                WAIT_TIME.time_fn = time.monotonic
                self._monitor.close()

    # ---------------------------------------------------------------------------------------- between steps

    def step_begins(self, step: int) -> None:
        """This process begins the step after `step`."""
        if self._monitor is not None:
            self._monitor.working = step + 1
            self._step_time.begin()

    def step_ends(self) -> None:
        """This process has finished its step."""
        if self._monitor is not None:
            self._step_time.end()
            self._monitor.working = 0

    @property
    def step_seconds(self) -> float:
        """This process's own time in steps so far, without waiting for others; 0 in a single process."""
        return self._step_time.seconds

    def should_sync(self, step: int) -> bool:
        """Whether all ranks synchronize now, after `step`."""
        return self._monitor is not None and self._monitor.should_sync(step)

    def request_sync(self) -> None:
        """Ask all ranks to synchronize soon."""
        if self._monitor is not None:
            self._monitor.call()

    def end_epoch(self, epoch: int, step: int) -> None:
        """Raise `BatchError` unless the data of all ranks ended after `step`."""
        if self._monitor is not None:
            self._monitor.agree("epoch", epoch, step)

    def barrier(self) -> None:
        """Wait until all ranks are here, however long that takes."""
        if self._monitor is not None:
            self._monitor.agree("wait", 0)

    def report_failure(self, error: BaseException, where: str) -> BaseException:
        """Report `error` to the others; returns what to raise: the error of another rank if that one caused it."""
        if self._monitor is None or self._reported:
            return error
        self._reported = True
        cause = self._monitor.explain(error)
        if cause is not None:
            return cause
        self._monitor.fail(f"{where}: {type(error).__name__}: {error}")
        return error

    # ---------------------------------------------------------------------------------------- collectives

    def broadcast_object(self, value: Any) -> Any:
        """The value of rank 0, which is plain data."""
        if self.size == 1:
            return value
        objects = [value]
        dist.broadcast_object_list(objects, src=0, device=self.device)
        return objects[0]

    def reduce_clock(
        self, seconds: float, counts: Sequence[int], own: Sequence[float] = ()
    ) -> tuple[float, list[int], list[tuple[float, ...]]]:
        """The seconds of rank 0, the sums of the ranks' counts, and the `own` numbers by rank, in one all-reduce.

        Of ranks with the same rows only one counts.
        """
        own_counts = counts if self.rank % distributed.row_replicas() == 0 else [0] * len(counts)
        numbers = torch.zeros(self.size, len(own), dtype=torch.float64)
        numbers[self.rank] = torch.tensor(own, dtype=torch.float64)
        head = [seconds if self.is_main else 0.0, *own_counts]
        sums = torch.tensor([*head, *numbers.flatten().tolist()], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        main_seconds, *totals = sums[: len(head)].tolist()
        by_rank = sums[len(head) :].view(self.size, len(own)).tolist()
        return main_seconds, [int(total) for total in totals], [tuple(row) for row in by_rank]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any_rank_value(self, value: str) -> str:
        """The value of the lowest rank that has one. Usually none has, which costs an all-reduce of one number."""
        if self.size == 1:
            return value
        flag = torch.tensor([bool(value)], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag)
        return next(filter(None, self.all_gather_object(value)), "") if int(flag) else ""

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        return bool(self.any_rank_value("yes" if value else ""))

    def assert_same_on_all_ranks(self, length: int | None) -> None:
        """Raise `BatchError` if ranks know that their epochs have different numbers of batches."""
        lengths = self.all_gather_object(length)
        distinct = {length for length in lengths if length is not None}
        if len(distinct) > 1:
            raise BatchError(
                f"ranks have different numbers of batches in an epoch: {lengths}. Each must have the same number, as"
                " all ranks run every step: give lm.Loader the full data set (it shards each batch by rank), or limit="
                f"{min(distinct)}."
            )


def check_world(transforms: Sequence[Transform]) -> None:
    """Raise `WorldError` if a launcher started several processes that would each do the same run alone.

    Call it after the transforms have joined the processes.
    """
    if distributed.world_size() > 1:
        if not any(transform.level in _JOINING for transform in transforms) and distributed.rank() == 0:
            warnings.warn(
                f"{distributed.world_size()} processes do this run, and no transform reduces their gradients: each"
                " trains on its own rows, and only the state of rank 0 is saved. Write lm.Runner(step,"
                " transforms=[lm.ddp()]).",
                InexactWarning,
                stacklevel=3,
            )
        return
    _check_joined()


def join_world(transforms: Sequence[Transform]) -> None:
    """Join the processes by the parallel transforms, as `init` does; raise `WorldError` if several stay unjoined."""
    for transform in transforms:
        if transform.level in _JOINING:
            getattr(transform, "mesh", None)  # the first access creates the mesh, and joins the processes
    if distributed.world_size() == 1:
        _check_joined()


def _check_joined() -> None:
    if not distributed.is_distributed() and (size := launched_size()) > 1:
        raise WorldError(
            f"this process is one of {size} that were started together, and nothing joins them: each would do the same"
            " run alone. Write lm.Runner(step, transforms=[lm.ddp()]), or start one process."
        )
