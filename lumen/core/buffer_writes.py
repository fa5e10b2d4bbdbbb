"""Which buffers a module writes to while it is traced, where comparing values is impossible."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lumen.core import _torch_compat


class Marking(threading.local):
    """Where a tracker collects the buffers that modules leave unwritten; None outside of one."""

    unwritten: dict[int, Tensor] | None = None


marking = Marking()


def is_marking() -> bool:
    """Whether a tracker collects the buffers that modules do not write to."""
    return marking.unwritten is not None


def mark_unwritten(buffer: Tensor) -> None:
    """Report a buffer that a module returns unwritten."""
    assert marking.unwritten is not None
    marking.unwritten[id(buffer)] = buffer


class touched(TorchFunctionMode):  # noqa: N801
    """`with touched(buffers) as now:` records which of these are written to, for traces, which have no values.

    A tensor counts the writes to itself and its views, but not those through `.data` (reading that counts as writing
    here) nor those of norms in training mode (recorded by their calls).
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        super().__init__()
        self._versions = {id(buffer): _torch_compat.version_of(buffer) for buffer in buffers}
        self._written: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record writes that no version counts."""
        kwargs = kwargs or {}
        if func == _READ_DATA or (func in _NORMS and _is_training(func, args, kwargs)):
            self._written.update(map(id, (*args, *kwargs.values())))
        return func(*args, **kwargs)

    def is_same(self, before: Tensor, now: Tensor) -> bool:
        """Whether `now` is the tensor `before`, unwritten."""
        return (
            now is before and id(now) not in self._written and _torch_compat.version_of(now) == self._versions[id(now)]
        )


_READ_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_NORMS = (F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm)


def _is_training(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a norm moves its running statistics."""
    flags = [kwargs[name] for name in ("training", "use_input_stats") if name in kwargs]
    flags += [value for value in args if isinstance(value, bool)]
    return bool(flags[0]) if flags else func in (F.instance_norm, torch.instance_norm)
