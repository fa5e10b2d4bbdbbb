"""`from_torchmetrics`: convert a `torchmetrics.Metric` to pure functions and a metric value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core.arguments import checked
from lumen.core.collectives import psum
from lumen.core.metrics import Metric as LumenMetric
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.errors import MetricError
from lumen.metrics.arguments import concrete_count, detach, have_no_rows, in_transform, lane_zero_of
from lumen.metrics.logits import convert_predictions, form_of_logits, guessed_as_logits, warn_if_mixed
from lumen.metrics.packing import pack_state, packed_names, unpack_state
from lumen.metrics.states import compute_input, fold, initial_state, merge_states, psum_state, stored_state
from lumen.metrics.template import MetricTemplate, Note, StateSpec

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

_UPDATES = "updates"
_AS_LOGITS = ":as_logits"


@pytree_dataclass
class MetricValue(LumenMetric):
    """The accumulated states of a torchmetrics metric, created by `TorchMetric.of` and merged like any metric.

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
    def merge_all(cls, values: Sequence[MetricValue]) -> MetricValue:
        """Merge all values at once, in time proportional to their number."""
        return values[0].metric.merge(*values)

    def compute(self) -> Any:
        """The result of the metric's own `compute`: a tensor or a dict of tensors, with a leading dim for lanes."""
        return self.metric.compute(self)

    def psum(self, axis: str) -> MetricValue:
        """The value over all members of `axis`; the metric's states must be sums, means, maxima or minima."""
        return self.metric.psum(self, axis)


class TorchMetric:
    """A torchmetrics metric as pure functions: `init`, `update`, `merge`, `compute`, and `of` for one batch.

    Create it once, outside the step, with `from_torchmetrics`. It is stateless. Two of them are equal only if they are
    the same object.
    """

    def __init__(self, metric: Metric | MetricCollection, logits: bool = False) -> None:
        self._template = MetricTemplate(metric)
        self._templates: dict[torch.device, MetricTemplate] = {}
        self._logits = logits
        self._form = form_of_logits(self._template, logits)
        self._guesses = self._form is not None and not logits

    def __repr__(self) -> str:
        logits = ", logits=True" if self._logits else ""
        return f"lm.metrics.from_torchmetrics({type(self._template.metric).__name__}(...){logits})"

    def __copy__(self) -> TorchMetric:
        return self

    def __deepcopy__(self, _memo: Any) -> TorchMetric:
        return self  # immutable; values of a copy would not merge with those of the original

    def init(self) -> MetricValue:
        """The empty value; merging it has no effect."""
        return self._empty(self._template.device, None)

    def _empty(self, device: torch.device, lane_zero: Tensor | None) -> MetricValue:
        states = {
            spec.key: initial_state(spec, None, device, lane_zero) if spec.folds else ()
            for spec in self._template.state_specs
        }
        zero = torch.zeros((), dtype=torch.int64, device=device)
        zero = zero if lane_zero is None else zero + lane_zero
        return MetricValue(states, zero, zero.clone() if self._guesses else (), self)

    def of(self, /, *args: Any, **kwargs: Any) -> MetricValue:
        """The value of one batch, with the arguments of the metric's `update`; states are on the device of its tensors.

        A batch without rows, as a process may have under `lm.ddp`, is not an update: its value is that of `init`.
        """
        return self._update_with(None, args, kwargs)

    def update(self, value: MetricValue, /, *args: Any, **kwargs: Any) -> MetricValue:
        """Update `value` with one batch; a batch without rows returns `value` itself."""
        self._check(value)
        if value.updates.dim() or any(
            not s.folds and s.join != "list" and len(value.states[s.key]) > 1 for s in self.slots
        ):
            # The metric can update one tensor only; collected tensors get another one.
            return self.merge(value, self._update_with(None, args, kwargs))
        return self._update_with(value, args, kwargs)

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
        states = {spec.key: merge_states(spec, [v.states[spec.key] for v in values]) for spec in self.slots}
        updates = fold("sum", [v.updates for v in values])
        as_logits = fold("sum", [v.as_logits for v in values]) if self._guesses else ()
        return MetricValue(states, updates, as_logits, self, next((v.notes for v in values if v.notes), ()))

    def compute(self, value: MetricValue) -> Any:
        """The result of the metric's own `compute` for `value`."""
        self._check(value)
        if value.updates.dim():
            lanes = [self.compute(tree.map(lambda leaf, i=i: leaf[i], value)) for i in range(len(value.updates))]
            return tree.map(lambda *results: torch.stack([torch.as_tensor(x) for x in results]), *lanes)
        if self._guesses and not rules.is_tracing() and not in_transform():
            warn_if_mixed(self, int(value.as_logits), int(value.updates))
        template = self._template_on(value.updates.device)
        copies = template.instantiate(concrete_count(value.updates), value.notes)
        for spec in template.state_specs:
            state = compute_input(spec, value.states[spec.key], value.updates.device)
            copies[spec.node].__dict__[spec.name] = state
        with torch.no_grad():
            result = self._call(copies[0].compute)
        template.release(copies)
        return result

    def psum(self, value: MetricValue, axis: str) -> MetricValue:
        """Reduce `value` over all members of `axis`."""
        if rules.axis(axis) is None:
            return value
        states = {spec.key: psum_state(spec, value.states[spec.key], axis, self) for spec in self.slots}
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
        for spec in self.slots:
            packed |= pack_state(spec, value.states[spec.key], value.updates)
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> MetricValue:
        """Restore the value from the result of `pack`."""
        names = [name for spec in self.slots for name in packed_names(spec)]
        for name in [*names, _UPDATES, *([_AS_LOGITS] if self._guesses else [])]:
            if name not in packed:
                raise MetricError(
                    f"{name!r} is missing, so the dict was not packed by {self!r}; it has {', '.join(packed)}."
                )
        states = {spec.key: unpack_state(spec, packed) for spec in self.slots}
        return MetricValue(states, packed[_UPDATES], packed[_AS_LOGITS] if self._guesses else (), self)

    @property
    def slots(self) -> tuple[StateSpec, ...]:
        """The states of the metric, and how they merge."""
        return self._template.state_specs

    def _update_with(self, value: MetricValue | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> MetricValue:
        tensors: list[Tensor] = []
        args, kwargs = detach(args, tensors), detach(kwargs, tensors)
        count = torch.zeros((), dtype=torch.int64) if value is None else value.updates
        if tensors:
            device = tensors[0].device
        else:
            device = self._template.device if value is None else count.device
        lane_zero = lane_zero_of(tensors)
        if have_no_rows((*args, *kwargs.values())):
            return self._empty(device, lane_zero) if value is None else value
        as_logits: Any = ()
        if self._guesses:
            as_logits = guessed_as_logits(args, kwargs)
            as_logits = as_logits if value is None else value.as_logits.to(device) + as_logits
        elif self._form is not None:
            args, kwargs = convert_predictions(args, kwargs, self._form)
        template = self._template_on(device)
        copies = template.instantiate(0, () if value is None else value.notes)
        for spec in template.state_specs:
            content = None if value is None else value.states[spec.key]
            copies[spec.node].__dict__[spec.name] = initial_state(spec, content, device, lane_zero)
        with torch.no_grad():
            self._call(copies[0].update, *args, **kwargs)
        states = {spec.key: stored_state(spec, getattr(copies[spec.node], spec.name)) for spec in template.state_specs}
        notes = template.release(copies)
        updates = count.to(device) + 1
        return MetricValue(states, updates if lane_zero is None else updates + lane_zero, as_logits, self, notes)

    def _template_on(self, device: torch.device) -> MetricTemplate:
        if device == self._template.device:
            return self._template
        template = self._templates.get(device)
        if template is None:
            # Two threads may both create one; the two are equivalent.
            template = self._templates[device] = MetricTemplate(self._template.metric, device)
        return template

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


@checked
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
