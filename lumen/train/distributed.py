"""`ProcessGroupContext`: what a run does together with its other processes; alone, it does nothing.

Whatever branches the loop is decided by all alike. Most of it is, as all see the same numbers; what one process alone
knows (a signal, the time, whether a checkpoint is among the best) reaches the others between two steps after which all
synchronize, or where all come together anyway.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from lumen.core import distributed
from lumen.core.step import Transform, device_of
from lumen.errors import BatchError, InexactWarning, WorldError
from lumen.parallel.comm.init import check_launcher, launched
from lumen.parallel.comm.rank_monitor import RankMonitor

_runs = itertools.count()  # the same in each process, as all make the same runs


class ProcessGroupContext:
    """The processes of one run, as this one sees them: `is_main` does what is done once."""

    def __init__(self, state: Any) -> None:
        self.rank, self.size = distributed.rank(), distributed.world_size()
        self.is_main = self.rank == 0
        self.device = device_of(state)
        self._monitor: RankMonitor | None = None
        self._reported = False

    def __enter__(self) -> Self:
        """Watch over the others from here on."""
        if self.size > 1:
            store = PrefixStore(f"lumen/{next(_runs)}", dist.distributed_c10d._get_default_store())
            self._monitor = RankMonitor(store, self.rank, self.size)
            self._monitor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self.report_failure(error, "outside of its steps")
        finally:
            if self._monitor is not None:
                self._monitor.close()

    # ---------------------------------------------------------------------------------------- between steps

    def step_begins(self, step: int) -> None:
        """This process is about to make the step after `step`."""
        if self._monitor is not None:
            self._monitor.working = step + 1

    def step_ends(self) -> None:
        """It has made it."""
        if self._monitor is not None:
            self._monitor.working = 0

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
        """Tell the others of `error`; gives what is to be raised: another's error where that is behind this one."""
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
        """What the first rank has, which is plain data."""
        if self.size == 1:
            return value
        objects = [value]
        dist.broadcast_object_list(objects, src=0, device=self.device)
        return objects[0]

    def reduce_clock(self, seconds: float, counts: Sequence[int]) -> tuple[float, list[int]]:
        """The seconds of the first rank, and the sums of what each has counted in its rows, in one exchange.

        Of ranks that are handed the same rows one counts.
        """
        own_counts = counts if self.rank % distributed.tp_degree() == 0 else [0] * len(counts)
        own = [seconds if self.is_main else 0.0, *own_counts]
        sums = torch.tensor(own, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        main_seconds, *totals = sums.tolist()
        return main_seconds, [int(total) for total in totals]

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any_rank_value(self, value: str) -> str:
        """The value of the lowest rank that has one; almost always none has, which costs one number."""
        if self.size == 1:
            return value
        flag = torch.tensor([bool(value)], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag)
        return next(filter(None, self.all_gather_object(value)), "") if int(flag) else ""

    def any(self, value: bool) -> bool:
        """Whether it is so for some process."""
        return bool(self.any_rank_value("yes" if value else ""))

    def assert_same_on_all_ranks(self, length: int | None) -> None:
        """Raise `BatchError` where the processes know that their epochs have different numbers of batches."""
        lengths = self.all_gather_object(length)
        known = {each for each in lengths if each is not None}
        if len(known) > 1:
            raise BatchError(
                f"ranks have different numbers of batches in an epoch: {lengths}. Each must have the same, as every"
                " step is made by all: give lm.Loader the whole data set (it cuts each batch by rank), or limit="
                f"{min(known)}."
            )


def check_world(transforms: Sequence[Transform]) -> None:
    """Raise `WorldError` where torchrun started several processes that would all make the same run, each by itself.

    It can be told only once the transforms have joined the processes.
    """
    if distributed.world_size() > 1:
        if not any(transform.level in ("parallel", "tensor") for transform in transforms) and distributed.rank() == 0:
            warnings.warn(
                f"{distributed.world_size()} processes make this run, and no transform joins what they learn: each"
                " trains on its own rows, and the first one's state is saved. Write lm.Runner(step,"
                " transforms=[lm.ddp()]).",
                InexactWarning,
                stacklevel=3,
            )
        return
    _check_joined()


def join_world(transforms: Sequence[Transform]) -> None:
    """Have parallel transforms join the processes, as `init` does; raise `WorldError` where several stay alone."""
    for transform in transforms:
        if transform.level in ("parallel", "tensor"):
            getattr(transform, "mesh", None)  # made, and with it the world, as it is first asked for
    if distributed.world_size() == 1:
        _check_joined()


def _check_joined() -> None:
    check_launcher()
    if launched() and not distributed.is_distributed() and _asked_for() > 1:
        raise WorldError(
            f"this process is one of {_asked_for()} that were started together, and nothing joins them: each would make"
            " the whole run by itself. Write lm.Runner(step, transforms=[lm.ddp()]), or start one process."
        )


def _asked_for() -> int:
    return int(os.environ["WORLD_SIZE"])
