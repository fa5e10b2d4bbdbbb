"""Blocks that are recomputed in part, or from inputs on the host, and a check that they keep what was asked for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumen.core import _torch_compat, rules
from lumen.core.inspect import human_bytes
from lumen.core.primitives import ApplyCall
from lumen.core.recompute import TensorPlacement
from lumen.core.rules import Next
from lumen.errors import HyperparameterError, PatternError
from lumen.transforms._support.activation_budget import BudgetMemory, MeasuredBlock
from lumen.transforms._support.host_offload import HostOffload
from lumen.transforms._support.saved_operations import Operator, operator_name
from lumen.transforms._support.saved_results import OnDevice, SavedResults, memory_of, tensors_of


class SelectiveBlocks:
    """The recomputed blocks of one step; `begin(model)` makes what one application of a model needs."""

    def __init__(self, begin: Callable[[Any], Application | BudgetedApplication]) -> None:
        self._begin = begin
        self._running = threading.local()

    def __deepcopy__(self, _memo: Any) -> SelectiveBlocks:
        return self  # copies of a model share its settings

    def rule(self, next: Next, call: ApplyCall, change: Callable[[nn.Module], None]) -> Any:
        """APPLY: apply the model with the blocks that `change` wraps."""
        target = call.target.variant(("remat", self), change)
        application = self._begin(call.target.origin)
        before, self._running.application = self._application(), application
        try:
            result = next(call.replace(target=target))
        finally:
            self._running.application = before
        application.check()
        return result

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one block, and have it recomputed in the backward pass."""
        application = self._application()
        if application is None:  # where a model's own checkpoint recomputes
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return application.run(forward, args, kwargs)

    def _application(self) -> Application | BudgetedApplication | None:
        """The application of a model that is running in this thread."""
        return getattr(self._running, "application", None)


class Application:
    """One application of a model, whose blocks keep the results of the operations that `names` names.

    With `offload`, these and the inputs of blocks wait on the host.
    """

    def __init__(self, names: Callable[[Operator], bool] | None, offload: bool, requested_by: str) -> None:
        self._names, self._offloads, self._requested_by = names, offload, requested_by
        self._operations: dict[Operator, bool] = {}

    @functools.cached_property
    def _host(self) -> HostOffload | None:
        return HostOffload(_model_memory()) if self._offloads else None

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block."""
        host = self._host
        results = SavedResults(self._keeps, host or OnDevice())
        run = functools.partial(_run, results, forward, len(args), tuple(kwargs))
        inputs = (*args, *kwargs.values())  # all by position: others are saved past all hooks
        if host is None:
            return checkpoint(run, *inputs, use_reentrant=False)
        with torch.autograd.graph.saved_tensors_hooks(host.pack_input, host.unpack_input):
            out = checkpoint(run, *inputs, use_reentrant=False)
        host.wait()
        return out

    def _keeps(self, operator: Operator, index: int) -> bool:
        if self._names is None:
            return False
        if operator not in self._operations:
            self._operations[operator] = self._names(operator)
        return self._operations[operator]

    def check(self) -> None:
        """Raise `PatternError` if blocks ran and keep nothing."""
        if self._operations and not any(self._operations.values()):
            ran = ", ".join(sorted({operator_name(operator) for operator in self._operations}))
            raise PatternError(
                f"{self._requested_by} names none of the operations that its modules ran: {ran}. Name one of them in"
                " save, or leave save out to recompute everything."
            )


class BudgetedApplication:
    """One application of a model, whose blocks keep what fits into `nbytes`, or measure it if nothing is chosen yet."""

    def __init__(self, memory: BudgetMemory, nbytes: int, model: Any, requested_by: str, *, is_shared: bool) -> None:
        self._memory, self._nbytes, self._requested_by = memory, nbytes, requested_by
        self._is_shared = is_shared
        self._model = memory.number_of(model)
        self._blocks = 0
        self._inputs: dict[int, int] = {}  # bytes by memory

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block."""
        block, self._blocks = self._blocks, self._blocks + 1
        chosen = self._memory.chosen
        runs: MeasuredBlock | SavedResults
        if chosen is not None and (self._model, block) in chosen.kept_blocks:
            return forward(*args, **kwargs)
        if chosen is None:
            self._note_inputs((args, kwargs))
            runs = MeasuredBlock(self._memory, self._model, block)
        else:
            runs = SavedResults(self._memory.keeps(self._model, block), OnDevice())
        return checkpoint(functools.partial(runs.run, forward), *args, use_reentrant=False, **kwargs)

    def _note_inputs(self, inputs: Any) -> None:
        tensors = {memory_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors_of(inputs)}
        exempt = _model_memory()
        self._inputs |= {memory: nbytes for memory, nbytes in tensors.items() if memory not in exempt}

    def check(self) -> None:
        """Raise `HyperparameterError` if the inputs of blocks, which are kept in any case, exceed the budget.

        In a step that ranks share it is only noted: the others may be waiting for this rank's gradients.
        """
        if self._memory.chosen is not None:
            return
        nbytes = sum(self._inputs.values())
        self._memory.inputs[self._model] = max(nbytes, self._memory.inputs.get(self._model, 0))
        if nbytes <= self._nbytes:
            return
        self._memory.excess = (
            f"{self._requested_by} is less than the {human_bytes(nbytes)} that the inputs of its {self._blocks}"
            " modules take, from which everything else is recomputed. Give more, split the batch with"
            " lm.accumulate(k), or move the inputs to the host with lm.remat(offload=True) in place of a budget."
        )
        if not self._is_shared:
            raise HyperparameterError(self._memory.excess)


def _run(results: SavedResults, forward: Callable[..., Any], count: int, names: tuple[str, ...], *values: Any) -> Any:
    return results.run(forward, *values[:count], **dict(zip(names, values[count:], strict=True)))


def _model_memory() -> frozenset[int]:
    """The memory of the params and buffers of the models that are running."""
    slots = [slot for capture, *args in rules.stack.forwards if capture is TensorPlacement for slot in args[0]]
    kinds = (Tensor, nn.Parameter, _torch_compat.FakeTensor)  # proxies for params that are elsewhere have no memory
    return frozenset(memory_of(table[key]) for table, key, _ in slots if type(table[key]) in kinds)
