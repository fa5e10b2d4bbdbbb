"""`lm.remat`: save memory by recomputing activations in the backward pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lumen.core import _torch_compat
from lumen.core._torch_compat import in_make_fx
from lumen.core.draws import keeping_draws, repeating_draws
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
    """Replaces a module's `forward`, and recomputes it in the backward pass with the same params and buffers.

    By then `Apply.run` has removed them from the skeleton. Buffers are copied before the call, so that the
    recomputation neither reads nor repeats its changes to them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._forward = module.forward
        self._slots: list[tuple[dict[str, Any], str, bool]] = [
            (table, key, table is _torch_compat.own_buffers(sub))
            for sub in module.modules()
            for table in (_torch_compat.own_params(sub), _torch_compat.own_buffers(sub))
            for key in table
            if table[key] is not None
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        originals = [table[key].clone() if buffer else table[key] for table, key, buffer in self._slots]
        called = False
        # A graph would draw new random numbers in the recomputation, whatever the states of the generators.
        draws: list[Any] | None = [] if in_make_fx() else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            if not called:
                called = True
                with nullcontext() if draws is None else keeping_draws(draws):
                    return self._forward(*args, **kwargs)
            with nullcontext() if draws is None else repeating_draws(draws):
                return self._recompute(originals, args, kwargs)

        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def _recompute(self, originals: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current = [table[key] for table, key, _ in self._slots]
        try:
            for (table, key, buffer), tensor in zip(self._slots, originals, strict=True):
                table[key] = tensor.clone() if buffer else tensor
            return self._forward(*args, **kwargs)
        finally:
            for (table, key, _), tensor in zip(self._slots, current, strict=True):
                table[key] = tensor
