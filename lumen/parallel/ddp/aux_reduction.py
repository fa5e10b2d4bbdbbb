"""Reduces a loss function's aux over ranks, each of which has computed it for its own rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumen import tree
from lumen.core import distributed, rules
from lumen.core.buffers import Origin
from lumen.core.metrics import is_value
from lumen.core.primitives import Aux
from lumen.core.undeclared_buffers import Undeclared
from lumen.errors import LossError, OrderError, WorldError
from lumen.parallel.comm import collectives
from lumen.parallel.comm.buckets import GradComm
from lumen.parallel.comm.consistency import checksum

_LOWEST = torch.iinfo(torch.int64).min

Finish = Callable[[], dict[int, Tensor]]  # waits, and returns reduced leaves by index


class BufferChecks:
    """Checks of buffers that a parallel transform makes over the steps of a run."""

    def __init__(self, transform: str) -> None:
        self.undeclared = Undeclared(transform)
        self._compared = False

    def compare_synced(self, synced: Sequence[tuple[Origin, Tensor]], comm: GradComm) -> None:
        """Raise `WorldError`, on every rank, unless buffers that a module synchronizes are equal on all ranks."""
        if self._compared or not synced or rules.is_tracing() or distributed.is_dry_run():
            return
        self._compared = True
        own_sums = torch.stack([checksum(leaf) for _, leaf in synced])
        all_sums = collectives.all_gather(own_sums.view(-1), comm.group)().view(comm.size, len(synced), -1)
        differs = (all_sums != all_sums[0]).any(-1).any(0).tolist()
        names = [repr(origin.name) for (origin, _), bad in zip(synced, differs, strict=True) if bad]
        if names:
            raise WorldError(
                f"the rule of {', '.join(names)} is 'sync', so the module must make it equal on every rank, but it"
                ' differs. Compute it from sums over ranks, lm.psum(x, "data"), or give it another rule:'
                " lm.pure(net, merge={...})."
            )


class AuxReduction:
    """The reduction of one aux: buffers by their rules, plain scalars by their mean over rows.

    `rows` is the number of this rank's rows. Without any, `origins` and `aux` come from the dummy batch, and count
    nothing. Without `origins` each rank keeps its own buffers.
    """

    def __init__(self, aux: Any, rows: int, dummy_rows: int, origins: Sequence[Origin] | None, comm: GradComm) -> None:
        self._aux = aux
        self._comm = comm
        self._real = rows > 0
        self._leaves: list[Any] = []
        self._origins: dict[int, Origin] = {}
        self._groups: dict[str, list[int]] = {}
        if aux is None:
            return
        buffer_count = len(tree.leaves(aux.buffers)) if isinstance(aux, Aux) else 0
        self._leaves, self._spec = tree.flatten(aux, is_value)
        for index, leaf in enumerate(self._leaves):
            if index >= buffer_count:
                if _is_mean(leaf, rows or dummy_rows, aux, index):
                    self._group("mean").append(index)
            elif origins is not None:
                self._origins[index] = origin = origins[index]
                self._group(_group_of(origin, leaf)).append(index)

    def launch(self) -> list[Finish]:
        """Start the reductions that are not sums of floating-point numbers."""
        finishes = [
            self._launch_totals(self._group("total")),
            self._launch_largest([index for rule in ("max", "min", "any") for index in self._group(rule)]),
            self._launch_first(self._group("first")),
            *(self._launch_gather(index) for index in self._group("gather")),
        ]
        return [finish for finish in finishes if finish is not None]

    def weighted(self) -> list[Tensor]:
        """The tensors that are averaged by rows."""
        return [_wide(self._leaves[index]) for index in self._group("mean")]

    def changes(self) -> list[Tensor]:
        """The changes that are summed."""
        return [_wide(self._leaves[index]) - _wide(self._origins[index].start) for index in self._group("sum")]

    def joined(self, means: Tensor, changes: Tensor, finishes: Sequence[Finish]) -> Any:
        """The reduced aux, from the `means` by rows, the summed `changes`, and the reductions that were started."""
        joined = self._split(self._group("mean"), means)
        for index, total in self._split(self._group("sum"), changes, cast=False).items():
            start = self._origins[index].start
            joined[index] = (_wide(start) + total).to(start.dtype)
        for finish in finishes:
            joined.update(finish())
        joined.update({index: self._origins[index].start for index in self._group("frozen")})
        if not joined:
            return self._aux
        return self._spec.unflatten([joined.get(index, leaf) for index, leaf in enumerate(self._leaves)])

    def check(self, checks: BufferChecks) -> None:
        """Raise where a buffer without a rule has changed, or where one with the rule "sync" differs between ranks."""
        checks.undeclared.look(self._pairs("undeclared"))
        checks.compare_synced(self._pairs("sync"), self._comm)

    def _pairs(self, group: str) -> list[tuple[Origin, Tensor]]:
        return [(self._origins[index], self._leaves[index]) for index in self._group(group)]

    def _group(self, name: str) -> list[int]:
        return self._groups.setdefault(name, [])

    def _split(self, indices: Sequence[int], flat: Tensor, cast: bool = True) -> dict[int, Tensor]:
        leaves = [self._leaves[index] for index in indices]
        blocks = flat.split([leaf.numel() for leaf in leaves]) if leaves else ()
        return {
            index: block.reshape(leaf.shape).to(leaf.dtype, copy=True) if cast else block.reshape(leaf.shape)
            for index, leaf, block in zip(indices, leaves, blocks, strict=True)
        }

    def _launch_totals(self, indices: list[int]) -> Finish | None:
        """Changes of integers, which are summed as integers."""
        if not indices:
            return None
        changes = [_wide(self._leaves[index]) - _wide(self._origins[index].start) for index in indices]
        flat = torch.cat([change.reshape(-1) * self._real for change in changes])
        wait = self._comm.launch(flat, exact=True)

        def finish() -> dict[int, Tensor]:
            totals = self._split(indices, wait(), cast=False)
            starts = {index: self._origins[index].start for index in indices}
            return {index: (_wide(starts[index]) + total).to(starts[index].dtype) for index, total in totals.items()}

        return finish

    def _launch_largest(self, indices: list[int]) -> Finish | None:
        """The largest values and, negated, the smallest; a NaN on any rank is the result."""
        groups: dict[torch.dtype, list[int]] = {}
        for index in indices:
            groups.setdefault(_wide_dtype(self._leaves[index].dtype), []).append(index)
        finishes = [self._launch_largest_of(dtype, group) for dtype, group in groups.items()]
        return (lambda: {index: leaf for finish in finishes for index, leaf in finish().items()}) if finishes else None

    def _launch_largest_of(self, dtype: torch.dtype, indices: list[int]) -> Finish:
        smallest = [index in self._group("min") for index in indices]
        values = [self._turned(_ordered(self._leaves[p]), turn) for p, turn in zip(indices, smallest, strict=True)]
        flat = torch.cat([value.reshape(-1) for value in values])
        if dtype.is_floating_point:
            nans = flat.isnan()
            flat = torch.cat([flat.masked_fill(nans, -torch.inf), nans.to(dtype)])
        if not self._real:
            flat = torch.full_like(flat, -torch.inf if dtype.is_floating_point else _LOWEST)
        wait = self._comm.launch(flat, "max", exact=True)

        def finish() -> dict[int, Tensor]:
            largest = wait()
            if dtype.is_floating_point:
                largest, nans = largest.chunk(2)
                largest = largest.masked_fill(nans > 0, torch.nan)
            blocks = self._split(indices, largest, cast=False)
            turned = {p: self._turned(blocks[p], turn) for p, turn in zip(indices, smallest, strict=True)}
            return {index: _unordered(value, self._leaves[index].dtype) for index, value in turned.items()}

        return finish

    @staticmethod
    def _turned(x: Tensor, turn: bool) -> Tensor:
        """The values in reverse order; integers by their bits, as the smallest has no negative."""
        if not turn:
            return x
        return -x if x.is_floating_point() else ~x

    def _launch_first(self, indices: list[int]) -> Finish | None:
        """The values of the first rank that has rows: all others add zeros."""
        if not indices:
            return None
        rank_from_end = self._comm.size - dist.get_rank(self._comm.group)
        leaves = [self._leaves[index] for index in indices]
        own_rank = leaves[0].new_full((), rank_from_end if self._real else 0, dtype=torch.int64)
        is_first = (self._comm.launch(own_rank.clone(), "max", exact=True)() == own_rank) & self._real
        groups: dict[torch.dtype, list[int]] = {}
        for index, leaf in zip(indices, leaves, strict=True):
            groups.setdefault(_wide_dtype(leaf.dtype), []).append(index)
        in_flight = []
        for group in groups.values():
            flat = torch.cat([_wide(self._leaves[index]).reshape(-1) for index in group])
            in_flight.append((group, self._comm.launch(torch.where(is_first, flat, 0), exact=True)))

        def finish() -> dict[int, Tensor]:
            return {i: block for group, wait in in_flight for i, block in self._split(group, wait()).items()}

        return finish

    def _launch_gather(self, index: int) -> Finish:
        """The rows of all ranks in rank order."""
        leaf, name = self._leaves[index], self._origins[index].name
        if rules.is_tracing():
            raise OrderError(
                f"lm.compile cannot trace the rule 'gather' of the buffer {name!r}, for which ranks exchange their"
                " numbers of rows. Leave lm.compile out, or give it another rule."
            )
        leaf = leaf if self._real else leaf[:0]
        counts = [leaf.shape[0]] * self._comm.size
        if not distributed.is_dry_run():
            own_count = torch.tensor([leaf.shape[0]], device=leaf.device)
            counts = collectives.all_gather(own_count, self._comm.group)().tolist()
        self._comm.bytes_sent += max(counts) * math.prod(leaf.shape[1:]) * leaf.itemsize
        wait = collectives.all_gather_rows(leaf, counts, self._comm.group)
        return lambda: {index: wait()}


def _group_of(origin: Origin, leaf: Tensor) -> str:
    """How a buffer is reduced: by its rule, a sum of integers as a "total"."""
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
    """The values in their wide dtype, in the same order: an unsigned integer from 2**63 on has a negative's bits."""
    return _wide(x) ^ _LOWEST if x.dtype == torch.uint64 else _wide(x)


def _unordered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse: new tensors of `dtype`."""
    return (x ^ _LOWEST if dtype == torch.uint64 else x).to(dtype, copy=True)


def _is_mean(leaf: Any, size: int, aux: Any, index: int) -> bool:
    """Whether a metric is averaged over ranks by rows; others must belong to this rank's rows by their type."""
    if not isinstance(leaf, Tensor):
        return False
    if leaf.dim() == 0 and leaf.is_floating_point():
        return True
    if leaf.dim() and leaf.shape[0] == size:
        return False
    name = tree.paths(aux, is_value)[index]
    raise LossError(
        f"aux[{name!r}] is a tensor of shape {tuple(leaf.shape)} and {leaf.dtype}, and it is not clear how to reduce it"
        " over ranks. Declare it: lm.Mean.of(x), lm.Sum.of(x), lm.Max.of(x) or lm.Last(x). Put buffers into"
        " lm.Aux(buffers=...)."
    )
