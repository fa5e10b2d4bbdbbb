"""`lm.value_and_grad` (primitive GRADIENT) and its engine.

The engine differentiates by `torch.autograd.grad`: on detached leaves, or, at about twice the cost, with a graph of the
gradient where the result may be differentiated again. Inside of transforms of `torch.func` it is
`torch.func.grad_and_value`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, batching, external_grads, loss_errors, rules
from lumen.core.dtypes import NARROW
from lumen.core.metrics import Mean
from lumen.core.primitives import Gradient, GradientCall
from lumen.core.rules import Primitive
from lumen.errors import BatchError, LossError

Engine = Literal["auto", "autograd", "func"]
Rebuild = Callable[[Sequence[Any]], Any]  # a tree like params, from its leaves
_MISSING = object()
_requires_grad, _is_sparse = attrgetter("requires_grad"), attrgetter("is_sparse")


def value_and_grad(
    loss_fn: Callable[..., Any], argnums: int = 0, has_aux: bool = False, *, engine: Engine = "auto"
) -> Callable[..., tuple[Any, Any]]:
    """A function that returns the value of `loss_fn` and its gradient in the first argument.

    `loss_fn(params, batch, *extras)` returns a loss, or `(loss, aux)` with `has_aux=True`. The loss is a scalar tensor
    (its weight is then the number of rows of the batch, over which it must be a mean where a transform splits that) or
    an `lm.Mean`. The result is called as `(params, batch, *extras)` and returns `(loss, grads)`, or `((loss, aux),
    grads)`, in JAX's order; grads have the structure of params and are those of the mean loss.

    The second argument is the batch: what `accumulate`, `ddp` and `dp_sgd` split along its first dim. Further
    arguments are not split. `aux` is an `lm.Aux` or any tree of tensors and typed values.

    A gradient can be differentiated again inside of another, and where params or further arguments require grad;
    "autograd" makes it a constant everywhere. `engine="func"` uses `torch.func`. A loss may take derivatives in its
    inputs itself, as gradient penalties and physics-informed losses do: by `torch.func.grad`, or by
    `torch.autograd.grad(..., create_graph=True)`, which `lm.dp_sgd` and `lm.ensemble` refuse.

    Raises `LossError`, `BatchError` or `ParamsError` for what cannot be differentiated.

    >>> import lumen as lm, torch
    >>> def loss_fn(params, batch):
    ...     return ((params["w"] * batch) ** 2).mean()
    >>> loss, grads = lm.value_and_grad(loss_fn)({"w": torch.tensor(3.0)}, torch.tensor([1.0, 2.0]))
    >>> loss, grads
    (tensor(22.5000), {'w': tensor(15.)})
    """
    if argnums != 0:
        raise LossError(
            f"argnums={argnums!r}: the first argument of a loss function is what is differentiated. Put everything"
            " trainable into one tree: lm.value_and_grad(lambda params, batch: ...)((a, b), batch)"
        )
    if engine not in ("auto", "autograd", "func"):
        raise LossError(f"engine={engine!r} is unknown; give 'auto', 'autograd' or 'func'.")

    def gradient(params: Any, batch: Any = _MISSING, *extras: Any) -> tuple[Any, Any]:
        if batch is _MISSING:
            raise BatchError(
                "the function made by value_and_grad takes the batch as its second argument, so that transforms can"
                " split it: lm.value_and_grad(loss_fn)(params, batch)"
            )
        call = GradientCall(loss_fn, params, batch, extras, has_aux, False, engine)
        has_rules = rules.stack.rules[Primitive.GRADIENT]
        result = rules.bind(Primitive.GRADIENT, differentiate, call) if has_rules else differentiate(call)
        return ((result.loss, result.aux) if has_aux else result.loss), result.grads

    return gradient


def differentiate(call: GradientCall) -> Gradient:
    """The base rule of GRADIENT."""
    sums = call.grad_sums
    if sums is not None and sums.opened is not None and torch.is_grad_enabled():
        return _into_sums(call, *sums.opened, may_keep_graph=False)
    leaves, rebuild = flat(call.params)
    if {*map(type, leaves)} != {Tensor}:
        loss_errors.check_params(leaves, call.params)
        # Any operation unshards a param that an outer transform shows as a proxy.
        leaves = [leaf.view_as(leaf) if hasattr(leaf, "shard") else leaf for leaf in leaves]
        call = call.replace(params=rebuild(leaves))
    if _needs_func(call):
        loss_errors.check_params(leaves, call.params)
        return _by_func(call)
    compute = _by_autograd if sums is None else _into_sums
    if torch.is_grad_enabled():
        # What is reduced over processes is a constant: no derivative goes through collectives.
        return compute(call, leaves, rebuild, call.engine == "auto" and call.reduction is None)
    with torch.enable_grad():
        return compute(call, leaves, rebuild, False)


def normalized(total: Gradient, *, own: bool = False) -> Gradient:
    """The gradient of the mean loss, from a summed result; computed in its memory where that is not shared (`own`)."""
    loss = total.loss
    assert isinstance(loss, Mean)
    divide = Tensor.div_ if own else Tensor.div
    sums, rebuild = flat(total.grads)
    means = []
    for g in sums:
        if g.dtype in NARROW:  # which cannot represent every number of rows
            means.append((g.float() / loss.weight.to(g.device)).to(g.dtype))
        else:
            means.append(divide(g, loss.weight.to(g.device, g.dtype)))
    return total.replace(loss=loss.compute() if total.scalar else loss, grads=rebuild(means))


def flat(params: Any) -> tuple[list[Any], Rebuild]:
    """The leaves of params or grads, and what makes a tree like them of others; a flat dict goes by a shorter way."""
    if type(params) is dict and {*map(type, params.values())} == {Tensor}:
        return [*params.values()], lambda leaves: dict(zip(params, leaves, strict=True))
    leaves, spec = tree.flatten(params)
    return leaves, spec.unflatten


def _by_autograd(call: GradientCall, leaves: list[Tensor], rebuild: Rebuild, may_keep_graph: bool) -> Gradient:
    """The gradient, with a graph of its own if it `may_keep_graph` and an enclosing derivative may go through it."""
    keeps_graph = may_keep_graph and _may_be_differentiated(call, leaves)
    live = _live(call, leaves, keeps_graph)
    rules.stack.in_loss += 1
    try:
        size = batching.count(call.batch) if call.summed else None
        objective, loss, aux, scalar = objective_of(call, rebuild(live), size)
        grads: tuple[Tensor | None, ...] = (None,) * len(live)
        if objective.requires_grad:
            keeps_graph = keeps_graph or _depends_on_others(call, objective, live, may_keep_graph)
            if not keeps_graph and call.reduction is not None:
                call.reduction.register_hooks(live)
            grads = _backward_with_graph(objective, None, live) if keeps_graph else _run_backward(objective, live)
    finally:
        rules.stack.in_loss -= 1
    if not keeps_graph:
        loss, aux = detached(loss), detached(aux)
    independent = None
    if type(None) in map(type, grads):
        if all(g is None for g in grads):
            independent = loss_errors.independent_of(call)
        grads = tuple(torch.zeros_like(p) if g is None else g for g, p in zip(grads, leaves, strict=True))
    if any(map(_is_sparse, grads)):  # of nn.Embedding(sparse=True): optimizers and collectives take dense ones
        grads = tuple(g.to_dense() if g.is_sparse else g for g in grads)  # type: ignore[union-attr]
    result = Gradient(loss, rebuild(grads), aux, scalar, size)
    return result if call.reduction is None and independent is None else _finished(call, result, independent)


def _into_sums(call: GradientCall, leaves: list[Tensor], rebuild: Rebuild, may_keep_graph: bool) -> Gradient:
    """The result without grads, which have been added to the call's sums.

    They are added as the backward pass has them, so that there are never two of all. All microbatches differentiate the
    leaves of the first one, which has also decided whether to keep the graph.
    """
    sums = call.grad_sums
    assert sums is not None
    is_open = sums.opened is not None
    keeps_graph = may_keep_graph and _may_be_differentiated(call, leaves)
    live = leaves if is_open else _live(call, leaves, keeps_graph)
    rules.stack.in_loss += 1
    try:
        size = batching.count(call.batch)
        value, weight, aux = _evaluated(call, rebuild(live))
        if not value.requires_grad:
            raise loss_errors.independent_of(call)
        scalar = weight is None
        seed = None
        if weight is None:
            value = value.float() if value.dtype in NARROW else value
            weight = seed = sums.weight(size, value)
        if not is_open or _marking:
            keeps_graph = keeps_graph or _depends_on_others(call, value, live, may_keep_graph)
        if keeps_graph:
            grads = _backward_with_graph(value, seed, live)
            sums.add([torch.zeros_like(p) if g is None else g for g, p in zip(grads, live, strict=True)])
        else:
            if not is_open:
                sums.open(live, rebuild)
            _torch_compat.engine_run_backward(
                (value,),
                (_one(value) if seed is None else seed,),
                False,
                False,
                tuple(live),
                True,
                accumulate_grad=True,
            )
            value, aux = value.detach(), detached(aux)
    finally:
        rules.stack.in_loss -= 1
    return Gradient(Mean(value * weight if scalar else value, weight), None, aux, scalar, size)


def _live(call: GradientCall, leaves: list[Tensor], keeps_graph: bool) -> list[Tensor]:
    """What to differentiate in."""
    try:
        if keeps_graph:
            return [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in leaves]
        return [*map(Tensor.requires_grad_, map(Tensor.detach, leaves))]
    except RuntimeError:  # torch's own words for an integer leaf
        loss_errors.check_params(leaves, call.params)
        raise


def _backward_with_graph(objective: Tensor, seed: Tensor | None, live: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again."""
    return torch.autograd.grad(objective, live, seed, create_graph=True, allow_unused=True)


def _run_backward(objective: Tensor, live: list[Tensor]) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, in plain eager mode straight to its engine: what it looks for costs 3% of a small step."""
    if type(objective) is not Tensor or rules.stack.tracing or _torch_compat.len_torch_function_stack():
        return torch.autograd.grad(objective, live, allow_unused=True)
    one = _one(objective)
    grads: tuple[Tensor | None, ...] = _torch_compat.engine_run_backward(
        (objective,), (one,), False, False, tuple(live), True, accumulate_grad=False
    )
    return grads


def _one(objective: Tensor) -> Tensor:
    key = objective.dtype, objective.device
    one = _ones.get(key)
    if one is None:
        one = _ones[key] = torch.ones((), dtype=objective.dtype, device=objective.device)
    return one


_ones: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _finished(call: GradientCall, result: Gradient, independent: LossError | None = None) -> Gradient:
    """The result of all processes where there are several; only together can they be independent of the params."""
    if call.reduction is not None:
        return call.reduction.finish(result, independent)
    if independent is not None:
        raise independent
    return result


def _by_func(call: GradientCall) -> Gradient:
    recorded: dict[str, Any] = {}
    size = batching.count(call.batch) if call.summed else None

    def objective_fn(params: Any) -> tuple[Tensor, list[Tensor]]:
        with rules.inside_loss:
            objective, loss, aux, recorded["scalar"] = objective_of(call, params, size)
        leaves, recorded["spec"] = tree.flatten((loss, aux))
        recorded["leaves"] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return objective, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    with torch.enable_grad(), external_grads.explained(call.loss_fn):
        grads, (_, aux_tensors) = torch.func.grad_and_value(objective_fn, has_aux=True)(call.params)
    tensors = iter(aux_tensors)
    leaves = [next(tensors) if leaf is None else leaf for leaf in recorded["leaves"]]
    loss, aux = tree.unflatten(recorded["spec"], leaves)
    if call.grad_sums is not None:
        call.grad_sums.add(flat(grads)[0])
        grads = None
    return _finished(call, Gradient(loss, grads, aux, recorded["scalar"], size))


def objective_of(call: GradientCall, params: Any, size: int | None) -> tuple[Tensor, Any, Any, bool]:
    """`(what to differentiate, the loss to report, aux, whether the user's loss was a plain scalar)`.

    A summed call needs `size`, the number of rows.
    """
    value, weight, aux = _evaluated(call, params)
    if weight is not None:
        return (value if call.summed else value / weight), Mean(value, weight), aux, False
    if not call.summed:
        return value, value, aux, True
    assert size is not None
    total = value.float() if value.dtype in NARROW else value
    weight = total.detach().new_full((), size)
    total = total * weight
    return total, Mean(total, weight), aux, True


def _evaluated(call: GradientCall, params: Any) -> tuple[Tensor, Tensor | None, Any]:
    """`(value, weight, aux)` of the user's loss: a total with its weight, or a plain scalar with None."""
    if rules.stack.loss_contexts:
        out = rules.call_loss(call.loss_fn, params, call.batch, call.extras)
    else:
        out = call.loss_fn(params, call.batch, *call.extras)
    loss, aux = _split_aux(out) if call.has_aux else (out, None)
    is_mean = isinstance(loss, Mean)
    value = loss.total if is_mean else loss
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        raise loss_errors.not_a_scalar(value, call)
    return value, loss.weight.detach() if is_mean else None, aux


def _split_aux(out: Any) -> tuple[Any, Any]:
    if type(out) is not tuple or len(out) != 2:
        raise LossError(
            f"with has_aux=True a loss function returns (loss, aux), but it returned {loss_errors.described(out)}."
            " Write: return loss, lm.Aux(metrics={...})"
        )
    return out


def _needs_func(call: GradientCall) -> bool:
    """Whether only torch.func can differentiate here: it is active, or asked for."""
    if call.engine == "auto":
        by_dynamo = torch.compiler.is_compiling() and not rules.stack.tracing
        return by_dynamo or _torch_compat.peek_interpreter_stack() is not None
    return call.engine == "func"


def _may_be_differentiated(call: GradientCall, leaves: list[Tensor]) -> bool:
    """Whether an enclosing derivative may differentiate through this gradient: it is inside a loss, or params are live.

    A batch that requires grad is for derivatives that the loss takes itself. Kept in the graph of the new params, it
    would have those of the next step depend on the step before.
    """
    if rules.stack.in_loss:
        return True
    return any(map(_requires_grad, (*leaves, *tree.tensors(call.extras)) if call.extras else leaves))


def _depends_on_others(call: GradientCall, objective: Tensor, live: list[Tensor], may_matter: bool) -> bool:
    """Whether the loss depends on tensors outside params that require grad, found once for each loss function.

    Walking the graph costs as much as a small step, so it is done on a function's first call only, and where its
    closure holds a tensor that requires grad.
    """
    if call.engine != "auto" or rules.stack.tracing:
        return False
    loss_fn: Any = call.loss_fn
    while hasattr(loss_fn, "__wrapped__"):  # a transform's wrapper serves every loss function
        loss_fn = loss_fn.__wrapped__
    code = getattr(loss_fn, "__code__", None)
    if code is None:
        return False
    if code not in _examined or (code not in _nested and _closes_over_live(loss_fn)):
        external_grads.examine(call, code, loss_fn, objective, live, may_matter)
    if code in _marking:
        external_grads.unmark(call.extras)
    return may_matter and code in _nested


def _closes_over_live(loss_fn: Callable[..., Any]) -> bool:
    for cell in getattr(loss_fn, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


_examined, _nested, _marking = external_grads.examined, external_grads.nested, external_grads.marking


def detached(values: Any) -> Any:
    """A loss or aux without its graph."""
    if isinstance(values, Tensor):
        return values.detach()
    if values is None:
        return None
    if type(values) is Mean:
        return Mean(values.total.detach(), values.weight.detach())
    return tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, values)
