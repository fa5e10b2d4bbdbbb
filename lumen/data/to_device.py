"""`Move`: copies tensors to a device without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Move:
    """Copies tensors to `device`.

    On CUDA a copy from pageable memory waits for all earlier kernels, so host and device would take turns. A copy from
    pinned memory on its own stream overlaps with the step before, and later kernels wait for it.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; the same object if it is there already."""
        if self.device.type != "cuda" or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return tensor.to(self.device)  # on MPS an asynchronous copy could read the memory after it has changed
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        compute_stream = torch.cuda.current_stream(self.device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        with torch.cuda.stream(self._stream):
            moved = pinned.to(self.device, non_blocking=True)
        compute_stream.wait_stream(self._stream)
        moved.record_stream(compute_stream)  # the copying stream may reuse its memory only after the step
        return moved
