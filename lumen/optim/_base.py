"""Optimizers as pairs of pure functions, as in optax, with a second lowering that works in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from lumen import tree
from lumen.core import rules
from lumen.core._torch_compat import clone_all
from lumen.core.dtypes import NARROW, wide_dtype
from lumen.errors import HyperparameterError, ParamsError, UpdateInterceptedError
from lumen.optim import _vmap_fused
from lumen.optim._fused_kernels import alike, allowed, columns, eager
from lumen.optim._hyperparams import check_scalar as check_scalar
from lumen.optim._numerics import is_narrow

Params = Any
State = Any
Update = Callable[[Any, State, Params], tuple[Any, State]]


@dataclass(frozen=True, eq=False)
class GradientTransformation:
    """A gradient transformation: `init(params) -> state`, `update(grads, state, params) -> (updates, state)`.

    `update_fn` is plain tree mathematics: it works under `vmap`, `torch.compile` and differentiation.

    `fused_fn(grads, state, params, skip) -> state`, if set, is the same rule by torch's fused or foreach
    kernels: it changes `params` and the state's tensors in place. `skip` is None or a boolean scalar tensor;
    where true, nothing may change. Both lowerings give the same numbers up to rounding.

    `scale_fn(state) -> scalar` marks a transform that multiplies updates by that scalar and does not change its
    state.

    `needs_full_tensors` says in words why the rule needs full tensors ("muon orthogonalizes full matrices"); it is
    empty for elementwise rules, which run on shards unchanged. A rule that `can_gather` all-gathers what it needs, with
    `lumen.optim._full_tensors`; `lm.fsdp` rejects other rules that need full tensors.

    `needs_rows` says in words why a rule needs full rows of each tensor, and where they lie in it, as those that round
    by the place of a row; `lm.tensor_parallel` and `lm.deepspeed` reject them. A rule that `rounds_params` gives
    updates that must be added as they are, so it is the last of a chain.

    `unused_fn(params) -> [bool, ...]`, if set, says for each leaf whether its gradient has no effect: `lm.clip`
    leaves those out of the norm.

    >>> import torch, lumen as lm
    >>> def update(grads, count, params):
    ...     return lm.tree.map(lambda g: -g / count, grads), count + 1
    >>> tx = lm.optim.GradientTransformation(lambda params: torch.tensor(1), update)
    >>> params = {"w": torch.ones(1)}
    >>> params, count = tx.apply({"w": torch.ones(1)}, tx.init(params), params)
    >>> params["w"], count
    (tensor([0.]), tensor(2))
    """

    init_fn: Callable[[Params], State]
    update_fn: Update
    fused_fn: Callable[[Any, State, Params, Tensor | None], State] | None = None
    scale_fn: Callable[[State], Tensor] | None = None
    needs_full_tensors: str = ""
    can_gather: bool = False
    needs_rows: str = ""
    rounds_params: bool = False
    unused_fn: Callable[[Params], Sequence[bool]] | None = None

    def init(self, params: Params) -> State:
        """The optimizer's state for `params`, a pytree of floating tensors."""
        for path, leaf in tree.named_tensors(params):
            if leaf.is_complex():
                raise ParamsError(
                    f"params[{path!r}] is {leaf.dtype}, and the rules of lm.optim train real tensors. Keep it as"
                    " torch.nn.Parameter(torch.view_as_real(w)), with real and imaginary parts along the last dim, and"
                    " write torch.view_as_complex(self.w) in forward."
                )
            if not leaf.is_floating_point():
                raise ParamsError(
                    f"params[{path!r}] is {leaf.dtype}; only floating tensors can be trained."
                    " Keep integer tensors among the buffers."
                )
        return self.init_fn(params)

    def update(self, grads: Any, state: State, params: Params) -> tuple[Any, State]:
        """The updates to add to `params`, and the next state.

        Raises `UpdateInterceptedError` inside a step with a transform that must see the update (clip, guard, donate …).
        """
        if rules.intercepts_updates():
            raise UpdateInterceptedError(
                "tx.update was called by hand inside a step whose transforms intercept updates, so they would"
                " not see this one. Write: params, opt_state = lm.apply_gradients(tx, grads, opt_state, params)"
            )
        return self.update_fn(grads, state, params)

    def apply(
        self, grads: Any, state: State, params: Params, *, skip: Tensor | None = None, donate: bool = False
    ) -> tuple[Params, State]:
        """The next params and state; with `donate`, in the memory of the old ones.

        Uses the fused lowering where possible: in eager mode, outside differentiation and outside `torch.func`
        transforms, and for large lanes also under `vmap`. Without `donate` it runs on copies.
        """
        rules.stack.in_update += 1
        try:
            may_fuse = can_fuse(params, grads)
            if may_fuse and self.fused_fn is not None and not rules.stack.tracing:
                if not donate:
                    params, state = clone((params, state))
                return params, self.fused_fn(grads, state, params, skip)
            if self.fused_fn is not None and _vmap_fused.should_fuse_under_vmap(params, grads, state, skip):
                return _vmap_fused.update(self.in_place, grads, state, params, skip, donate)  # type: ignore[no-any-return]
            if donate and not rules.stack.tracing:
                return params, plain_in_place(self.update_fn, grads, state, params, skip)
            updates, new_state = self.update_fn(grads, state, params)
            new_params = apply_updates(params, updates)
            if skip is None:
                return new_params, new_state
            return tree.select(skip, params, new_params), tree.select(skip, state, new_state)
        finally:
            rules.stack.in_update -= 1

    def in_place(self, grads: Any, state: State, params: Params, skip: Tensor | None) -> State:
        """Change `params` in place, by the fused lowering if possible; transforms that wrap others call this."""
        if can_fuse(params, grads) and self.fused_fn is not None:
            return self.fused_fn(grads, state, params, skip)
        return plain_in_place(self.update_fn, grads, state, params, skip)


def needs(*transforms: GradientTransformation) -> dict[str, Any]:
    """Fields of a transform that wraps these: what they need of the tensors, whether they round, and `unused_fn`."""
    candidates = sorted((t for t in transforms if t.needs_full_tensors), key=lambda t: t.can_gather)
    fields: dict[str, Any] = {
        "needs_rows": next((t.needs_rows for t in transforms if t.needs_rows), ""),
        "rounds_params": any(t.rounds_params for t in transforms),
    }
    if candidates:
        fields |= {"needs_full_tensors": candidates[0].needs_full_tensors, "can_gather": candidates[0].can_gather}
    unused_fns = [t.unused_fn for t in transforms if t.unused_fn is not None]
    if unused_fns:
        fields["unused_fn"] = lambda params: [
            any(flags) for flags in zip(*(fn(params) for fn in unused_fns), strict=True)
        ]
    return fields


def check_rounds_nothing(wrapper: str, *transforms: GradientTransformation) -> None:
    """Raise `HyperparameterError` if one of these rounds params: `wrapper` changes their updates afterwards."""
    if any(t.rounds_params for t in transforms):
        raise HyperparameterError(
            f"{wrapper} changes the updates of an optimizer with stochastic_rounding=True after they were rounded, so"
            " that params would be rounded to nearest. Put that optimizer last, chain(…, adamw(lr,"
            " stochastic_rounding=True)), or leave stochastic_rounding out."
        )


def plain_in_place(update_fn: Update, grads: Any, state: State, params: Params, skip: Tensor | None) -> State:
    """Change `params` in place by the plain lowering, and return the next state."""
    # The backward pass of a differentiated learning rate needs the old params.
    differentiated = any(leaf.requires_grad for leaf in tree.tensors(state))
    updates, new_state = update_fn(grads, state, clone(params) if differentiated else params)
    if skip is None:
        tree.map(lambda p, u: p.add_(u), params, updates)
        return new_state
    tree.map(lambda p, new: p.copy_(torch.where(skip, p, new)), params, apply_updates(params, updates))
    return tree.select(skip, state, new_state)


def apply_updates(params: Params, updates: Any) -> Params:
    """`params + updates`, leaf by leaf, in the params' dtypes.

    >>> import torch, lumen as lm
    >>> lm.optim.apply_updates({"w": torch.tensor(1.0)}, {"w": torch.tensor(-0.5)})
    {'w': tensor(0.5000)}
    """
    return tree.map(lambda p, u: (p + u).to(p.dtype), params, updates)


def clone(values: Any) -> Any:
    """A copy of every tensor in `values`; in eager mode by one foreach call per dtype and device."""
    leaves, spec = optree.tree_flatten(values, namespace=tree.NAMESPACE)  # as in tree.flatten
    indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    by_list = allowed([*map(leaves.__getitem__, indices)])
    groups: dict[Any, list[int]] = {}
    for i in indices:
        groups.setdefault((leaves[i].dtype, leaves[i].device) if by_list else i, []).append(i)
    for group in groups.values():
        tensors = [*map(leaves.__getitem__, group)]
        copies = clone_all(tensors) if by_list else [tensors[0].clone()]
        for i, copy in zip(group, copies, strict=True):
            leaves[i] = copy
    return spec.unflatten(leaves)


def wide_clone(params: Params) -> Params:
    """A copy of `params`, with 16-bit leaves in float32: the start of an average over steps."""
    if not is_narrow(params):
        return clone(params)
    return tree.map(lambda p: p.to(wide_dtype(p.dtype), copy=True), params)


def matched(params: Params, grads: Any) -> list[list[Tensor]]:
    """The leaves of both in the same order; ParamsError if structures or shapes differ.

    A fused kernel does not check shapes: it would read past the end of the smaller tensor.
    """
    ps, gs = columns(params, grads)
    if [p.shape for p in ps] != [g.shape for g in gs]:
        names = [name for name, p, g in zip(tree.paths(params), ps, gs, strict=True) if p.shape != g.shape]
        p, g = next((p, g) for p, g in zip(ps, gs, strict=True) if p.shape != g.shape)
        raise ParamsError(
            f"the gradient of {names[0]!r} has shape {tuple(g.shape)} where the parameter has {tuple(p.shape)}."
        )
    return [ps, gs]


def can_fuse(params: Params, grads: Any) -> bool:
    """Whether fused in-place kernels may run on these trees now; ParamsError if the trees do not match."""
    if alike(params, grads):
        return eager()
    ps, gs = matched(params, grads)
    return allowed(ps + gs) and all(
        p.dtype == g.dtype or (p.dtype in NARROW and g.dtype == torch.float32) for p, g in zip(ps, gs, strict=True)
    )
