"""`remat(budget=...)`: which results to keep in so many bytes, from what one step recomputed.

The first step recomputes everything, and counts for each operation what it costs to compute again and the bytes of its
result. Before the second step the results with the highest cost for each byte are chosen, as many as fit beside the
results of one whole block, which its recomputation holds. The block whose backward pass follows its forward pass at
once, usually the last one, holds them then in any case, so it is not recomputed.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from lumen.core import _torch_compat, distributed
from lumen.core.flop_formulas import formulas
from lumen.core.inspect import human_bytes
from lumen.errors import HyperparameterError
from lumen.transforms._support.saved_results import is_keepable, memory_of, tensors_of

_UNITS = {"b": 1, **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}
# How many floating-point operations take the time of moving one byte: a rough figure, as the operations that it must
# tell apart, products and all others, differ by far more.
_FLOPS_PER_BYTE = {"cpu": 10}
_FLOPS_PER_BYTE_OF_A_GPU = 100


class Call(NamedTuple):
    """One call of an operation in the block that a model runs as its `block`-th; `number` such calls were before it."""

    model: int
    block: int
    operation: str
    number: int


class Cost(NamedTuple):
    """What it takes to keep the result of a call, and what it saves: the time of moving so many bytes."""

    nbytes: int
    saved: float


class Choice(NamedTuple):
    """Calls whose results are kept, and blocks that are not recomputed."""

    calls: frozenset[Call]
    kept_blocks: frozenset[tuple[int, int]]


def parse_bytes(budget: int | str) -> int:
    """A number of bytes, written as such or as "1.5GiB".

    Raises `HyperparameterError` for anything else.

    >>> parse_bytes("1.5 GiB"), parse_bytes("200MB"), parse_bytes(4096)
    (1610612736, 200000000, 4096)
    """
    text = str(budget).strip().lower()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text)
    unit = _UNITS.get(match[2] or "b") if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise HyperparameterError(
            f'remat(budget={budget!r}) is not a positive number of bytes. Write budget="1.5GiB", "200MB" or 4096.'
        )
    return int(float(match[1]) * unit)


def choose(costs: Mapping[Call, Cost], nbytes: int) -> frozenset[Call]:
    """The calls whose results to keep in `nbytes`: those that save most for each byte first.

    >>> costs = {Call(0, 0, "mm", 0): Cost(8, 800.0), Call(0, 0, "gelu", 0): Cost(4, 12.0)}
    >>> [call.operation for call in choose(costs, 9)]
    ['mm']
    """
    chosen = set()
    for call, cost in sorted(costs.items(), key=lambda item: (-item[1].saved / item[1].nbytes, item[0])):
        if cost.nbytes <= nbytes:
            nbytes -= cost.nbytes
            chosen.add(call)
    return frozenset(chosen)


class BudgetMemory:
    """What one step recomputed, and the choice that follows; one for each step, beside its state."""

    def __init__(self) -> None:
        self.has_run = False  # whether a step has been measured
        self.chosen: Choice | None = None  # None before the choice
        self.costs: dict[Call, Cost] = {}
        self.inputs: dict[int, int] = {}  # bytes of the blocks' inputs, by model
        self.recomputed: Counter[int] = Counter()  # bytes that a recomputation of the largest block holds, by model
        self.excess = ""  # what is wrong with a budget that the first step exceeded on this rank
        self.last_run: MeasuredBlock | None = None  # the last block that ran forward
        self.recomputed_at_once: dict[tuple[int, int], bool] = {}  # whether each block was, in all of its runs
        self._models: list[weakref.ref[Any]] = []
        self._by_block: dict[tuple[int, int], frozenset[tuple[str, int]]] = {}

    def number_of(self, origin: Any) -> int:
        """The number of a model: the first that is applied is 0."""
        models = [ref() for ref in self._models]
        if origin not in models:
            self._models.append(weakref.ref(origin))
            models.append(origin)
        return models.index(origin)

    def decide(self, nbytes: int, *, is_shared: bool) -> None:
        """Choose what to keep in `nbytes`.

        In a step that ranks share, all take the choice of the one with the largest results.
        """
        kept_blocks = frozenset(block for block, at_once in self.recomputed_at_once.items() if at_once)
        chosen: set[Call] = set()
        for model, inputs in self.inputs.items():
            costs = {c: cost for c, cost in self.costs.items() if c.model == model and c[:2] not in kept_blocks}
            chosen |= choose(costs, nbytes - inputs - self.recomputed[model])
        self.chosen = Choice(frozenset(chosen), kept_blocks)
        if is_shared:
            self.chosen = _largest(sum(cost.nbytes for cost in self.costs.values()), self.chosen)
        by_block = defaultdict(set)
        for call in self.chosen.calls:
            by_block[call.model, call.block].add((call.operation, call.number))
        self._by_block = {block: frozenset(calls) for block, calls in by_block.items()}
        self.costs.clear()
        self.last_run = None

    def check(self, nbytes: int, requested_by: str, *, is_shared: bool) -> None:
        """Raise `HyperparameterError`, on every rank, if the first step exceeded the budget on one of them."""
        least = max((inputs + self.recomputed[model] for model, inputs in self.inputs.items()), default=0)
        if least > nbytes and not self.excess:
            self.excess = (
                f"{requested_by} is less than the {human_bytes(least)} that the inputs of its modules take with the"
                " results of one of them, which its recomputation holds. Give more, or split the batch with"
                " lm.accumulate(k)."
            )
        if is_shared:
            self._raise_together()
        elif self.excess:
            raise HyperparameterError(self.excess)

    def _raise_together(self) -> None:
        messages: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(messages, self.excess)
        rank = next((rank for rank, message in enumerate(messages) if message), None)
        if rank is not None:
            raise HyperparameterError(f"on rank {rank}: {messages[rank]}")

    def keeps(self, model: int, block: int) -> Any:
        """Which results a block keeps."""
        calls = self._by_block.get((model, block), frozenset())
        return lambda func, index: (_name(func), index) in calls


def _largest(nbytes: int, chosen: Choice) -> Choice:
    """The choice of the rank with the largest results."""
    choices: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(choices, (nbytes, sorted(chosen.calls), sorted(chosen.kept_blocks)))
    _, calls, blocks = max(choices)
    return Choice(frozenset(Call(*call) for call in calls), frozenset(blocks))


class MeasuredBlock:
    """A block that keeps nothing, and counts the costs of its recomputation."""

    def __init__(self, memory: BudgetMemory, model: int, block: int) -> None:
        self._memory, self._position = memory, (model, block)
        self._has_run = False

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the block, for the first time or again."""
        memory, position = self._memory, self._position
        if not self._has_run:
            self._has_run, memory.last_run = True, self
            return forward(*args, **kwargs)
        at_once = memory.last_run is self
        memory.recomputed_at_once[position] = at_once and memory.recomputed_at_once.get(position, True)
        counting = _Counting(memory, *position)
        try:
            with counting:
                return forward(*args, **kwargs)
        finally:
            model = position[0]
            memory.recomputed[model] = max(memory.recomputed[model], counting.live_bytes())


class _Counting(_torch_compat.TorchDispatchMode):
    """Counts what each operation of a recomputation costs."""

    supports_higher_order_operators = True

    def __init__(self, memory: BudgetMemory, model: int, block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self._position = memory, (model, block)
        self._calls: Counter[Any] = Counter()
        self._results: list[tuple[StorageWeakRef, int]] = []

    def live_bytes(self) -> int:
        """The bytes of the results that are in use still."""
        return sum(nbytes for storage, nbytes in self._results if not storage.expired())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if is_keepable(func, args, kwargs):
            call = Call(*self._position, _name(func), self._calls[func])
            self._calls[func] += 1
            cost = _cost(func, args, kwargs, out)
            if cost.nbytes:
                self._memory.costs[call] = cost
                storages = {memory_of(tensor): tensor.untyped_storage() for tensor in tensors_of(out)}
                self._results += [(StorageWeakRef(storage), storage.nbytes()) for storage in storages.values()]
        return out


_name = functools.cache(str)


@functools.cache
def _flop_formulas() -> Mapping[Any, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False, custom_mapping=formulas()).flop_registry


def _cost(func: Any, args: Any, kwargs: Any, out: Any) -> Cost:
    results = {memory_of(tensor): tensor for tensor in tensors_of(out)}
    nbytes = sum(tensor.untyped_storage().nbytes() for tensor in results.values())
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of((args, kwargs, out)))
    formula = _flop_formulas().get(getattr(func, "overloadpacket", func))
    flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
    device = next((tensor.device.type for tensor in results.values()), "cpu")
    return Cost(nbytes, moved + flops / _FLOPS_PER_BYTE.get(device, _FLOPS_PER_BYTE_OF_A_GPU))
