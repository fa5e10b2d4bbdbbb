"""Detects changes of buffers that have no merge rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lumen.core import distributed, rules
from lumen.core.buffer_rules import MEANINGS, SHOWN, described, suggested
from lumen.core.buffers import Origin
from lumen.core.dtypes import as_bytes
from lumen.errors import MergeError


class Undeclared:
    """Compares buffers without a rule with what they were, and raises `MergeError` for one that has changed.

    On an accelerator changes accumulate on the device, and are read back at the 1st, 2nd, 4th, 8th ... look only.
    """

    def __init__(self, transform: str) -> None:
        self._transform = transform
        self._looks = 0
        self._noted: dict[tuple[str, ...], Tensor] = {}

    def look(self, buffers: Sequence[tuple[Origin, Tensor]], rows: bool = False) -> None:
        """Compare buffers without a rule with their new values; with `rows`, with those of all rows, stacked."""
        buffers = [(origin, new) for origin, new in buffers if origin.changed is not False and new is not origin.start]
        if not buffers or distributed.is_dry_run():
            return
        if rules.is_tracing() or any(origin.changed for origin, _ in buffers):
            # A trace has no values, but leaves only buffers that were written to.
            raise self._error([origin for origin, _ in buffers if origin.changed or rules.is_tracing()])
        self._looks += 1
        if all(new.device.type == "cpu" for _, new in buffers):
            changed = [origin for origin, new in buffers if not _equal(origin.start, new, rows)]
        else:
            changed = self._changed_on_device(buffers, rows)
        if changed:
            raise self._error(changed)

    def _changed_on_device(self, buffers: Sequence[tuple[Origin, Tensor]], rows: bool) -> list[Origin]:
        """The buffers that changed since the device was last read; none where it is not read now."""
        names = tuple(origin.name for origin, _ in buffers)
        pairs = [_alike(origin.start, new, rows) for origin, new in buffers]
        if None in pairs:  # another shape
            return [origin for (origin, _), pair in zip(buffers, pairs, strict=True) if pair is None]
        old, new = (torch.cat([as_bytes(x) for x in side]) for side in zip(*(p for p in pairs if p), strict=True))
        changed = (old != new).any() if names not in self._noted else self._noted[names] | (old != new).any()
        self._noted[names] = changed
        if self._looks & (self._looks - 1) or not self._noted.pop(names):
            return []
        differing = [
            origin
            for (origin, new), pair in zip(buffers, pairs, strict=True)
            if pair and not torch.equal(*map(as_bytes, pair))
        ]
        return differing or [origin for origin, _ in buffers]  # it was another step

    def _error(self, changed: Sequence[Origin]) -> MergeError:
        listed = ", ".join(f"{origin.name!r} ({described(origin.start)})" for origin in changed[:SHOWN])
        line = ", ".join(f"{origin.name!r}: {suggested(origin.start)!r}" for origin in changed[:SHOWN])
        if any(origin.foreign for origin in changed):
            return MergeError(
                f"lm.Aux(buffers=...) has leaves that no module returned in state.apply: {listed}."
                f" {self._transform} cannot merge them. Make them buffers of the module, self.register_buffer(...),"
                " or report them in metrics: lm.Sum.of(x), lm.Last(x)."
            )
        return MergeError(
            f"the loss changed a buffer that has no rule, {listed}, and {self._transform} does not know how to merge"
            f" it. Declare a rule: lm.pure(net, merge={{{line}}}), or lm.TrainState.create(net, tx, merge={{{line}}})."
            f" {MEANINGS}."
        )


def _equal(old: Tensor, new: Tensor, rows: bool) -> bool:
    """Whether two buffers are equal in all bits."""
    pair = _alike(old, new, rows)
    return pair is not None and torch.equal(as_bytes(pair[0]), as_bytes(pair[1]))


def _alike(old: Tensor, new: Tensor, rows: bool) -> tuple[Tensor, Tensor] | None:
    """Two buffers broadcast to one shape, where `new` may be stacked `rows`; None where shapes or dtypes differ."""
    if rows:  # once, where all rows are the same memory
        new = new[:1] if not new.stride(0) else new
        old = old.expand_as(new) if old.shape == new.shape[1:] else old
    return None if old.shape != new.shape or old.dtype != new.dtype else (old, new)
