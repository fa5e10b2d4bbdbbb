"""`from_torchmetrics`: convert a `torchmetrics.Metric` to pure functions and a metric value."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core.collectives import pmax, pmean, pmin, psum
from lumen.core.metrics import Metric as LumenMetric
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.errors import AxisError, InexactWarning, MetricError
from lumen.metrics.logits import form_of_logits
from lumen.metrics.template import Note, Skeleton, Slot

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

_FOLD_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
_FOLD_MANY: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    "max": lambda stacked: stacked.amax(0),
    "min": lambda stacked: stacked.amin(0),
}
_UPDATES = "updates"
_AS_LOGITS = ":as_logits"
_SHAPES = ":shapes"


@pytree_dataclass
class MetricValue(LumenMetric):
    """The accumulated states of a torchmetrics metric; created by `TorchMetric.of`, and merged like any metric.

    `states` contains the metric's states by name: a tensor if it reduces immediately, or a tuple of tensors collected
    until `compute`. `updates` counts the updates, and `as_logits` those whose predictions torchmetrics interpreted as
    logits; it is () if torchmetrics does not have to guess.
    """

    states: Mapping[str, Any]
    updates: Tensor
    as_logits: Any
    metric: TorchMetric = static()
    notes: tuple[Note, ...] = static(default=())

    def merge(self, other: MetricValue) -> MetricValue:
        """Merge both values."""
        return self.metric.merge(self, other)

    @classmethod
    def merge_all(cls, parts: Sequence[MetricValue]) -> MetricValue:
        """Merge all values at once, in time proportional to their number."""
        return parts[0].metric.merge(*parts)

    def compute(self) -> Any:
        """The result of the metric's own `compute`: a tensor or a dict of tensors, with a leading dim for lanes."""
        return self.metric.compute(self)

    def psum(self, axis: str) -> MetricValue:
        """The value over all members of `axis`; the metric's states must be sums, means, maxima or minima."""
        return self.metric.psum(self, axis)


class TorchMetric:
    """A torchmetrics metric as pure functions: `init`, `update`, `merge`, `compute`, and `of` for one batch.

    Created by `from_torchmetrics`, once, outside the step. It is stateless; two handles are equal only if they are
    the same object.
    """

    def __init__(self, metric: Metric | MetricCollection, logits: bool = False) -> None:
        self._skeleton = Skeleton(metric)
        self._by_device: dict[torch.device, Skeleton] = {}
        self._logits = logits
        self._form = form_of_logits(self._skeleton, logits)
        self._guesses = self._form is not None and not logits

    def __repr__(self) -> str:
        logits = ", logits=True" if self._logits else ""
        return f"lm.metrics.from_torchmetrics({type(self._skeleton.metric).__name__}(...){logits})"

    def __copy__(self) -> TorchMetric:
        return self

    def __deepcopy__(self, _memo: Any) -> TorchMetric:
        return self  # immutable; values of a copy would not merge with those of the original

    def init(self) -> MetricValue:
        """The empty value; merging it has no effect."""
        return self._empty(self._skeleton.device, None)

    def _empty(self, device: torch.device, tie: Tensor | None) -> MetricValue:
        states = {slot.key: _start(slot, None, device, tie) if slot.folds else () for slot in self._skeleton.slots}
        zero = torch.zeros((), dtype=torch.int64, device=device)
        zero = zero if tie is None else zero + tie
        return MetricValue(states, zero, zero.clone() if self._guesses else (), self)

    def of(self, /, *args: Any, **kwargs: Any) -> MetricValue:
        """The value of one batch, with the arguments of the metric's `update`; states are on the device of its tensors.

        A batch without rows, as a process may have under `lm.ddp`, is not an update: its value is that of `init`.
        """
        return self._run(None, args, kwargs)

    def update(self, value: MetricValue, /, *args: Any, **kwargs: Any) -> MetricValue:
        """Update `value` with one batch; a batch without rows returns `value` itself."""
        self._check(value)
        if value.updates.dim() or any(
            not s.folds and s.join != "list" and len(value.states[s.key]) > 1 for s in self.slots
        ):
            # The metric can update one tensor only; collected tensors get another one.
            return self.merge(value, self._run(None, args, kwargs))
        return self._run(value, args, kwargs)

    def merge(self, value: MetricValue, *more: MetricValue) -> MetricValue:
        """Merge values with the metric's own reductions.

        Merge many values in one call, as `lm.merge_metrics` does, if the metric has list states: merging in pairs
        copies a list each time.
        """
        values = (value, *more)
        for v in values:
            self._check(v)
        if not more:
            return value
        states = {slot.key: _join(slot, [v.states[slot.key] for v in values]) for slot in self.slots}
        updates = _fold("sum", [v.updates for v in values])
        as_logits = _fold("sum", [v.as_logits for v in values]) if self._guesses else ()
        return MetricValue(states, updates, as_logits, self, next((v.notes for v in values if v.notes), ()))

    def compute(self, value: MetricValue) -> Any:
        """The result of the metric's own `compute` for `value`."""
        self._check(value)
        if value.updates.dim():
            lanes = [self.compute(tree.map(lambda leaf, i=i: leaf[i], value)) for i in range(len(value.updates))]
            return tree.map(lambda *results: torch.stack([torch.as_tensor(x) for x in results]), *lanes)
        if self._guesses:
            self._check_guesses(value)
        skeleton = self._on(value.updates.device)
        copies = skeleton.instantiate(_count(value.updates), value.notes)
        for slot in skeleton.slots:
            content = value.states[slot.key]
            if slot.join == "list":
                state: Any = list(content)
            else:
                state = content.clone() if slot.folds else slot.reduce_collected(content, value.updates.device)
            copies[slot.node].__dict__[slot.name] = state
        with torch.no_grad():
            result = self._call(copies[0].compute)
        skeleton.release(copies)
        return result

    def psum(self, value: MetricValue, axis: str) -> MetricValue:
        """Reduce `value` over all members of `axis`."""
        if rules.axis(axis) is None:
            return value
        states = {slot.key: self._psum(slot, value.states[slot.key], axis) for slot in self.slots}
        counts = {"updates": psum(value.updates, axis), "as_logits": psum(value.as_logits, axis)}
        return value.replace(states=states, **counts)  # type: ignore[attr-defined, no-any-return]

    def pack(self, value: MetricValue) -> dict[str, Tensor]:
        """Pack `value` into a flat dict of few tensors for a checkpoint; several tensors become one, with their shapes.

        >>> import lumen as lm, torch, torchmetrics
        >>> metric = lm.metrics.from_torchmetrics(torchmetrics.CatMetric())
        >>> value = metric.of(torch.tensor([1.0, 2.0])).merge(metric.of(torch.tensor([3.0])))
        >>> packed = metric.pack(value)
        >>> packed["value"], metric.unpack(packed).compute()
        (tensor([1., 2., 3.]), tensor([1., 2., 3.]))
        """
        self._check(value)
        if value.notes:
            names = ", ".join(repr(name) for _, name, _ in value.notes)
            raise MetricError(f"{self!r} keeps {names} outside its states, which is not a tensor and cannot be saved.")
        packed = {_UPDATES: value.updates, **({_AS_LOGITS: value.as_logits} if self._guesses else {})}
        for slot in self.slots:
            content = value.states[slot.key]
            if slot.folds:
                packed[slot.key] = content
            else:
                packed[slot.key], packed[slot.key + _SHAPES] = _flatten(slot.key, content, value.updates)
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> MetricValue:
        """Restore the value from the result of `pack`."""
        states: dict[str, Any] = {}
        names = [name for slot in self.slots for name in self._packed_names(slot)]
        for name in [*names, _UPDATES, *([_AS_LOGITS] if self._guesses else [])]:
            if name not in packed:
                raise MetricError(
                    f"{name!r} is missing, so the dict was not packed by {self!r}; it has {', '.join(packed)}."
                )
        for slot in self.slots:
            content = packed[slot.key]
            states[slot.key] = content if slot.folds else _unflatten(content, packed[slot.key + _SHAPES])
        return MetricValue(states, packed[_UPDATES], packed[_AS_LOGITS] if self._guesses else (), self)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The states of the metric, and how they merge."""
        return self._skeleton.slots

    def _packed_names(self, slot: Slot) -> tuple[str, ...]:
        return (slot.key,) if slot.folds else (slot.key, slot.key + _SHAPES)

    def _run(self, value: MetricValue | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MetricValue:
        tensors: list[Tensor] = []
        args, kwargs = _detached(args, tensors), _detached(kwargs, tensors)
        count = torch.zeros((), dtype=torch.int64) if value is None else value.updates
        if tensors:
            device = tensors[0].device
        else:
            device = self._skeleton.device if value is None else count.device
        tie = _tie(tensors)
        if _without_rows((*args, *kwargs.values())):
            return self._empty(device, tie) if value is None else value
        args, kwargs, as_logits_now = self._predictions(args, kwargs)
        skeleton = self._on(device)
        copies = skeleton.instantiate(0, () if value is None else value.notes)
        for slot in skeleton.slots:
            content = None if value is None else value.states[slot.key]
            copies[slot.node].__dict__[slot.name] = _start(slot, content, device, tie)
        with torch.no_grad():
            self._call(copies[0].update, *args, **kwargs)
        states = {slot.key: _content(slot, getattr(copies[slot.node], slot.name)) for slot in skeleton.slots}
        notes = skeleton.release(copies)
        updates = count.to(device) + 1
        as_logits = as_logits_now if value is None or not self._guesses else value.as_logits.to(device) + as_logits_now
        return MetricValue(states, updates if tie is None else updates + tie, as_logits, self, notes)

    def _predictions(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any, Any]:
        """The arguments of an update with logits as probabilities; and 1 if torchmetrics interprets them as logits.

        It does so if a prediction is outside [0, 1].
        """
        raw = kwargs.get("preds", args[0] if args else None)
        if self._form is None or not isinstance(raw, Tensor):
            return args, kwargs, torch.zeros((), dtype=torch.int64) if self._guesses else ()
        if not self._logits:
            return args, kwargs, (~((raw >= 0) & (raw <= 1)).all() & raw.is_floating_point()).to(torch.int64)
        preds = raw if not raw.is_floating_point() else raw.sigmoid() if self._form == "sigmoid" else raw.softmax(1)
        return (args, {**kwargs, "preds": preds}, ()) if "preds" in kwargs else ((preds, *args[1:]), kwargs, ())

    def _check_guesses(self, value: MetricValue) -> None:
        """Warn if torchmetrics interpreted predictions as logits in some updates, and as probabilities in others."""
        if rules.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
            return
        guessed, updates = int(value.as_logits), int(value.updates)
        if 0 < guessed < updates:
            warnings.warn(
                f"{self!r}: torchmetrics interprets predictions as logits if one of a batch is outside [0, 1], as in"
                f" {guessed} of {updates} updates, and as probabilities in the others, so the result differs from that"
                " of all the data together. For logits write lm.metrics.from_torchmetrics(metric, logits=True);"
                " otherwise pass probabilities.",
                InexactWarning,
                stacklevel=3,
            )

    def _on(self, device: torch.device) -> Skeleton:
        if device == self._skeleton.device:
            return self._skeleton
        skeleton = self._by_device.get(device)
        if skeleton is None:
            # Two threads may both create one; the two are equivalent.
            skeleton = self._by_device[device] = Skeleton(self._skeleton.metric, device)
        return skeleton

    def _call(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise MetricError(
                f"{self!r} cannot run under vmap: it needs the value of a tensor in Python, or an operation that vmap"
                " has no rule for. Pass the metric validate_args=False (nan_strategy='disable' for an aggregation), or"
                " return its inputs (logits, labels) from the vmapped function and call `of` outside."
            ) from error

    def _psum(self, slot: Slot, content: Any, axis: str) -> Any:
        if slot.join == "sum":
            return psum(content, axis)
        if slot.join == "max":
            return pmax(content, axis)
        if slot.join == "min":
            return pmin(content, axis)
        if slot.join == "mean":
            return (pmean(slot.reduce_collected(content, content[0].device), axis),) if content else ()
        # Support for a gather over the axis would go here.
        raise AxisError(
            f"the state {slot.key!r} of {self!r} is not a sum, mean, maximum or minimum, so it cannot be reduced over"
            f" the axis {axis!r} without a gather. Return the value from the step unreduced, to be merged outside,"
            " or use a metric with states of fixed size, such as thresholds=100."
        )

    def _check(self, value: Any) -> None:
        if isinstance(value, MetricValue) and value.metric is self:
            return
        if isinstance(value, MetricValue):
            raise MetricError(
                f"this value belongs to another {value.metric!r}. Only values of the same handle merge: call"
                " from_torchmetrics once, outside the step, and use its `of` inside."
            )
        raise MetricError(
            f"{self!r} takes its own values, not {type(value).__name__}. Write: value = metric.of(...) or metric.init()"
        )


def from_torchmetrics(metric: Metric | MetricCollection, *, logits: bool = False) -> TorchMetric:
    """Convert `metric` to pure functions on metric values, equal to torchmetrics on all the data together.

    `handle.of(*args)` in a step returns a metric like `lm.Mean.of`: it merges over microbatches, steps and lanes and
    is computed when it is logged. To use it manually, call `init`, `update`, `merge` and `compute`. Values merge with
    the metric's own reductions, as torchmetrics merges its processes. A `MetricCollection` is one value that computes
    a dict.

    `metric` is copied and never changed; its accumulated state is discarded. In a collection each metric processes
    each batch, unless its compute groups were specified, or detected by an earlier update.

    Binary and multilabel metrics, and multiclass curves, interpret predictions as logits if one of a batch is outside
    [0, 1], so batches of one data set may be interpreted differently; then `compute` issues an `InexactWarning`. With
    `logits=True` predictions are logits in every batch.

    Raises `MetricError` if `metric` is not a metric, keeps data outside its states, or does not take logits despite
    `logits=True`.

    >>> import lumen as lm, torch, torchmetrics
    >>> accuracy = lm.metrics.from_torchmetrics(torchmetrics.classification.MulticlassAccuracy(3, average="micro"))
    >>> a = accuracy.of(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
    >>> b = accuracy.of(torch.tensor([2]), torch.tensor([0]))
    >>> a.merge(b).compute()
    tensor(0.5000)
    """
    from torchmetrics import Metric, MetricCollection

    if not isinstance(metric, Metric | MetricCollection):
        actual = f"the class {metric.__name__}" if isinstance(metric, type) else type(metric).__name__
        raise MetricError(
            f"from_torchmetrics takes a torchmetrics.Metric or MetricCollection, not {actual}."
            " Write: lm.metrics.from_torchmetrics(torchmetrics.classification.MulticlassAccuracy(10))"
        )
    return TorchMetric(metric, logits)


def _default(slot: Slot, device: torch.device) -> Tensor:
    assert slot.default is not None
    return slot.default.detach().to(device, copy=True)


def _start(slot: Slot, content: Any, device: torch.device, tie: Tensor | None) -> Any:
    """The initial state of an update: a copy, because metrics add in place, that varies over lanes like `tie`."""
    if slot.join == "list":
        return list(content or ())
    if not slot.folds:
        content = content[0] if content else None
    start = _default(slot, device) if content is None else content.to(device, copy=True)
    return start if tie is None else start + tie.to(start)


def _without_rows(args: Sequence[Any]) -> bool:
    """Whether all arguments of an update that can have rows have none."""
    counts = [count for arg in args if (count := _rows(arg)) is not None]
    return bool(counts) and not any(counts)


def _rows(arg: Any) -> int | None:
    """The number of rows of an argument: the first dim of a tensor, or the length of a list; None for other values."""
    if isinstance(arg, Tensor):
        return arg.shape[0] if arg.dim() else None
    if isinstance(arg, Mapping):
        return max((count for item in arg.values() if (count := _rows(item)) is not None), default=None)
    return len(arg) if isinstance(arg, list | tuple) else None


def _content(slot: Slot, state: Any) -> Any:
    if slot.join == "list":
        return tuple(state) if isinstance(state, list) else (state,)
    return state if slot.folds else (state,)


def _join(slot: Slot, contents: list[Any]) -> Any:
    if slot.folds:
        return _fold(slot.join, contents)
    return tuple([tensor for content in contents for tensor in content])


def _fold(join: str, tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 2:
        return _FOLD_TWO[join](*tensors)
    return _FOLD_MANY[join](torch.stack(tensors))


def _detached(node: Any, tensors: list[Tensor]) -> Any:
    """The same arguments detached from autograd; appends their tensors to `tensors`."""
    kind = type(node)
    if isinstance(node, Tensor):
        tensors.append(node)
        return node.detach()
    if kind is tuple or kind is list:
        return kind([_detached(child, tensors) for child in node])
    if kind is dict:
        return {key: _detached(child, tensors) for key, child in node.items()}
    return node


def _tie(tensors: list[Tensor]) -> Tensor | None:
    """Under a torch.func transform, a zero that varies over lanes like the arguments.

    Metrics add to their states in place, which vmap allows only if the state varies over the lanes too.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return None
    zero = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        zero = zero + tensor.detach().new_zeros((), dtype=torch.int64)
    return zero


def _count(updates: Tensor) -> int:
    """The number of updates, or 1 if it is not concrete; torchmetrics warns if compute precedes any update."""
    if rules.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return 1
    return int(updates)


def _flatten(key: str, tensors: tuple[Any, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten several tensors into one, and return the table of their shapes."""
    kinds = {
        (tensor.dtype, tensor.dim()) if isinstance(tensor, Tensor) else type(tensor).__name__ for tensor in tensors
    }
    if len(kinds) > 1 or any(isinstance(kind, str) for kind in kinds):
        raise MetricError(
            f"the state {key!r} cannot be packed: its entries are not tensors of one dtype and number of dims, but"
            f" {', '.join(sorted(map(str, kinds)))}."
        )
    if not tensors:
        return like.new_zeros(0, dtype=torch.float32), like.new_zeros((0, 0))
    shapes = torch.tensor([tensor.shape for tensor in tensors], dtype=torch.int64)
    return torch.cat([tensor.reshape(-1) for tensor in tensors]), shapes.reshape(len(tensors), tensors[0].dim())


def _unflatten(flat: Tensor, shapes: Tensor) -> tuple[Tensor, ...]:
    sizes = [tuple(shape) for shape in shapes.tolist()]
    chunks = flat.split([int(torch.Size(size).numel()) for size in sizes])
    return tuple([chunk.reshape(size) for chunk, size in zip(chunks, sizes, strict=True)])
