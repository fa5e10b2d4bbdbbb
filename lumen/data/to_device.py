"""`Move`: tensors to a device, without making the host wait for what the device computes."""

from __future__ import annotations

import torch
from torch import Tensor


class Move:
    """Puts tensors on `device`.

    On CUDA a copy from ordinary memory first waits for all that was launched before, so that host and device take
    turns. From pinned memory and on a stream of its own it runs beside the step before; what is launched later waits.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor there; itself where it is there already."""
        if self.device.type != "cuda" or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return tensor.to(self.device)  # MPS would read it later, when it may have changed
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        computing = torch.cuda.current_stream(self.device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        with torch.cuda.stream(self._stream):
            moved = pinned.to(self.device, non_blocking=True)
        computing.wait_stream(self._stream)
        moved.record_stream(computing)  # its memory is free for the copying stream once the step has used it
        return moved
