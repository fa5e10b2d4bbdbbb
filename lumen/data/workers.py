"""Processes that fetch batches in order: torch's DataLoader, with the order and the seeds of `Loader`."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from lumen.core import _torch_compat
from lumen.data.forks import quiet_forks
from lumen.data.messages import Message

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from lumen.data.fetch import Fetch, Rows

# Seconds after a broken connection: how long to look for the dead worker on a busy machine, and between two looks.
_PATIENCE, _PAUSE = 5.0, 0.02


class Workers:
    """`count` processes for each live iterator; one set of idle processes waits for the next iterator.

    They start by the start method (`torch.multiprocessing.set_start_method`), each with its copy of the data set.
    """

    def __init__(self, fetch: Fetch, count: int, prefetch: int) -> None:
        self._fetch, self._count, self._prefetch = fetch, count, prefetch
        self._idle: DataLoader[Any] | None = None

    def map(self, keys: Iterable[Rows]) -> Iterator[Any]:
        """The batch of each key, in order. Raises RuntimeError with the process id of a worker that died."""
        loader = self._start() if self._idle is None else self._idle
        self._idle = None
        loader.sampler.keys = keys  # type: ignore[attr-defined]
        try:
            with quiet_forks():
                batches = iter(loader)
            yield from batches
        except GeneratorExit:  # the consumer stopped early; the next pass drops the prefetched batches
            self._keep(loader)
            raise
        except BaseException as error:
            release(error)
            # A worker that dies while it sends a batch may first show as a broken connection.
            try:
                dead = _dead(loader, patience=_PATIENCE if isinstance(error, ConnectionError | EOFError) else 0)
            finally:  # torch's signal handler may raise its own error for the same death at any point
                _shut_down(loader)
            if dead:
                raise RuntimeError(
                    f"Loader: worker process {dead}. If it ran out of memory, use fewer workers, or smaller prefetch;"
                    " with workers=0 the data set fails in this process, where it can be debugged."
                ) from error
            raise
        self._keep(loader)

    def _keep(self, loader: DataLoader[Any]) -> None:
        if _dead(loader):
            _shut_down(loader)
        else:
            self._idle = loader

    def _start(self) -> DataLoader[Any]:
        loader = self._make_loader()
        # Python may collect a reference cycle in an order in which torch's clean-up finds its queues closed, and then
        # waits five seconds for each worker. The finalizer keeps the loader alive until its workers have ended.
        weakref.finalize(self, _shut_down_in_parent, os.getpid(), loader)
        return loader

    def _make_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._fetch,  # type: ignore[arg-type]
            batch_size=None,  # each key reads one batch
            sampler=_Keys(),
            collate_fn=Message,
            worker_init_fn=_end_with_parent,
            num_workers=self._count,
            prefetch_factor=self._prefetch,
            persistent_workers=True,
            generator=torch.Generator(),  # otherwise each pass would draw from the global one
        )


def _end_with_parent(_worker: int) -> None:
    """Let this worker end when its parent is killed.

    It would wait for ever until somebody reads its last batches, from a pipe whose reading end it has itself.
    """
    Finalize(None, _exit_if_orphaned, (os.getppid(),), exitpriority=100)  # before the queue's, which waits


def _exit_if_orphaned(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(1)


def release(error: BaseException) -> None:
    """Clear torch's frame that raised a worker's error, since the frame refers to the error.

    That cycle would keep everything in the traceback alive until the cyclic garbage collector runs.
    """
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "reraise" and frame.f_globals.get("__name__") == "torch._utils":
            frame.clear()
        trace = trace.tb_next


def _dead(loader: DataLoader[Any], patience: float = 0) -> str:
    """The first worker that has exited within `patience` seconds, with its exit code; "" if all are running."""
    until = time.monotonic() + patience
    while True:
        for worker in _workers(loader):
            worker.join(_PAUSE if patience else 0)
            if worker.exitcode is not None:
                return f"{worker.pid} died with exit code {worker.exitcode}"
        if time.monotonic() >= until:
            return ""


def _shut_down(loader: DataLoader[Any]) -> None:
    """Stop the processes now: a traceback may keep them alive, and torch raises again for a dead one."""
    if _torch_compat.worker_iterator(loader) is not None and loader.num_workers:
        _torch_compat.shut_down_workers(loader)


def is_live(loader: DataLoader[Any]) -> bool:
    """Whether the worker processes of its last epoch wait for the next one."""
    return loader.persistent_workers and _torch_compat.worker_iterator(loader) is not None


def restart_workers(loader: DataLoader[Any]) -> None:
    """Make the next epoch of `loader` start new worker processes."""
    _shut_down(loader)
    _torch_compat.drop_worker_iterator(loader)


def _shut_down_in_parent(process: int, loader: DataLoader[Any]) -> None:
    """`_shut_down`, unless this is a forked process, which has copies of all objects."""
    if os.getpid() == process:
        _shut_down(loader)


def _workers(loader: DataLoader[Any]) -> list[BaseProcess]:
    return _torch_compat.worker_processes(loader)


class _Keys:
    keys: Iterable[Rows] = ()

    def __iter__(self) -> Iterator[Rows]:
        return iter(self.keys)
