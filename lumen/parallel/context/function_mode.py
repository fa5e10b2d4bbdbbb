"""What torch functions do inside a loss function whose sequences are sharded.

Attention goes through `ShardedAttention`. `torch.arange` of as many numbers as this rank has positions, and the first
so many entries of a longer tensor, are taken for positions, and start at this rank's first one. Dropout draws the mask
of all positions, and takes this rank's.

Numbers can be equal by chance: a dim of features may be as long as a shard. So the check of a loss function
(`loss_check`), which has a shard of another length, records the places in the code that take positions, and those that
take other ranges. A range of the right length at a place of neither kind raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lumen.core import rules
from lumen.errors import LossError
from lumen.parallel.context.attention import ShardedAttention, refuse_composite

Handler = Callable[["SequenceMode", Any, tuple[Any, ...], dict[str, Any]], Any]
_Site = tuple[CodeType, int]


class CallSites:
    """The places in a model's code that read ranges: which of them are positions, found by the check of its loss."""

    def __init__(self) -> None:
        self.positions: set[_Site] = set()
        self.others: set[_Site] = set()
        self.mixing: set[str] = set()  # names of functions that may mix positions, for messages
        self.is_recording = True
        self.is_checked = False
        self.checks = 0

    def takes_positions(self, fits: bool, local: int) -> bool:
        """Whether a range read here is one of positions; it `fits` if it starts at 0 and is of `local` numbers."""
        frame = _caller()
        if frame.f_globals.get("__name__") in _MASKS:
            return False
        site = frame.f_code, frame.f_lasti
        if self.is_recording:
            (self.positions if fits else self.others).add(site)
            return fits
        if not fits or site in self.positions:
            return fits
        if site in self.others:
            return False
        raise LossError(
            f"{frame.f_code.co_filename}, line {frame.f_lineno}, takes the numbers from 0 to {local}, as many as one"
            " rank of lm.context_parallel has positions, and did not run when the loss was checked. Are they positions?"
            " Pass position_ids to the model, from a leaf of the batch."
        )


class SequenceMode(TorchFunctionMode):
    """The mode inside of one call of a loss function."""

    def __init__(self, attention: ShardedAttention, index: int, rows: int, sites: CallSites) -> None:
        super().__init__()
        self.attention, self.sites, self.rows = attention, sites, rows
        self.local, self.length, self.start = attention.local, attention.length, index * attention.local

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The result of `func`, for this rank's positions."""
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs or {})
        if self.sites.is_recording and getattr(func, "__name__", "") in _MIXING:
            self.sites.mixing.add(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def entered(mode: SequenceMode) -> Iterator[None]:
    """The mode, which also the recomputation of a checkpoint in the loss enters."""
    forwards = rules.stack.forwards
    forwards.append((_RecomputedMode, mode))
    try:
        with mode:
            yield
    finally:
        forwards.pop()


class _RecomputedMode:
    """The mode of a loss, a part of which runs again: `lumen.core.recompute.Placement`."""

    def __init__(self, _own: Any, mode: SequenceMode) -> None:
        self._mode = mode

    def again(self) -> SequenceMode:
        """The mode, to be entered."""
        return self._mode


def _caller() -> FrameType:
    """The frame that called the torch function which a mode handles."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_name == "__torch_function__" or frame.f_globals.get("__name__") in _INTERNAL
    ):
        frame = frame.f_back
    assert frame is not None
    return frame


# It makes masks from a rank's own keys, counted from 0; `ShardedAttention` makes those of all keys.
_MASKS = ("transformers.masking_utils",)
_INTERNAL = (__name__, "torch.overrides", "torch.utils._contextlib")


def _attention(mode: SequenceMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.attention(*args, **kwargs)


def _arange(mode: SequenceMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    bounds = dict(zip(("end",) if len(args) == 1 else ("start", "end", "step"), args, strict=False)) | kwargs
    start, end, step = bounds.get("start", 0), bounds.get("end"), bounds.get("step", 1)
    fits = start == 0 and step == 1 and end == mode.local
    if not mode.sites.takes_positions(fits, mode.local):
        return func(*args, **kwargs)
    options = {name: value for name, value in kwargs.items() if name not in ("start", "end", "step")}
    return func(mode.start, mode.start + mode.local, **options)


def _getitem(mode: SequenceMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, subscript = args
    entries = subscript if isinstance(subscript, tuple) else (subscript,)
    dims = _table_dims(tensor, entries, mode.length)
    if not dims:
        return func(*args, **kwargs)
    fits = any(_is_first(entries[index], mode.local) for index in dims)
    if not mode.sites.takes_positions(fits, mode.local):
        return func(*args, **kwargs)
    own = slice(mode.start, mode.start + mode.local)
    return func(tensor, tuple(own if p in dims and _is_first(e, mode.local) else e for p, e in enumerate(entries)))


def _narrow(mode: SequenceMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = dict(zip(("input", "dim", "start", "length"), args, strict=False)) | kwargs
    tensor = values.get("input", values.get("self"))
    is_table = isinstance(tensor, Tensor) and tensor.shape[values["dim"]] >= mode.length
    fits = is_table and values["length"] == mode.local and isinstance(values["start"], int) and values["start"] == 0
    if not is_table or not mode.sites.takes_positions(fits, mode.local):
        return func(*args, **kwargs)
    return func(tensor, values["dim"], mode.start, mode.local)


def _table_dims(tensor: Tensor, entries: Sequence[Any], length: int) -> list[int]:
    """The places in an index of slices of dims that have an entry for each position of the sequences."""
    if not any(isinstance(entry, slice) and entry.stop is not None for entry in entries):
        return []
    dims, dim = [], 0
    for index, entry in enumerate(entries):
        if entry is None or entry is Ellipsis:
            dim = tensor.dim() - sum(map(_dims_of, entries[index + 1 :])) if entry is Ellipsis else dim
            continue
        if isinstance(entry, slice) and entry.stop is not None and tensor.shape[dim] >= length:
            dims.append(index)
        dim += _dims_of(entry)
    return dims


def _dims_of(entry: Any) -> int:
    """How many dims an entry of an index reads."""
    if entry is None or isinstance(entry, bool):
        return 0
    return entry.dim() if isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8) else 1


def _is_first(entry: Any, count: int) -> bool:
    """Whether an entry of an index is the slice of the first `count`."""
    if not isinstance(entry, slice) or not isinstance(entry.stop, int):
        return False
    return entry.stop == count and entry.start in (None, 0) and entry.step in (None, 1)


def _dropout(mode: SequenceMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arguments = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    x, p = arguments["input"], arguments.get("p", 0.5)
    shape = _shape_of_all(mode, x.shape) if arguments.get("training", True) and p > 0 else None
    if shape is None:
        return func(*args, **kwargs)
    drawn = F.dropout(x.new_ones(shape), p, True)
    mask = drawn.narrow(1, mode.start, mode.local).reshape(x.shape)
    return x.mul_(mask) if arguments.get("inplace") else x * mask


def _shape_of_all(mode: SequenceMode, shape: torch.Size) -> tuple[int, ...] | None:
    """The shape of activations of all positions, `[rows, positions, ...]`; None for what has no positions there."""
    if len(shape) > 1 and shape[1] == mode.local:
        return (shape[0], mode.length, *shape[2:])
    if shape and shape[0] == mode.rows * mode.local:
        return (mode.rows, mode.length, *shape[1:])
    return None


_HANDLERS: Mapping[Any, Handler] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: refuse_composite,
    F.dropout: _dropout,
    torch.arange: _arange,
    torch.narrow: _narrow,
    Tensor.narrow: _narrow,
    Tensor.__getitem__: _getitem,
}
_MIXING = frozenset({
    *("conv1d", "conv2d", "conv3d", "lstm", "gru", "rnn_tanh", "rnn_relu", "avg_pool1d", "max_pool1d", "mean"),
    *("adaptive_avg_pool1d", "adaptive_max_pool1d", "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "softmax"),
    *("randn", "rand", "randn_like", "rand_like", "diff", "rfft", "sort", "argsort", "batch_norm"),
})  # fmt: skip
