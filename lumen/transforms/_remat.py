"""`lm.remat`: save memory by recomputing activations in the backward pass."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lumen.core import _torch_compat, distributed
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.core.step import StepFn, Transform
from lumen.errors import HyperparameterError
from lumen.transforms._support.activation_budget import BudgetMemory, parse_bytes
from lumen.transforms._support.module_patterns import Pattern, disable_kv_cache, select_modules
from lumen.transforms._support.saved_operations import Save, chooser
from lumen.transforms._support.selective_checkpoint import Application, BudgetedApplication, SelectiveBlocks
from lumen.transforms._support.unapplied import with_apply_rule


class remat(Transform):
    """Recompute the activations of modules in the backward pass instead of storing them (activation checkpointing).

    `pattern` selects the modules: a glob over module names (`"blocks.*"`), a module class, or a predicate
    `(name, module) -> bool`. By default they are the children of the first `nn.ModuleList` or `nn.Sequential`, usually
    the model's repeated blocks. Of nested matches, the outermost is used.

    `save` names operations whose results are kept, and not computed again: "matmuls" (matrix products, convolutions and
    fused attention), "attention" (fused attention alone), a collection of operators such as `[torch.ops.aten.mm]`, or a
    function of an operator. Everything else is recomputed.

    `offload` moves what waits for the backward pass to the host: the inputs of the modules, and what `save` keeps. On a
    GPU the copies run beside the computation, into pinned memory. Params, buffers and inputs without a gradient stay.
    A model on the CPU is on the host already, and `offload` does nothing.

    `budget` chooses what to keep: as many bytes, such as "1.5GiB", as the activations of the modules may take at any
    time, for each application of the model: their inputs, what is kept, and the results of the one module that is
    being recomputed. The first step recomputes everything, and counts for each operation its result's bytes, its
    arithmetic and its memory traffic. From the second step on, the results are kept that save most for each byte, on
    every rank the same. The last module, whose backward pass comes first, is not recomputed: that would free nothing. A
    compiled step is compiled again for it.

    Law: `remat()(step) == step`, bitwise in eager mode, dropout included. Under `lm.compile` dropout masks are stored,
    because the graph would draw new ones in the recomputation. Under `vmap` and other `torch.func` transforms it
    changes nothing, because these record the computation themselves.

    It disables the key-value cache of Hugging Face models, as `use_cache=False` does; training does not use it.

    Raises `PatternError` if no module matches, or if the modules of the first step run none of the operations in
    `save`; `HyperparameterError` for a `save` that names no operator, and, on every rank, for a budget that the inputs
    of the modules and the results of one of them exceed in the first step; `StepError` for `offload` on a device in a
    graph of `lm.compile`.

    Algorithm: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", implemented with
    `torch.utils.checkpoint`; `save`: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models"; `budget`: greedy by cost for each byte, as in a fractional knapsack (Dantzig 1957).

    >>> import lumen as lm
    >>> lm.remat("blocks.*", save="matmuls")
    lm.remat('blocks.*', save='matmuls')
    """

    name = "remat"
    level = "remat"
    reason = "remat changes the forward of modules"

    def __init__(
        self,
        pattern: Pattern | None = None,
        *,
        save: Save | None = None,
        offload: bool = False,
        budget: int | str | None = None,
    ) -> None:
        self.pattern = pattern
        self.save = save
        self.offload = offload
        self.budget = budget
        if budget is not None and (save is not None or offload):
            raise HyperparameterError(
                f"remat(budget={budget!r}) chooses what to keep by itself. Leave save and offload out, or budget."
            )
        self._nbytes = None if budget is None else parse_bytes(budget)
        self._names = None if save is None else chooser(save)

    def _new_memory(self) -> BudgetMemory:
        return BudgetMemory()

    @property
    def key(self) -> Hashable:
        """What is kept, which a compiled step records."""
        return None if self._nbytes is None else self._memory.chosen

    def wrap(self, step: StepFn) -> StepFn:
        """The step with matching modules recomputed."""
        if self._names is None and not self.offload and self._nbytes is None:
            return with_apply_rule(self, step, self._rule)
        blocks = SelectiveBlocks(self._begin)

        def change(module: nn.Module) -> None:
            self._patch(module, blocks)

        def rule(next: Next, call: ApplyCall) -> Any:
            return blocks.rule(next, call, change) if _is_recorded_by_autograd() else next(call)

        return with_apply_rule(self, step, rule)

    def wrap_host(self, step: StepFn) -> StepFn:
        """With a budget: choose what to keep, after the first step."""
        nbytes = self._nbytes
        if nbytes is None:
            return step

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            memory: BudgetMemory = self._memory
            if memory.has_run and memory.chosen is None:
                memory.decide(nbytes, is_shared=self._is_shared)
            result = step(state, batch)
            if not memory.has_run:
                memory.check(nbytes, repr(self), is_shared=self._is_shared)
            memory.has_run = True
            return result

        return run

    @property
    def _is_shared(self) -> bool:
        """Whether several ranks make this step together."""
        transforms = () if self.within is None else self.within.transforms
        is_parallel = any(t.level in ("parallel", "tensor", "pipeline") for t in transforms)
        return is_parallel and not distributed.is_dry_run() and distributed.world_size() > 1

    def _begin(self, model: Any) -> Application | BudgetedApplication:
        if self._nbytes is not None:
            return BudgetedApplication(self._memory, self._nbytes, model, repr(self), is_shared=self._is_shared)
        return Application(self._names, self.offload, repr(self))

    def _rule(self, next: Next, call: ApplyCall) -> Any:
        if not _is_recorded_by_autograd():
            return next(call)
        target = call.target.variant(("remat", self.pattern), self._patch)
        return next(call.replace(target=target))

    def _patch(self, module: nn.Module, selective: SelectiveBlocks | None = None) -> None:
        for block in select_modules(module, self.pattern, f"remat({self.pattern!r})"):
            block.forward = _Checkpointed(block) if selective is None else _SelectivelyCheckpointed(block, selective)
        disable_kv_cache(module)


def _is_recorded_by_autograd() -> bool:
    """Whether activations are stored for a backward pass, by autograd and by no transform of `torch.func`."""
    return torch.is_grad_enabled() and _torch_compat.peek_interpreter_stack() is None


class _Checkpointed:
    """Replaces a module's `forward`, and recomputes it in the backward pass."""

    recomputes = True

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


class _SelectivelyCheckpointed:
    """The same, as the settings of `blocks` say."""

    recomputes = True

    def __init__(self, module: nn.Module, blocks: SelectiveBlocks) -> None:
        self._forward, self._blocks = module.forward, blocks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._blocks.run(self._forward, args, kwargs)
