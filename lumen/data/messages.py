"""A batch on its way from a worker process: small storages travel in the message, large ones in shared memory.

torch puts every storage of a batch into shared memory of its own, and sends the file descriptor over a connection that
it opens for this one. In that time a pipe carries some hundred kilobytes.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import UntypedStorage

MOST_BYTES = 2**18  # of a storage in a message
_PROTOCOL = 5  # which writes a bytearray as it is


class Message:
    """A batch that unpickles as itself, with the same views of the same storages.

    It is pickled at once, so that an object that cannot be is an exception of the worker's data set.
    """

    __slots__ = ("_content",)

    def __init__(self, batch: Any) -> None:
        self._content = bytes(_Pickler.dumps(batch, _PROTOCOL))

    def __reduce__(self) -> tuple[Any, ...]:
        return ForkingPickler.loads, (self._content,)


class _Pickler(ForkingPickler):
    """torch's, but for small storages."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not UntypedStorage or value.device.type != "cpu" or not 0 < len(value) <= MOST_BYTES:
            return NotImplemented
        content = torch.empty(0, dtype=torch.uint8).set_(value)
        return _storage, (bytearray(content.numpy().data),)


def _storage(content: bytearray) -> UntypedStorage:
    return torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
