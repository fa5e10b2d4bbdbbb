"""`from_torchmetrics`: any `torchmetrics.Metric` as pure functions and a typed value."""

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
    """What a torchmetrics metric has seen; made by `TorchMetric.of`, and merged like any typed value.

    `states` holds the metric's states by name: a tensor where parts fold into one, a tuple of tensors where they are
    kept until `compute`. `updates` counts the updates, and `as_logits` those whose predictions torchmetrics took for
    logits; it is () where there is nothing to guess.
    """

    states: Mapping[str, Any]
    updates: Tensor
    as_logits: Any
    metric: TorchMetric = static()
    notes: tuple[Note, ...] = static(default=())

    def merge(self, other: MetricValue) -> MetricValue:
        """The value of all that both have seen."""
        return self.metric.merge(self, other)

    @classmethod
    def merge_all(cls, parts: Sequence[MetricValue]) -> MetricValue:
        """All parts at once, in time proportional to their number."""
        return parts[0].metric.merge(*parts)

    def compute(self) -> Any:
        """What the metric's own `compute` answers: a tensor, or a dict of them, with a leading dim for lanes."""
        return self.metric.compute(self)

    def psum(self, axis: str) -> MetricValue:
        """The value over all members of `axis`, where the metric's states are sums, means, maxima or minima."""
        return self.metric.psum(self, axis)


class TorchMetric:
    """A torchmetrics metric as pure functions: `init`, `update`, `merge`, `compute`, and `of` for one batch.

    Made by `from_torchmetrics`, once, outside the step. It holds nothing that it has seen; two handles are equal only
    when they are the same object.
    """

    def __init__(self, metric: Metric | MetricCollection, logits: bool = False) -> None:
        self._skeleton = Skeleton(metric)
        self._elsewhere: dict[torch.device, Skeleton] = {}
        self._logits = logits
        self._form = form_of_logits(self._skeleton, logits)
        self._guesses = self._form is not None and not logits

    def __repr__(self) -> str:
        logits = ", logits=True" if self._logits else ""
        return f"lm.metrics.from_torchmetrics({type(self._skeleton.metric).__name__}(...){logits})"

    def __copy__(self) -> TorchMetric:
        return self

    def __deepcopy__(self, _memo: Any) -> TorchMetric:
        return self  # it never changes, and values of a copy would not merge with those of the original

    def init(self) -> MetricValue:
        """The value that has seen nothing; merging it changes nothing."""
        return self._empty(self._skeleton.device, None)

    def _empty(self, device: torch.device, tie: Tensor | None) -> MetricValue:
        states = {slot.key: _start(slot, None, device, tie) if slot.folds else () for slot in self._skeleton.slots}
        none = torch.zeros((), dtype=torch.int64, device=device)
        none = none if tie is None else none + tie
        return MetricValue(states, none, none.clone() if self._guesses else (), self)

    def of(self, /, *args: Any, **kwargs: Any) -> MetricValue:
        """The value of one batch; takes what the metric's `update` takes. States live where its tensors do.

        A batch without rows, as a process may have under `lm.ddp`, is no update: its value is that of `init`.
        """
        return self._run(None, args, kwargs)

    def update(self, value: MetricValue, /, *args: Any, **kwargs: Any) -> MetricValue:
        """`value` and one batch more; `value` itself where that has no rows."""
        self._check(value)
        if value.updates.dim() or any(
            not s.folds and s.join != "list" and len(value.states[s.key]) > 1 for s in self.slots
        ):
            # The metric can go on from one part only; parts side by side gain one.
            return self.merge(value, self._run(None, args, kwargs))
        return self._run(value, args, kwargs)

    def merge(self, value: MetricValue, *others: MetricValue) -> MetricValue:
        """The value of all that the given values have seen, as the metric's own reductions join it.

        Give many at once (as `lm.merge_metrics` does) where the metric keeps lists: two by two copies a list each time.
        """
        parts = (value, *others)
        for part in parts:
            self._check(part)
        if not others:
            return value
        states = {slot.key: _join(slot, [part.states[slot.key] for part in parts]) for slot in self.slots}
        updates = _fold("sum", [part.updates for part in parts])
        as_logits = _fold("sum", [part.as_logits for part in parts]) if self._guesses else ()
        return MetricValue(states, updates, as_logits, self, next((part.notes for part in parts if part.notes), ()))

    def compute(self, value: MetricValue) -> Any:
        """What the metric's own `compute` answers for what `value` has seen."""
        self._check(value)
        if value.updates.dim():
            lanes = [self.compute(tree.map(lambda leaf, i=i: leaf[i], value)) for i in range(len(value.updates))]
            return tree.map(lambda *each: torch.stack([torch.as_tensor(x) for x in each]), *lanes)
        if self._guesses:
            self._check_guesses(value)
        skeleton = self._on(value.updates.device)
        shells = skeleton.live(_count(value.updates), value.notes)
        for slot in skeleton.slots:
            content = value.states[slot.key]
            if slot.join == "list":
                held: Any = list(content)
            else:
                held = content.clone() if slot.folds else slot.whole(content, value.updates.device)
            shells[slot.node].__dict__[slot.name] = held
        with torch.no_grad():
            answer = self._call(shells[0].compute)
        skeleton.retire(shells)
        return answer

    def psum(self, value: MetricValue, axis: str) -> MetricValue:
        """`value` over all members of `axis`."""
        if rules.axis(axis) is None:
            return value
        states = {slot.key: self._psum(slot, value.states[slot.key], axis) for slot in self.slots}
        counts = {"updates": psum(value.updates, axis), "as_logits": psum(value.as_logits, axis)}
        return value.replace(states=states, **counts)  # type: ignore[attr-defined, no-any-return]

    def pack(self, value: MetricValue) -> dict[str, Tensor]:
        """`value` as a flat dict of few tensors, for a checkpoint: each row of tensors becomes one, and its shapes.

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
            raise MetricError(f"{self!r} keeps {names} beside its states, which is no tensor and cannot be saved.")
        packed = {_UPDATES: value.updates, **({_AS_LOGITS: value.as_logits} if self._guesses else {})}
        for slot in self.slots:
            content = value.states[slot.key]
            if slot.folds:
                packed[slot.key] = content
            else:
                packed[slot.key], packed[slot.key + _SHAPES] = _flat(slot.key, content, value.updates)
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> MetricValue:
        """The value that `pack` was given."""
        states: dict[str, Any] = {}
        names = [name for slot in self.slots for name in self._packed_names(slot)]
        for name in [*names, _UPDATES, *([_AS_LOGITS] if self._guesses else [])]:
            if name not in packed:
                raise MetricError(
                    f"{name!r} is missing, so this was not packed by {self!r}; found {', '.join(packed)}."
                )
        for slot in self.slots:
            content = packed[slot.key]
            states[slot.key] = content if slot.folds else _row(content, packed[slot.key + _SHAPES])
        return MetricValue(states, packed[_UPDATES], packed[_AS_LOGITS] if self._guesses else (), self)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The states of the metric, and how their parts join."""
        return self._skeleton.slots

    def _packed_names(self, slot: Slot) -> tuple[str, ...]:
        return (slot.key,) if slot.folds else (slot.key, slot.key + _SHAPES)

    def _run(self, value: MetricValue | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MetricValue:
        given: list[Tensor] = []
        args, kwargs = _detached(args, given), _detached(kwargs, given)
        before = torch.zeros((), dtype=torch.int64) if value is None else value.updates
        if given:
            device = given[0].device
        else:
            device = self._skeleton.device if value is None else before.device
        tie = _tie(given)
        if _without_rows((*args, *kwargs.values())):
            return self._empty(device, tie) if value is None else value
        args, kwargs, outside = self._predictions(args, kwargs)
        skeleton = self._on(device)
        shells = skeleton.live(0, () if value is None else value.notes)
        for slot in skeleton.slots:
            content = None if value is None else value.states[slot.key]
            shells[slot.node].__dict__[slot.name] = _start(slot, content, device, tie)
        with torch.no_grad():
            self._call(shells[0].update, *args, **kwargs)
        states = {slot.key: _content(slot, getattr(shells[slot.node], slot.name)) for slot in skeleton.slots}
        notes = skeleton.retire(shells)
        updates = before.to(device) + 1
        as_logits = outside if value is None or not self._guesses else value.as_logits.to(device) + outside
        return MetricValue(states, updates if tie is None else updates + tie, as_logits, self, notes)

    def _predictions(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any, Any]:
        """The arguments of an update, logits as probabilities; and 1 where torchmetrics will guess that they are such.

        It does where a prediction lies outside [0, 1].
        """
        given = kwargs.get("preds", args[0] if args else None)
        if self._form is None or not isinstance(given, Tensor):
            return args, kwargs, torch.zeros((), dtype=torch.int64) if self._guesses else ()
        if not self._logits:
            return args, kwargs, (~((given >= 0) & (given <= 1)).all() & given.is_floating_point()).to(torch.int64)
        preds = (
            given if not given.is_floating_point() else given.sigmoid() if self._form == "sigmoid" else given.softmax(1)
        )
        return (args, {**kwargs, "preds": preds}, ()) if "preds" in kwargs else ((preds, *args[1:]), kwargs, ())

    def _check_guesses(self, value: MetricValue) -> None:
        """Warn where torchmetrics took predictions for logits in some updates, and for probabilities in others."""
        if rules.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
            return
        guessed, updates = int(value.as_logits), int(value.updates)
        if 0 < guessed < updates:
            warnings.warn(
                f"{self!r}: torchmetrics takes predictions for logits where one of a batch lies outside [0, 1], as in"
                f" {guessed} of {updates} updates, and for probabilities in the others, so the number is not that of"
                " all the data together. For logits write lm.metrics.from_torchmetrics(metric, logits=True); or hand"
                " it probabilities.",
                InexactWarning,
                stacklevel=3,
            )

    def _on(self, device: torch.device) -> Skeleton:
        if device == self._skeleton.device:
            return self._skeleton
        found = self._elsewhere.get(device)
        if found is None:
            # Two threads may both make one; either is as good.
            found = self._elsewhere[device] = Skeleton(self._skeleton.metric, device)
        return found

    def _call(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise MetricError(
                f"{self!r} cannot run under vmap: it needs the value of a tensor in Python, or an operation that vmap"
                " has no rule for. Give the metric validate_args=False (nan_strategy='disable' for an aggregation), or"
                " return what it is made of (logits, labels) from the vmapped function and call `of` outside."
            ) from error

    def _psum(self, slot: Slot, content: Any, axis: str) -> Any:
        if slot.join == "sum":
            return psum(content, axis)
        if slot.join == "max":
            return pmax(content, axis)
        if slot.join == "min":
            return pmin(content, axis)
        if slot.join == "mean":
            return (pmean(slot.whole(content, content[0].device), axis),) if content else ()
        # The one place that a gather over the axis will have to go to.
        raise AxisError(
            f"the state {slot.key!r} of {self!r} is no sum, mean, maximum or minimum, so it cannot be reduced over the"
            f" axis {axis!r}: its parts would have to be gathered. Return the value from the step as it is and let it"
            " be merged there, or use a metric with states of one size (thresholds=100, say)."
        )

    def _check(self, value: Any) -> None:
        if isinstance(value, MetricValue) and value.metric is self:
            return
        if isinstance(value, MetricValue):
            raise MetricError(
                f"this value belongs to another {value.metric!r}. Values merge when one handle made them: call"
                " from_torchmetrics once, outside the step, and use its `of` inside."
            )
        raise MetricError(
            f"{self!r} takes its own values, not {type(value).__name__}. Write: value = metric.of(...) or metric.init()"
        )


def from_torchmetrics(metric: Metric | MetricCollection, *, logits: bool = False) -> TorchMetric:
    """`metric` as pure functions on typed values, equal to torchmetrics on all the data together.

    `handle.of(*args)` in a step is a value as `lm.Mean.of` is: it merges over microbatches, steps and lanes and is
    computed when it is logged. By hand: `init`, `update`, `merge`, `compute`. Parts merge by the metric's own
    reductions, as torchmetrics merges its processes. A `MetricCollection` is one value that computes a dict.

    `metric` is copied and never changed; what it has seen so far is not taken over. In a collection each metric sees
    each batch, unless its compute groups are given, or were found by an update before.

    Binary and multilabel metrics, and multiclass curves, take predictions for logits where one of a batch lies outside
    [0, 1], so batches of one data set may be taken differently; then `compute` gives an `InexactWarning`. With
    `logits=True` predictions are logits in every batch.

    Raises `MetricError` for what is no metric, for one that keeps what it sees outside its states, and for
    `logits=True` where no metric takes logits.

    >>> import lumen as lm, torch, torchmetrics
    >>> accuracy = lm.metrics.from_torchmetrics(torchmetrics.classification.MulticlassAccuracy(3, average="micro"))
    >>> a = accuracy.of(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
    >>> b = accuracy.of(torch.tensor([2]), torch.tensor([0]))
    >>> a.merge(b).compute()
    tensor(0.5000)
    """
    from torchmetrics import Metric, MetricCollection

    if not isinstance(metric, Metric | MetricCollection):
        found = f"the class {metric.__name__}" if isinstance(metric, type) else type(metric).__name__
        raise MetricError(
            f"from_torchmetrics takes a torchmetrics.Metric or MetricCollection, not {found}."
            " Write: lm.metrics.from_torchmetrics(torchmetrics.classification.MulticlassAccuracy(10))"
        )
    return TorchMetric(metric, logits)


def _default(slot: Slot, device: torch.device) -> Tensor:
    assert slot.default is not None
    return slot.default.detach().to(device, copy=True)


def _start(slot: Slot, content: Any, device: torch.device, tie: Tensor | None) -> Any:
    """A state as the metric is to find it: its own copy, since metrics add in place, which varies as `tie` does."""
    if slot.join == "list":
        return list(content or ())
    if not slot.folds:
        content = content[0] if content else None
    start = _default(slot, device) if content is None else content.to(device, copy=True)
    return start if tie is None else start + tie.to(start)


def _without_rows(args: Sequence[Any]) -> bool:
    """Whether no argument of an update has rows, though some could."""
    counts = [count for arg in args if (count := _rows(arg)) is not None]
    return bool(counts) and not any(counts)


def _rows(arg: Any) -> int | None:
    """The rows of an argument: entries along a tensor's first dim, or of a list; None for what has none, as a flag."""
    if isinstance(arg, Tensor):
        return arg.shape[0] if arg.dim() else None
    if isinstance(arg, Mapping):
        return max((count for each in arg.values() if (count := _rows(each)) is not None), default=None)
    return len(arg) if isinstance(arg, list | tuple) else None


def _content(slot: Slot, found: Any) -> Any:
    if slot.join == "list":
        return tuple(found) if isinstance(found, list) else (found,)
    return found if slot.folds else (found,)


def _join(slot: Slot, contents: list[Any]) -> Any:
    if slot.folds:
        return _fold(slot.join, contents)
    return tuple([part for content in contents for part in content])


def _fold(join: str, tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 2:
        return _FOLD_TWO[join](*tensors)
    return _FOLD_MANY[join](torch.stack(tensors))


def _detached(node: Any, given: list[Tensor]) -> Any:
    """The same arguments cut off from autograd; their tensors are put into `given`."""
    kind = type(node)
    if isinstance(node, Tensor):
        given.append(node)
        return node.detach()
    if kind is tuple or kind is list:
        return kind([_detached(each, given) for each in node])
    if kind is dict:
        return {key: _detached(each, given) for key, each in node.items()}
    return node


def _tie(given: list[Tensor]) -> Tensor | None:
    """Under a torch.func transform, a zero that varies as the arguments do.

    Metrics add to their states in place, which vmap allows only where the state varies over the lanes too.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return None
    zero = torch.zeros((), dtype=torch.int64)
    for each in given:
        zero = zero + each.detach().new_zeros((), dtype=torch.int64)
    return zero


def _count(updates: Tensor) -> int:
    """The number of updates where it can be known; torchmetrics warns of a compute that nothing came before."""
    if rules.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return 1
    return int(updates)


def _flat(key: str, row: tuple[Any, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """A row of tensors as one flat tensor and the table of their shapes."""
    kinds = {(each.dtype, each.dim()) if isinstance(each, Tensor) else type(each).__name__ for each in row}
    if len(kinds) > 1 or any(isinstance(kind, str) for kind in kinds):
        raise MetricError(
            f"the state {key!r} cannot be packed: its entries are not tensors of one dtype and number of dims, but"
            f" {', '.join(sorted(map(str, kinds)))}."
        )
    if not row:
        return like.new_zeros(0, dtype=torch.float32), like.new_zeros((0, 0))
    shapes = torch.tensor([each.shape for each in row], dtype=torch.int64)
    return torch.cat([each.reshape(-1) for each in row]), shapes.reshape(len(row), row[0].dim())


def _row(flat: Tensor, shapes: Tensor) -> tuple[Tensor, ...]:
    sizes = [tuple(shape) for shape in shapes.tolist()]
    pieces = flat.split([int(torch.Size(size).numel()) for size in sizes])
    return tuple([piece.reshape(size) for piece, size in zip(pieces, sizes, strict=True)])
