"""What becomes of a loss function's aux where each process has computed that of its own rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import distributed, rules
from lumen.core.buffers import Origin, Undeclared
from lumen.core.metrics import is_value
from lumen.core.primitives import Aux
from lumen.errors import LossError, OrderError, WorldError
from lumen.parallel.comm import collectives
from lumen.parallel.comm.buckets import GradComm
from lumen.parallel.comm.consistency import checksum

_LOWEST = torch.iinfo(torch.int64).min

Finish = Callable[[], dict[int, Tensor]]  # waits, and gives the joined leaves by their places


class BufferChecks:
    """What a parallel transform has to find out about buffers over the steps of a run."""

    def __init__(self, asked: str) -> None:
        self.undeclared = Undeclared(asked)
        self._compared = False

    def compare_synced(self, synced: Sequence[tuple[Origin, Tensor]], wire: GradComm) -> None:
        """Raise `WorldError`, on every process, unless all have the same in buffers that a module makes equal."""
        if self._compared or not synced or rules.is_tracing() or distributed.is_dry_run():
            return
        self._compared = True
        mine = torch.stack([checksum(leaf) for _, leaf in synced])
        found = collectives.all_gather(mine.view(-1), wire.group)().view(wire.size, len(synced), -1)
        differs = (found != found[0]).any(-1).any(0).tolist()
        names = [repr(origin.name) for (origin, _), bad in zip(synced, differs, strict=True) if bad]
        if names:
            raise WorldError(
                f"the rule of {', '.join(names)} is 'sync', so the module makes it equal on every process, but it"
                ' differs. Sum what it is made of, lm.psum(x, "data"), or give it another rule:'
                " lm.pure(net, merge={...})."
            )


class AuxReduction:
    """The aux of all processes, from this one's: buffers by their rules, plain scalars by their mean over rows.

    `rows` is how many this process has; where it has none, `origins` and `aux` are those of rows that only stand in,
    and count nothing. Without `origins` each process keeps the buffers that it has.
    """

    def __init__(self, aux: Any, rows: int, dummy_batch: int, origins: Sequence[Origin] | None, wire: GradComm) -> None:
        self._aux = aux
        self._wire = wire
        self._real = rows > 0
        self._leaves: list[Any] = []
        self._origins: dict[int, Origin] = {}
        self._groups: dict[str, list[int]] = {}
        if aux is None:
            return
        held = len(tree.leaves(aux.buffers)) if isinstance(aux, Aux) else 0
        self._leaves, self._spec = tree.flatten(aux, is_value)
        for place, leaf in enumerate(self._leaves):
            if place >= held:
                if _is_mean(leaf, rows or dummy_batch, aux, place):
                    self._group("mean").append(place)
            elif origins is not None:
                self._origins[place] = origin = origins[place]
                self._group(_group_of(origin, leaf)).append(place)

    def launch(self) -> list[Finish]:
        """Send what does not travel as a sum of floating numbers."""
        sent = [
            self._launch_totals(self._group("total")),
            self._launch_largest([place for rule in ("max", "min", "any") for place in self._group(rule)]),
            self._launch_first(self._group("first")),
            *(self._launch_gather(place) for place in self._group("gather")),
        ]
        return [finish for finish in sent if finish is not None]

    def weighted(self) -> list[Tensor]:
        """The tensors whose mean by rows is taken."""
        return [_wide(self._leaves[place]) for place in self._group("mean")]

    def changes(self) -> list[Tensor]:
        """The changes that are added up."""
        return [_wide(self._leaves[place]) - _wide(self._origins[place].start) for place in self._group("sum")]

    def joined(self, means: Tensor, changes: Tensor, sent: Sequence[Finish]) -> Any:
        """The aux of all processes, from the `means` by rows, the summed `changes`, and what was sent."""
        found = self._pieces(self._group("mean"), means)
        for place, total in self._pieces(self._group("sum"), changes, cast=False).items():
            start = self._origins[place].start
            found[place] = (_wide(start) + total).to(start.dtype)
        for finish in sent:
            found.update(finish())
        found.update({place: self._origins[place].start for place in self._group("frozen")})
        if not found:
            return self._aux
        return self._spec.unflatten([found.get(place, leaf) for place, leaf in enumerate(self._leaves)])

    def check(self, checks: BufferChecks) -> None:
        """Raise where a buffer without a rule has changed, or one is not equal everywhere that should be."""
        checks.undeclared.look(self._beside("undeclared"))
        checks.compare_synced(self._beside("sync"), self._wire)

    def _beside(self, group: str) -> list[tuple[Origin, Tensor]]:
        return [(self._origins[place], self._leaves[place]) for place in self._group(group)]

    def _group(self, name: str) -> list[int]:
        return self._groups.setdefault(name, [])

    def _pieces(self, places: Sequence[int], flat: Tensor, cast: bool = True) -> dict[int, Tensor]:
        leaves = [self._leaves[place] for place in places]
        pieces = flat.split([leaf.numel() for leaf in leaves]) if leaves else ()
        return {
            place: piece.reshape(leaf.shape).to(leaf.dtype, copy=True) if cast else piece.reshape(leaf.shape)
            for place, leaf, piece in zip(places, leaves, pieces, strict=True)
        }

    def _launch_totals(self, places: list[int]) -> Finish | None:
        """Changes of integers, which are added up as such."""
        if not places:
            return None
        changes = [_wide(self._leaves[place]) - _wide(self._origins[place].start) for place in places]
        flat = torch.cat([change.reshape(-1) * self._real for change in changes])
        arrived = self._wire.launch(flat, exact=True)

        def finish() -> dict[int, Tensor]:
            totals = self._pieces(places, arrived(), cast=False)
            starts = {place: self._origins[place].start for place in places}
            return {place: (_wide(starts[place]) + total).to(starts[place].dtype) for place, total in totals.items()}

        return finish

    def _launch_largest(self, places: list[int]) -> Finish | None:
        """The largest and, turned round, the smallest; a NaN on any process comes out."""
        groups: dict[torch.dtype, list[int]] = {}
        for place in places:
            groups.setdefault(_wide_dtype(self._leaves[place].dtype), []).append(place)
        finishes = [self._launch_largest_of(dtype, group) for dtype, group in groups.items()]
        return (lambda: {place: leaf for finish in finishes for place, leaf in finish().items()}) if finishes else None

    def _launch_largest_of(self, dtype: torch.dtype, places: list[int]) -> Finish:
        smallest = [place in self._group("min") for place in places]
        values = [self._turned(_ordered(self._leaves[p]), turn) for p, turn in zip(places, smallest, strict=True)]
        flat = torch.cat([value.reshape(-1) for value in values])
        if dtype.is_floating_point:
            nans = flat.isnan()
            flat = torch.cat([flat.masked_fill(nans, -torch.inf), nans.to(dtype)])
        if not self._real:
            flat = torch.full_like(flat, -torch.inf if dtype.is_floating_point else _LOWEST)
        arrived = self._wire.launch(flat, "max", exact=True)

        def finish() -> dict[int, Tensor]:
            found = arrived()
            if dtype.is_floating_point:
                found, nans = found.chunk(2)
                found = found.masked_fill(nans > 0, torch.nan)
            pieces = self._pieces(places, found, cast=False)
            turned = {p: self._turned(pieces[p], turn) for p, turn in zip(places, smallest, strict=True)}
            return {place: _unordered(value, self._leaves[place].dtype) for place, value in turned.items()}

        return finish

    @staticmethod
    def _turned(x: Tensor, turn: bool) -> Tensor:
        """Numbers in the opposite order; of integers by their bits, which have no sign that overflows."""
        if not turn:
            return x
        return -x if x.is_floating_point() else ~x

    def _launch_first(self, places: list[int]) -> Finish | None:
        """What the first process has that has rows: all others add zeros."""
        if not places:
            return None
        place_from_end = self._wire.size - dist.get_rank(self._wire.group)
        leaves = [self._leaves[place] for place in places]
        mine = leaves[0].new_full((), place_from_end if self._real else 0, dtype=torch.int64)
        is_first = (self._wire.launch(mine.clone(), "max", exact=True)() == mine) & self._real
        groups: dict[torch.dtype, list[int]] = {}
        for place, leaf in zip(places, leaves, strict=True):
            groups.setdefault(_wide_dtype(leaf.dtype), []).append(place)
        sent = []
        for group in groups.values():
            flat = torch.cat([_wide(self._leaves[place]).reshape(-1) for place in group])
            sent.append((group, self._wire.launch(torch.where(is_first, flat, 0), exact=True)))

        def finish() -> dict[int, Tensor]:
            return {at: piece for group, arrived in sent for at, piece in self._pieces(group, arrived()).items()}

        return finish

    def _launch_gather(self, place: int) -> Finish:
        """The rows of all processes in their order."""
        leaf, name = self._leaves[place], self._origins[place].name
        if rules.is_tracing():
            raise OrderError(
                f"lm.compile cannot trace the rule 'gather' of the buffer {name!r}, for which processes ask each other"
                " for their numbers of rows. Leave lm.compile out, or give it another rule."
            )
        leaf = leaf if self._real else leaf[:0]
        counts = [leaf.shape[0]] * self._wire.size
        if not distributed.is_dry_run():
            own = torch.tensor([leaf.shape[0]], device=leaf.device)
            counts = collectives.all_gather(own, self._wire.group)().tolist()
        self._wire.sent += max(counts) * math.prod(leaf.shape[1:]) * leaf.itemsize
        arrived = collectives.all_gather_rows(leaf, counts, self._wire.group)
        return lambda: {place: arrived()}


def _group_of(origin: Origin, leaf: Tensor) -> str:
    """How a buffer is joined: by its rule, a sum of integers as a "total"."""
    if origin.frozen:
        return "frozen"
    if origin.merge is None:
        return "undeclared"
    rule = origin.merge.rule
    if rule not in ("gather", "sync") and leaf.shape != origin.start.shape:
        raise LossError(
            f"the rule of the buffer {origin.name!r} is {rule!r}, but its shape went from"
            f" {tuple(origin.start.shape)} to {tuple(leaf.shape)}. A shape that depends on a rank's rows differs"
            " between ranks: keep its shape, or join the rows of all ranks, lm.pure(net, merge={...: 'gather'})."
        )
    if rule != "sum":
        return rule
    return "sum" if leaf.is_floating_point() else "total"


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(_wide_dtype(x.dtype))


def _ordered(x: Tensor) -> Tensor:
    """The values in their wide dtype, in the same order: an unsigned integer from 2**63 has a negative one's bits."""
    return _wide(x) ^ _LOWEST if x.dtype == torch.uint64 else _wide(x)


def _unordered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: new tensors of `dtype`."""
    return (x ^ _LOWEST if dtype == torch.uint64 else x).to(dtype, copy=True)


def _is_mean(leaf: Any, size: int, aux: Any, place: int) -> bool:
    """Whether a metric is averaged over processes by rows; others must be this process's own by what they are."""
    if not isinstance(leaf, Tensor):
        return False
    if leaf.dim() == 0 and leaf.is_floating_point():
        return True
    if leaf.dim() and leaf.shape[0] == size:
        return False
    name = tree.paths(aux, is_value)[place]
    raise LossError(
        f"aux[{name!r}] is a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}, and it is not clear how the"
        " processes' parts make the whole batch's. Say what it is: lm.Mean.of(x), lm.Sum.of(x), lm.Max.of(x) or"
        " lm.Last(x); and put buffers into lm.Aux(buffers=...)."
    )
