"""One interface to what differs between kinds of accelerators: generators, memory, synchronization."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.errors import LumenError

_WITHOUT_MODULE = ("cpu", "meta")


def module_of(device: torch.device) -> Any | None:
    """`torch.cuda`, `torch.mps`, `torch.xpu` … for a device of that kind; None for the CPU, or where it is not here."""
    if device.type in _WITHOUT_MODULE:
        return None
    module: Any = torch.get_device_module(device)
    return module if module.is_available() else None


def running() -> tuple[str, Any] | None:
    """The kind of accelerator that this process uses, with its module; None where it uses none.

    Asking starts nothing: a process that forks workers must not have started CUDA.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module: Any = torch.get_device_module(accelerator)
    in_use: bool = module.is_initialized() if hasattr(module, "is_initialized") else module.is_available()
    return (accelerator.type, module) if in_use else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host; torch has no error type for the host."""
    if isinstance(error, LumenError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "out of memory" in text


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """torch's generators, on the CPU and on `device`, put back as they were at the end.

    >>> before = torch.get_rng_state()
    >>> with forked_rng(torch.device("cpu")):
    ...     _ = torch.manual_seed(7)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    if module_of(device) is None:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


class Generators:
    """torch's generators on the CPU, on the devices of the tensors in `values`, and on the accelerator in use.

    >>> generators = Generators(torch.ones(2))
    >>> before = generators.get()
    >>> drawn = torch.rand(3)
    >>> generators.set(before)
    >>> torch.equal(torch.rand(3), drawn)
    True
    """

    def __init__(self, values: Any) -> None:
        accelerator = running()
        devices = {tensor.device for tensor in tree.tensors(values) if module_of(tensor.device) is not None}
        if accelerator is not None and hasattr(accelerator[1], "current_device"):
            devices.add(torch.device(accelerator[0], accelerator[1].current_device()))
        self._devices = sorted(devices, key=str)

    def get(self) -> list[Tensor]:
        """Their states."""
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]

    def set(self, states: list[Tensor]) -> None:
        """Put back what `get` gave."""
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


def free_cache() -> None:
    """Give the accelerator's cached blocks back, where one is in use."""
    accelerator = running()
    if accelerator is not None and hasattr(accelerator[1], "empty_cache"):
        accelerator[1].empty_cache()
