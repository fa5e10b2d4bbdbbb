"""Counts the bytes that a process passes to collectives, and emulates a network of limited bandwidth.

Import it before any module that keeps a reference to functions of `torch.distributed`. Bytes are those that a process
sends in a ring. On an emulated network a collective ends no earlier than these bytes would have been sent, one
collective after the other. Waiting takes no processor time, as with a network card, so overlap with computation shows.

What torch's DDP sends does not pass through Python: `hook` routes it through this module.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

KINDS = {
    "all_reduce": "all-reduce",
    "broadcast": "broadcast",
    "all_to_all_single": "all-to-all",
    "all_gather_single": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
}


class Wire:
    """What has been sent, by collective: how often, and bytes. `bandwidth` in bytes per second, None for Gloo's own."""

    def __init__(self) -> None:
        self.bandwidth: float | None = None
        self.counts = False
        self.sent: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        self._free = 0.0

    def carries(self, kind: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the collective `kind` of torch, counted and slowed down."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        whole = max(t.nbytes for t in tensors)
        size = dist.get_world_size(kwargs.get("group"))
        moved = int(whole * (size - 1) / size) * (2 if kind == "all-reduce" else 1)
        self.sent[kind][0] += 1
        self.sent[kind][1] += moved
        if self.bandwidth is None:
            return call(*args, **kwargs)
        later = kwargs.pop("async_op", False)
        self._free = max(self._free, time.monotonic()) + moved / self.bandwidth
        work = Slow(call(*args, async_op=True, **kwargs), self._free, tensors[:1])
        return work if later else (work.wait(), None)[1]

    @property
    def bytes(self) -> int:
        """The sum of all counted bytes."""
        return sum(size for _, size in self.sent.values())

    @contextlib.contextmanager
    def counted(self) -> Iterator[Callable[[], int]]:
        """While it is entered, collectives are counted: what it gives says how many bytes there were.

        Not while time is taken: counting takes some, and torch's DDP calls its collectives past it.
        """
        before, self.counts = self.bytes, True
        try:
            yield lambda: self.bytes - before
        finally:
            self.counts = False


class Slow(dist.Work):
    """A collective that ends when the emulated network has sent it."""

    def __init__(self, work: Any, ready: float, value: Any) -> None:
        super().__init__()
        self._work, self._ready, self._value = work, ready, value
        self._future: Any = torch.futures.Future()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self._work.wait()
        time.sleep(max(0.0, self._ready - time.monotonic()))
        self._future.set_result(self._value)

    def wait(self, timeout: Any = None) -> bool:
        """Wait until it has been sent."""
        self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Whether it has been sent."""
        return bool(self._future.done())

    def get_future(self) -> Any:
        """The tensors, once it has been sent."""
        return self._future


WIRE = Wire()


def hook(size, bucket):  # torch reads annotations, and does not accept strings
    """For `DistributedDataParallel.register_comm_hook`: the mean of a bucket, through this network."""
    flat = bucket.buffer().div_(size)
    work = dist.all_reduce(flat, async_op=True)
    future: torch.futures.Future[torch.Tensor] = work.get_future()
    return future.then(lambda done: done.value()[0])


def _patched(name: str, kind: str) -> Callable[..., Any]:
    call = getattr(dist, name)

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        if WIRE.bandwidth is None and not WIRE.counts:
            return call(*args, **kwargs)
        return WIRE.carries(kind, call, args, kwargs)

    return run


for _name, _kind in KINDS.items():
    setattr(dist, _name, _patched(_name, _kind))
dist.all_gather_into_tensor = dist.all_gather_single
dist.reduce_scatter_tensor = dist.reduce_scatter_single
