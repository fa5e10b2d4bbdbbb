"""`remat(offload=True)`: activations that wait in the host's memory for the backward pass.

On a GPU a block's copies to the host run on a stream of their own, beside its computation, into pinned memory. The
device waits for them at the end of the block and before an operation writes to one of the tensors, so what is copied is
neither freed nor changed meanwhile. Copies back run where the backward pass needs them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumen.core import _torch_compat, distributed
from lumen.errors import StepError
from lumen.transforms._support.saved_results import alias, memory_of

_LEAST = 1024  # bytes: a copy of fewer takes longer than it is worth


class _OnHost(NamedTuple):
    copy: Tensor
    device: torch.device


class _OnDevice(NamedTuple):
    tensor: Tensor
    version: int


class HostOffload:
    """Moves tensors to the host and back, except those whose memory is in `exempt`: params and buffers."""

    def __init__(self, exempt: Collection[int]) -> None:
        self._exempt = exempt
        self._in_flight: dict[int, Tensor] = {}  # by their memory
        self._streams: dict[torch.device, Any] = {}

    def pack(self, tensor: Tensor) -> Tensor | _OnHost:
        """A copy of `tensor` on the host, or `tensor` itself where it stays."""
        tensor = alias(tensor)
        if not self._is_moved(tensor):
            return tensor
        if _torch_compat.in_make_fx():
            raise StepError(
                "lm.remat(offload=True) cannot be recorded by lm.compile(), whose graph has no copies beside its"
                " computation. Write lm.compile(blocks=True), or leave offload out."
            )
        is_pinned = tensor.is_cuda or distributed.is_dry_run()
        copy = torch.empty_like(tensor, device="cpu", pin_memory=is_pinned)
        if copy.stride() != tensor.stride():  # a view with gaps, of memory that is in use elsewhere
            return tensor
        with self._beside(tensor):
            copy.copy_(tensor, non_blocking=tensor.is_cuda)
        return _OnHost(copy, tensor.device)

    def pack_input(self, tensor: Tensor) -> _OnHost | _OnDevice:
        """The same for an input of a block; one without a gradient stays, as all blocks share a mask."""
        packed = self.pack(tensor) if tensor.requires_grad else alias(tensor)
        return _OnDevice(packed, _torch_compat.version_of(packed)) if isinstance(packed, Tensor) else packed

    def unpack_input(self, packed: _OnHost | _OnDevice) -> Tensor:
        """The input of a block on its device."""
        if isinstance(packed, _OnHost):
            return self.unpack(packed)
        if _torch_compat.version_of(packed.tensor) != packed.version:
            raise StepError(
                "remat(offload=True): an input of a block was changed in place after the block had received it, so the"
                " block cannot be recomputed from it. Write that operation out of place: x = x + y instead of x += y."
            )
        return alias(packed.tensor)

    def unpack(self, packed: Tensor | _OnHost) -> Tensor:
        """The tensor on its device."""
        if isinstance(packed, Tensor):
            return alias(packed)
        tensor = torch.empty_like(packed.copy, device=packed.device, pin_memory=False)
        return tensor.copy_(packed.copy, non_blocking=tensor.is_cuda)

    def before_write(self, tensor: Tensor) -> None:
        """Have a write to `tensor` wait until it has been copied."""
        if memory_of(tensor) in self._in_flight:
            self.wait()

    def wait(self) -> None:
        """Have the device wait for all copies to the host."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._in_flight.clear()

    def _is_moved(self, tensor: Tensor) -> bool:
        is_away = not _is_host(tensor.device) or distributed.is_dry_run()
        is_large = tensor.numel() * tensor.element_size() >= _LEAST
        return is_away and is_large and tensor.is_floating_point() and memory_of(tensor) not in self._exempt

    @contextmanager
    def _beside(self, tensor: Tensor) -> Iterator[None]:
        """Run a copy of `tensor` beside the computation, where the device can."""
        if not tensor.is_cuda:
            yield
            return
        self._in_flight[memory_of(tensor)] = tensor
        stream = self._streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            yield


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"
