"""`lm.remat`: save memory by recomputing activations in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lumen.core import _torch_compat
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.core.step import StepFn, Transform
from lumen.transforms._support.module_patterns import Pattern, disable_kv_cache, select_modules
from lumen.transforms._support.unapplied import with_apply_rule


class remat(Transform):
    """Recompute the activations of modules in the backward pass instead of storing them (activation checkpointing).

    `pattern` selects the modules: a glob over module names (`"blocks.*"`), a module class, or a predicate
    `(name, module) -> bool`. By default they are the children of the first `nn.ModuleList` or `nn.Sequential`, usually
    the model's repeated blocks. Of nested matches, the outermost is used.

    Law: `remat()(step) == step`, bitwise in eager mode, dropout included. Under `lm.compile` dropout masks are stored,
    because the graph would draw new ones in the recomputation. Under `vmap` and other `torch.func` transforms it
    changes nothing, because these record the computation themselves.

    It disables the key-value cache of Hugging Face models, as `use_cache=False` does; training does not use it.

    Raises `PatternError` if no module matches. Algorithm: Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost", implemented with `torch.utils.checkpoint`.

    >>> import lumen as lm
    >>> lm.remat("blocks.*")
    lm.remat('blocks.*')
    """

    name = "remat"
    level = "remat"
    reason = "remat changes the forward of modules"

    def __init__(self, pattern: Pattern | None = None) -> None:
        self.pattern = pattern

    def wrap(self, step: StepFn) -> StepFn:
        """The step with matching modules recomputed."""
        return with_apply_rule(self, step, self._rule)

    def _rule(self, next: Next, call: ApplyCall) -> Any:
        if not torch.is_grad_enabled() or _torch_compat.peek_interpreter_stack() is not None:
            return next(call)
        target = call.target.variant(("remat", self.pattern), self._patch)
        return next(call.replace(target=target))

    def _patch(self, module: nn.Module) -> None:
        for block in select_modules(module, self.pattern, f"remat({self.pattern!r})"):
            block.forward = _Checkpointed(block)
        disable_kv_cache(module)


class _Checkpointed:
    """Replaces a module's `forward`, and recomputes it in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
