"""Logits that are not computed until a function needs them, and never as a whole where their cross-entropy is enough.

A `LazyLogits` stands for the output of a language model's head. What code between the head and the loss does to logits
(casts, slices, flattening, scaling, soft-capping) is recorded; `torch.nn.functional.cross_entropy` of them is computed
in chunks. Any other function gets the logits as a whole, with a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.tensor_proxy import TensorProxy, empty_meta
from lumen.errors import InexactWarning, LossError
from lumen.losses._chunked import Settings, VocabularyShard, capped, linear, token_losses, total_loss
from lumen.losses._linear_cross_entropy import default_chunk


class Head(NamedTuple):
    """What logits are computed from; `chunk` rows at a time, None for the default.

    Logits are `scale * (hidden @ weight.T + bias)`, then soft-capped.
    """

    hidden: Tensor  # [..., features]
    weight: Tensor  # [vocabulary, features]
    bias: Tensor | None
    chunk: int | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    shard: VocabularyShard | None = None

    @property
    def vocabulary(self) -> int:
        """The number of classes."""
        return len(self.weight) if self.shard is None else self.shard.classes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All logits, `[..., vocabulary]`."""
        flat = self.hidden.reshape(-1, self.hidden.shape[-1])
        logits = linear(flat, self.weight, self.bias, torch.promote_types(self.hidden.dtype, dtype))
        if self.shard is not None:
            logits = self.shard.gather(logits)
        logits = logits if self.scale == 1 else logits * self.scale
        return capped(logits, self.soft_cap).to(dtype).view(*self.hidden.shape[:-1], -1)

    def settings(self, ignore_index: int = -100, label_smoothing: float = 0.0) -> Settings:
        """How the loss of these logits is computed."""
        rows, features = self.hidden.shape[:-1].numel(), self.hidden.shape[-1]
        chunk = self.chunk or default_chunk(rows, features, len(self.weight))
        return Settings(ignore_index, label_smoothing, 0.0, self.soft_cap, chunk, self.scale, self.shard)


def lazy_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int | None) -> Tensor:
    """The output of a linear layer, not computed yet, as autocast would compute it.

    Of a weight that is a proxy itself, its `__torch_function__` says what it is.
    """
    if torch.overrides.has_torch_function((weight,)):
        result: Tensor = torch.overrides.handle_torch_function(lazy_logits, (weight,), hidden, weight, bias, chunk)
        return result
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    return LazyLogits.of(
        Head(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), chunk), dtype
    )


class LazyLogits(TensorProxy):
    """The logits of a `Head`, of `dtype`; `[rows, vocabulary, ...]` where they are `transposed`."""

    form = TensorProxy.form | {Tensor.is_floating_point, Tensor.is_complex}
    head: Head
    transposed: bool
    _dense: Tensor | None
    _has_views: bool
    _grad_mode: bool

    @classmethod
    def of(cls, head: Head, dtype: torch.dtype, transposed: bool = False) -> LazyLogits:
        """The logits of `head`."""
        shape = [*head.hidden.shape[:-1], head.vocabulary]
        if transposed:
            shape[-2:] = shape[:-3:-1]
        lazy: LazyLogits = _torch_compat.make_subclass(cls, empty_meta(shape, dtype), False)
        lazy.head, lazy.transposed, lazy._dense, lazy._has_views = head, transposed, None, False
        lazy._grad_mode = torch.is_grad_enabled()
        return lazy

    @classmethod
    def answered(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func`: recorded, in chunks, or of all logits."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and first._dense is None and name in _HANDLERS:
            result = _HANDLERS[name](first, *args[1:], **kwargs)
            if result is not NotImplemented:
                first._has_views |= isinstance(result, LazyLogits) and result is not first
                return result
        writes = name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))
        args, kwargs = _torch_compat.torch_pytree.tree_map(lambda x: _computed(x, name, writes), (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


def _computed(value: Any, name: str, writes: bool) -> Any:
    """The whole of lazy logits, computed once; any other value unchanged."""
    if not isinstance(value, LazyLogits):
        return value
    if writes and value._has_views:
        raise LossError(
            f"torch's {name} would change logits of which lm.chunked_logits has recorded a slice or a cast before."
            f" Write the function that returns a new tensor, {name.strip('_')}, or leave lm.chunked_logits out."
        )
    if value._dense is None:
        warnings.warn(
            f"lm.chunked_logits computed all logits at once, {list(value.shape)}, because torch's {name} needs them."
            " Their memory is saved where only cross_entropy and argmax read them.",
            InexactWarning,
            stacklevel=4,
        )
        with torch.set_grad_enabled(value._grad_mode):
            logits = value.head.dense(value.dtype)
            value._dense = logits.transpose(-1, -2) if value.transposed else logits
    return value._dense


# ---------------------------------------------------------------------------------------------------- recorded


def _cast(lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """A wider dtype, on the same device."""
    dtype = lazy.dtype
    for key, value in (*(("", value) for value in args), *kwargs.items()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif key not in {"non_blocking", "copy"} and not isinstance(value, bool) and _device(value) != _device_of(lazy):
            return NotImplemented
    if dtype == lazy.dtype:
        return lazy
    if not dtype.is_floating_point or torch.promote_types(dtype, lazy.dtype) != dtype or dtype.itemsize < 4:
        return NotImplemented
    return LazyLogits.of(lazy.head, dtype, lazy.transposed)


def _device(value: Any) -> torch.device | None:
    try:
        return torch.device(value)
    except (TypeError, RuntimeError):
        return None


def _device_of(lazy: LazyLogits) -> torch.device:
    return lazy.head.hidden.device


def _requires_grad(lazy: LazyLogits, *_: Any) -> bool:
    head = lazy.head
    return lazy._grad_mode and (head.hidden.requires_grad or head.weight.requires_grad)


def _with_rows(name: str) -> Callable[..., Any]:
    """Another shape of the rows: view, reshape and flatten."""

    def handler(lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        if lazy.transposed:
            return NotImplemented
        with _torch_compat.DisableTorchFunctionSubclass():
            shape = getattr(torch.empty(tuple(lazy.shape), device="meta"), name)(*args, **kwargs).shape
        if not shape or shape[-1] != lazy.shape[-1]:
            return NotImplemented
        hidden = lazy.head.hidden
        return _on(lazy, hidden.reshape(*shape[:-1], hidden.shape[-1]))

    return handler


def _item(lazy: LazyLogits, index: Any) -> Any:
    """A slice of the rows, with all classes."""
    if lazy.transposed:
        return NotImplemented
    entries = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(e, int | slice | Tensor | list) or e is None or e is Ellipsis for e in entries):
        return NotImplemented
    sizes = [_dims_of(e) for e in entries]
    after_dots = 0 if Ellipsis not in _plain(entries) else sum(sizes[_plain(entries).index(Ellipsis) + 1 :])
    if (after_dots or sum(sizes) == lazy.dim()) and not (isinstance(entries[-1], slice) and entries[-1] == slice(None)):
        return NotImplemented
    return _on(lazy, lazy.head.hidden[index])


def _plain(entries: tuple[Any, ...]) -> list[Any]:
    """The entries of an index, None for tensors and lists, whose equality is not a bool."""
    return [e if e is Ellipsis else None for e in entries]


def _dims_of(entry: Any) -> int:
    """How many dims an entry of an index reads."""
    if entry is None or entry is Ellipsis:
        return 0
    return entry.dim() if isinstance(entry, Tensor) and entry.dtype in {torch.bool, torch.uint8} else 1


def _on(lazy: LazyLogits, hidden: Tensor) -> LazyLogits:
    return LazyLogits.of(lazy.head._replace(hidden=hidden), lazy.dtype)


def _swapped(lazy: LazyLogits, *dims: Any) -> Any:
    """Classes before the last dim of rows, as `cross_entropy` takes them: transpose, permute and mT."""
    wanted = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    if not all(isinstance(dim, int) for dim in wanted):
        return NotImplemented
    order = tuple(dim % lazy.dim() for dim in wanted)
    last = lazy.dim() - 1
    swap = (last - 1, last)
    if lazy.dim() < 3 or (sorted(order) != [*swap] and order != (*range(last - 1), last, last - 1)):
        return NotImplemented
    return LazyLogits.of(lazy.head, lazy.dtype, not lazy.transposed)


def _times(lazy: LazyLogits, factor: Any) -> Any:
    if type(factor) not in {int, float} or not (factor > 0 and math.isfinite(factor)):
        return NotImplemented
    head = lazy.head
    if head.soft_cap is None:
        return LazyLogits.of(head._replace(scale=head.scale * factor), lazy.dtype, lazy.transposed)
    # cap * tanh(scale * z / cap) times a factor: a larger cap of logits that are larger by as much.
    head = head._replace(soft_cap=head.soft_cap * factor, scale=head.scale * factor)
    return LazyLogits.of(head, lazy.dtype, lazy.transposed)


def _over(lazy: LazyLogits, factor: Any) -> Any:
    return _times(lazy, 1 / factor) if type(factor) in {int, float} and factor else NotImplemented


def _tanh(lazy: LazyLogits) -> Any:
    if lazy.head.soft_cap is not None:
        return NotImplemented
    return LazyLogits.of(lazy.head._replace(soft_cap=1.0), lazy.dtype, lazy.transposed)


# ---------------------------------------------------------------------------------------------------- in chunks


def _cross_entropy(
    lazy: LazyLogits,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    head, rows = lazy.head, lazy.head.hidden.shape[:-1]
    in_place = lazy.dim() <= 2 or (lazy.transposed and lazy.dim() == 3)
    if not (in_place and isinstance(target, Tensor) and target.shape == rows and not target.is_floating_point()):
        return NotImplemented
    if weight is not None or size_average is not None or reduce is not None or not 0 <= label_smoothing <= 1:
        return NotImplemented
    settings = head.settings(ignore_index, label_smoothing)
    dtype = torch.promote_types(torch.promote_types(head.hidden.dtype, torch.float32), lazy.dtype)
    own = dtype if torch.is_autocast_enabled(head.hidden.device.type) else lazy.dtype
    hidden, target = head.hidden.reshape(-1, head.hidden.shape[-1]), target.reshape(-1)
    if reduction == "none":
        losses = token_losses(hidden, head.weight, head.bias, target, settings, dtype)
        return losses.to(own).view(rows)
    if reduction not in {"mean", "sum"}:
        return NotImplemented
    counted = (target != ignore_index).to(dtype)
    total = total_loss(hidden, head.weight, head.bias, target, counted, settings)
    return (total / counted.sum() if reduction == "mean" else total).to(own)


def _argmax(lazy: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if lazy.transposed or not isinstance(dim, int) or dim % lazy.dim() != lazy.dim() - 1:
        return NotImplemented
    head, hidden = lazy.head, lazy.head.hidden
    flat = hidden.reshape(-1, hidden.shape[-1])
    if not len(flat):
        return NotImplemented
    with torch.no_grad():
        chunks = flat.split(head.settings().chunk)
        best = torch.cat([head._replace(hidden=rows).dense(lazy.dtype).argmax(-1) for rows in chunks])
    return best.view(*hidden.shape[:-1], *([1] if keepdim else []))


_HANDLERS: dict[str, Callable[..., Any]] = {
    "device": lambda lazy, *_: _device_of(lazy),
    "requires_grad": _requires_grad,
    "itemsize": lambda lazy, *_: lazy.dtype.itemsize,
    "element_size": lambda lazy: lazy.dtype.itemsize,
    "contiguous": lambda lazy, **_: lazy,
    "float": lambda lazy, **_: _cast(lazy, torch.float32),
    "double": lambda lazy, **_: _cast(lazy, torch.float64),
    "to": _cast,
    "view": _with_rows("view"),
    "reshape": _with_rows("reshape"),
    "flatten": _with_rows("flatten"),
    "__getitem__": _item,
    "transpose": _swapped,
    "permute": _swapped,
    "mT": lambda lazy, *_: _swapped(lazy, -1, -2),
    "mul": _times,
    "div": _over,
    "tanh": _tanh,
    "cross_entropy": _cross_entropy,
    "argmax": _argmax,
}
