"""Buffers of a model that computes a batch in microbatches, on several processes, or by rows under `vmap`.

A loss function returns new buffers in `lm.Aux(buffers=...)`. A `BufferTracker` finds the module and the previous value
of each: microbatches pass buffers on to the next, as a loop does, and those of processes and rows merge by rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, rules
from lumen.core.apply_failure import writes_in_place
from lumen.core.buffer_rules import MEANINGS, SHOWN, Merge, suggested
from lumen.core.buffer_writes import marking
from lumen.core.primitives import ApplyCall, Aux, WrappedLoss
from lumen.core.rules import Next
from lumen.errors import MergeError


@dataclass(slots=True)
class Origin:
    """Where one leaf of `Aux.buffers` comes from.

    `start` is the buffer before the gradient. `changed` is None where only comparing values can decide. A `foreign`
    leaf was returned by no module.
    """

    name: str
    start: Tensor
    merge: Merge | None = None
    changed: bool | None = None
    foreign: bool = False
    frozen: bool = False

    @property
    def is_stepwise(self) -> bool:
        """Whether each microbatch starts from the buffer that the previous one left."""
        return not (self.frozen or self.foreign) and (self.merge is None or self.merge.stepwise)


class BufferTracker:
    """Follows buffers through one gradient: a rule for APPLY that observes the modules that a loss function runs.

    `returnable` are ids of tensors that may be returned unchanged. With `marks`, unwritten buffers are detected in a
    trace. Inside a `vmap` over rows, `lane` is a tensor that differs between them: buffers with a rule are made to
    depend on it, since rows cannot change an unmapped tensor.
    """

    def __init__(self, returnable: Collection[int] = (), marks: bool = False) -> None:
        self.lane: Tensor | None = None
        self._marks = marks
        self.origins: list[Origin] = []
        self._returnable = returnable
        self._active = False
        self._returned: dict[int, tuple[Tensor, Origin]] = {}
        self._read: dict[str, tuple[Tensor, Origin] | None] = {}
        self._carried: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """Start a gradient, before its first microbatch."""
        self.origins = []
        self._carried = {}

    def watching(self, loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
        """`loss_fn`, with the origins of the buffers that it returns recorded."""
        if not has_aux:
            return loss_fn

        def run(*args: Any) -> Any:
            self._active = True
            try:
                out = loss_fn(*args)
                aux = out[1] if type(out) is tuple and len(out) == 2 else None
                self.origins = self._origins(aux.buffers) if isinstance(aux, Aux) and aux.buffers else []
                return out
            finally:
                self._active = False
                self._returned = {}
                self._read = {}

        return WrappedLoss(loss_fn, run, lambda other: self.watching(other, has_aux))

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """The rule for APPLY."""
        if not self._active or not call.buffers:
            return next(call)
        origins = {name: self._origin(call, name, buffer) for name, buffer in call.buffers.items()}
        inputs = {name: self._input_of(origins[name], buffer) for name, buffer in call.buffers.items()}
        outer = unwritten = marking.unwritten
        if unwritten is None and self._marks and rules.is_tracing():  # else an outer tracker collects them
            marking.unwritten = unwritten = {}
        try:
            out, new = next(call.replace(buffers=inputs))
        except RuntimeError as error:
            if self.lane is not None:
                _explain_vmap(error, origins)
            raise
        finally:
            marking.unwritten = outer
        for name, tensor in new.items():
            origin, before = origins[name], self._returned.get(id(call.buffers[name]))
            same = tensor is inputs[name] or (unwritten is not None and id(tensor) in unwritten)
            origin.frozen = origin.frozen and same  # a frozen parameter that the forward pass replaces is like a buffer
            origin.changed = False if same and (before is None or before[1].changed is False) else None
            self._returned[id(tensor)] = tensor, origin
            first = self._read.setdefault(name, (tensor, origin))
            if first is not None:  # two models may have a buffer of one name
                self._read[name] = (tensor, origin) if first[1].start is origin.start else None
        return out, new

    def carry(self, aux: Any) -> None:
        """Let the next microbatch start from the buffers that this one left."""
        if not self.origins or not isinstance(aux, Aux):
            return
        for origin, leaf in zip(self.origins, tree.leaves(aux.buffers), strict=True):
            if origin.is_stepwise and origin.changed is not False:
                self._carried[id(origin.start)] = origin.start, leaf

    def _origin(self, call: ApplyCall, name: str, buffer: Tensor) -> Origin:
        returned = self._returned.get(id(buffer))
        start = buffer if returned is None else returned[1].start
        return Origin(name, start, call.target.merges.get(name), frozen=name in call.target.frozen)

    def _input_of(self, origin: Origin, buffer: Tensor) -> Tensor:
        carried = self._carried.get(id(buffer))
        if carried is not None:
            buffer = carried[1]
        if self.lane is None or origin.merge is None:
            return buffer
        return torch.where(self.lane >= 0, buffer, buffer)

    def _origins(self, buffers: Any) -> list[Origin]:
        before = self.origins
        leaves = tree.leaves(buffers)
        origins = []
        for index, leaf in enumerate(leaves):
            returned = self._returned.get(id(leaf))
            origin = self._origin_of_other(buffers, index, leaf, before) if returned is None else returned[1]
            origins.append(origin)
            old = before[index] if index < len(before) else origin
            if old.start is origin.start and old.changed is not False:  # by an earlier microbatch
                origin.changed = old.changed
        return origins

    def _origin_of_other(self, buffers: Any, index: int, leaf: Any, before: Sequence[Origin]) -> Origin:
        """The origin of a leaf that no module returned: an old buffer, or one that the loss function computed."""
        path = tree.paths(buffers)[index]
        by_name = self._read.get(path)
        if by_name is not None:
            tensor, origin = by_name
            same = leaf is origin.start or (origin.changed is False and _is_alias(leaf, tensor))
            return Origin(
                origin.name, origin.start, origin.merge, False if same else None, frozen=origin.frozen and same
            )
        return Origin(path, leaf, changed=self._is_new(index, leaf, before), foreign=True)

    def _is_new(self, index: int, leaf: Any, before: Sequence[Origin]) -> bool | None:
        """Whether a foreign leaf differs between microbatches; None for the first of them."""
        if self.lane is not None:
            return _is_mapped(leaf)
        if self._returnable:
            return id(leaf) not in self._returnable
        if not before:
            return None
        return not (index < len(before) and before[index].start is leaf) or before[index].changed is True


def _is_alias(leaf: Any, other: Tensor) -> bool:
    """Whether a tensor is the other one, or an alias such as its detached form."""
    if _torch_compat.peek_interpreter_stack() is not None or leaf.shape != other.shape:
        return False
    return bool(
        _torch_compat.storage_id(leaf.untyped_storage()) == _torch_compat.storage_id(other.untyped_storage())
        and leaf.dtype == other.dtype
    )


def _is_mapped(leaf: Any) -> bool:
    """Whether a tensor differs between the rows of the innermost `vmap`."""
    while _torch_compat.is_gradtrackingtensor(leaf):
        leaf = _torch_compat.get_unwrapped(leaf)
    return bool(_torch_compat.is_batchedtensor(leaf))


def merge_microbatches(origin: Origin, leaves: Sequence[Any], weighted: Callable[[], Tensor]) -> Any:
    """The buffer after all microbatches, whose results are `leaves`."""
    if origin.frozen:
        return origin.start
    if origin.foreign:
        if origin.changed:
            raise MergeError(
                f"lm.Aux(buffers=...) has a leaf {origin.name!r} that no module returned in state.apply, so Lumen does"
                " not know how to merge those of the microbatches. Make it a buffer of the module,"
                f" self.register_buffer({origin.name!r}, ...), or report it in metrics: lm.Sum.of(x), lm.Last(x)."
            )
        return leaves[0]
    if origin.is_stepwise:
        return leaves[-1]
    assert origin.merge is not None
    if origin.merge.rule == "mean":
        return weighted()
    return torch.stack(list(leaves)).amax(0) if origin.merge.rule == "max" else leaves[0]


def merge_rows(origin: Origin, rows: Tensor) -> Tensor:
    """The buffer of all rows, from those of single rows, stacked, which all started from `origin.start`."""
    start, rule = origin.start, None if origin.merge is None else origin.merge.rule
    if origin.frozen:
        return start
    if rule == "sum":
        return start + (rows - start).sum(0, dtype=start.dtype)
    if rule == "mean":
        return start + (rows - start).mean(0)
    if rule == "gather":
        return rows.flatten(0, 1)
    if rule in ("max", "min"):
        return rows.amax(0) if rule == "max" else rows.amin(0)
    return rows.any(0) if rule == "any" else rows[0]


def _explain_vmap(error: RuntimeError, origins: Mapping[str, Origin]) -> None:
    """Raise `MergeError` with the buffers that need a rule, where rows failed to change one of them in place."""
    if not writes_in_place(error):
        return
    free = [origin for origin in origins.values() if origin.merge is None and not origin.frozen]
    if free:
        raise MergeError(
            f"{str(error).splitlines()[0]} The model seems to change a buffer row by row that has no rule; these have"
            f" none: {', '.join(repr(origin.name) for origin in free[:SHOWN])}. Declare how rows merge:"
            f" lm.pure(net, merge={{{free[0].name!r}: {suggested(free[0].start)!r}}}). {MEANINGS}."
        ) from error
