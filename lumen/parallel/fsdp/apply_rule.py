"""APPLY of fsdp at stage 3: the model runs on shards, and its units gather their params."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lumen.core import _torch_compat, rules
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.errors import ParamsError
from lumen.parallel.ddp.grad_reduction import DataParallelRule
from lumen.parallel.fsdp.forward_pass import ForwardPass, RecomputedPass, register_unit_hooks
from lumen.parallel.fsdp.frozen_params import shards_of
from lumen.parallel.fsdp.grad_reduction import unit_reducer
from lumen.parallel.fsdp.runtime import FSDPRuntime
from lumen.parallel.fsdp.shard import Shapes, ShardLayout
from lumen.parallel.fsdp.sharded_states import ShardedStates
from lumen.parallel.fsdp.unshard import UnshardContext
from lumen.parallel.lazy_param import LazyParam, unsharded


def apply_sharded(
    runtime: FSDPRuntime, states: ShardedStates, rule: DataParallelRule, next: Next, call: ApplyCall
) -> Any:
    """Run the model through `rule`, which tracks its buffers, on shards of its params.

    In a loss function the shards of frozen params are returned as the buffers that they are to the rules inside. The
    step gets their proxies.
    """
    frozen = states.frozen
    if frozen is None:
        return rule.apply(lambda inner: _run_units(runtime, states, next, inner), call)
    call = call.replace(buffers=shards_of(call.buffers))
    out, buffers = rule.apply(lambda inner: _run_units(runtime, states, next, inner), call)
    return out, buffers if runtime.contexts else frozen.proxies_of(buffers)


def _run_units(runtime: FSDPRuntime, states: ShardedStates, next: Next, call: ApplyCall) -> Any:
    """Put the params' shards into the model, and gather them where they are used."""
    plans = states.of_model(call.target, call.params)
    if plans is None:  # another model than those that are sharded
        return next(call.replace(params={name: unsharded(p) for name, p in call.params.items()}))
    shapes, layout = plans.shapes, plans.layout
    context, shards, proxies = _shards_of(call.params)
    full: frozenset[str] = frozenset()
    if len(proxies) < len(shards):
        full = _full_names({name: p for name, p in shards.items() if name not in proxies}, shapes, layout)
    frozen: dict[str, Tensor] = {}
    if plans.frozen:
        frozen = {name: b for name, b in call.buffers.items() if name in plans.frozen}
        proxies |= {} if states.frozen is None else states.frozen.known(frozen)
        full |= _full_names({n: b for n, b in frozen.items() if n not in proxies}, plans.frozen, layout)
    if _torch_compat.peek_interpreter_stack() is not None:
        _check_unwrapped(shards)
        context = context or runtime.context(plans, unit_reducer(layout))
        gathered = context.unshard_all({name: p for name, p in (shards | frozen).items() if name not in full})
        return _run_full(next, call, shards, gathered)
    units = runtime.units(call.target, shapes)
    if call.target.frozen:
        full |= call.target.frozen - plans.frozen.keys()
    target = call.target.variant(("fsdp", runtime), register_unit_hooks(runtime.passes, units))
    if context is None:
        context = runtime.context_beside(plans, unit_reducer(layout))
    forward = ForwardPass(context, units, full, proxies)
    runtime.passes.append(forward)
    rules.stack.forwards.append((RecomputedPass, runtime.passes, forward))
    try:
        return next(call.replace(target=target, params=shards))
    finally:
        rules.stack.forwards.pop()
        runtime.passes.pop()


def _run_full(next: Next, call: ApplyCall, shards: Mapping[str, Tensor], gathered: Mapping[str, Tensor]) -> Any:
    """Run the model on the full tensors `gathered` in place of their `shards`; it returns the shards of frozen ones."""
    params = {name: gathered.get(name, p) for name, p in shards.items()}
    out, new = next(call.replace(params=params, buffers={k: gathered.get(k, b) for k, b in call.buffers.items()}))
    return out, {name: call.buffers[name] if name in gathered else b for name, b in new.items()}


def _check_unwrapped(params: Mapping[str, Tensor]) -> None:
    """Raise `ParamsError` for a param that torch.func.grad, say, was given as it is in the loss function."""
    for name, param in params.items():
        inner = param
        while _torch_compat.is_functorch_wrapped_tensor(inner):
            inner = _torch_compat.get_unwrapped(inner)
        if isinstance(inner, LazyParam):
            raise ParamsError(
                f"a transform of torch.func, such as torch.func.grad, was given the param {name!r}, of which a rank"
                " has a shard only under lm.fsdp(stage=3). Differentiate params by lm.value_and_grad(loss_fn)(params,"
                " batch), which gathers them, or use lm.fsdp(stage=2)."
            )


def _shards_of(
    params: Mapping[str, Any],
) -> tuple[UnshardContext | None, dict[str, Tensor], dict[str, LazyParam]]:
    """The context that params belong to (None outside a loss function), their shards, and those that are lazy.

    A param that `lm.tensor_parallel` inside would gather is taken as it is there: this rank's tensor-parallel shard.
    """
    context: UnshardContext | None = None
    shards: dict[str, Tensor] = {}
    proxies: dict[str, LazyParam] = {}
    for name, param in params.items():
        if isinstance(param, LazyParam) and not isinstance(param.source, UnshardContext):
            param = param.shard
        if isinstance(param, LazyParam):
            proxies[name] = param
            if context is None and isinstance(param.source, UnshardContext):
                context = param.source
            param = param.shard
        shards[name] = param
    return context, shards, proxies


def _full_names(plain: Mapping[str, Tensor], shapes: Shapes, layout: ShardLayout) -> frozenset[str]:
    """Which params are not sharded: computed from others in the loss function, say."""
    for name, p in plain.items():
        if p.shape != shapes[name] and p.shape != layout.shape(shapes[name]):
            raise ParamsError(
                f"the model was applied to a param {name!r} of shape {tuple(p.shape)}, which is neither this rank's"
                f" shard nor the full shape {tuple(shapes[name])}. Params that a loss function computes from others"
                " (an inner step, say) take lm.fsdp(stage=2) where lm.tensor_parallel shards them too."
            )
    certain = [name for name, p in plain.items() if p.shape == shapes[name] != layout.shape(shapes[name])]
    return frozenset(name for name, p in plain.items() if p.shape == shapes[name]) if certain else frozenset()
