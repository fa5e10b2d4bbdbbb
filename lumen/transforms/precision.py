"""`lm.precision`: compute in another dtype than the params are kept in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as torch_pytree

from lumen import tree
from lumen.core import rules, sharding
from lumen.core.dataclass import state as state_class
from lumen.core.primitives import ApplyCall, Gradient, GradientCall, UpdateCall
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn, Transform, add_slot, device_of, slot, with_slot, without_slot
from lumen.core.values import Mean
from lumen.errors import HyperparameterError
from lumen.optim.norms import leaf_norms
from lumen.transforms.matmul import PRECISIONS, float32_products

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Policy:
    """Dtypes of one step: `param` at rest (None keeps what there is), `compute` inside the model, `output` of it.

    `loss_scale` is where dynamic loss scaling starts; None does without it. `matmul` is how products of float32
    matrices are computed while the step runs: "tf32" (19 bits of each factor, on GPUs that have it), "ieee" (all of
    them), or None for whatever torch is set to.

    >>> import lumen as lm, torch
    >>> lm.Policy(compute=torch.bfloat16, output=torch.float32).loss_scale is None
    True
    """

    param: torch.dtype | None = None
    compute: torch.dtype = torch.float32
    output: torch.dtype = torch.float32
    loss_scale: float | None = None
    growth_interval: int = 2000
    matmul: str | None = None

    def __post_init__(self) -> None:
        if self.matmul is not None and self.matmul not in PRECISIONS:
            raise HyperparameterError(
                f"Policy(matmul={self.matmul!r}) is unknown; give one of {', '.join(map(repr, PRECISIONS))}, or None."
            )


POLICIES = {
    "fp32": Policy(torch.float32, torch.float32, torch.float32),
    "tf32": Policy(torch.float32, torch.float32, torch.float32, matmul="tf32"),
    "bf16": Policy(torch.float32, torch.bfloat16, torch.float32),
    "fp16": Policy(torch.float32, torch.float16, torch.float32, loss_scale=2.0**16),
    "fp64": Policy(torch.float64, torch.float64, torch.float64),
}


@state_class
class LossScale:
    """The slot of `precision` with loss scaling: the `scale` (float32) and the good steps since it last changed."""

    scale: Tensor
    good: Tensor


class precision(Transform):
    """Run the model in another precision: "bf16", "fp16", "tf32", "fp32", "fp64", or a `Policy`.

    Params (frozen ones too) and inputs are cast where the model is applied, its outputs cast back, so the loss and
    the update run in the params' own dtype and gradients arrive in it. BatchNorm's and InstanceNorm's params stay as
    they are, as do all buffers. "fp16" multiplies the loss by a dynamic scale (Micikevicius et al. 2018), kept in
    `state.slots["precision"]`: it halves after a non-finite gradient, whose update is left out, and doubles after
    2,000 good steps. "tf32" is "fp32" with matrix products in TF32, on GPUs that have it (compute capability 8.0 and
    above); torch's own setting for these is what it was again when the step has returned.

    Declared change: rounding, and updates left out while the scale is too large.

    >>> import lumen as lm
    >>> lm.precision("bf16")
    lm.precision('bf16')
    """

    name = "precision"
    level = "precision"
    reason = "casts and loss scaling belong to each single gradient computation"

    def __init__(self, policy: str | Policy) -> None:
        if isinstance(policy, str) and policy not in POLICIES:
            raise HyperparameterError(
                f"precision {policy!r} is unknown; give one of {', '.join(map(repr, POLICIES))}, or a policy:"
                " lm.precision(lm.Policy(compute=torch.bfloat16, output=torch.float32))"
            )
        if not isinstance(policy, str | Policy):
            raise HyperparameterError(f"precision takes a name or an lm.Policy, not {policy!r}.")
        self.policy = POLICIES[policy] if isinstance(policy, str) else policy
        self._said = policy

    def __repr__(self) -> str:
        return f"lm.precision({self._said!r})"

    def init(self, state: Any) -> Any:
        """Cast params, buffers and optimizer state to the policy's `param`; add the loss scale's slot."""
        if self.policy.param is not None:
            state = state.replace(
                params=_cast(state.params, self.policy.param),
                buffers=_cast(state.buffers, self.policy.param),
                opt_state=tree.map(lambda x: _cast(x, self.policy.param) if x.dim() else x, state.opt_state),
            )
        if self.policy.loss_scale is None:
            return state
        device = device_of(state)
        scale = torch.tensor(self.policy.loss_scale, dtype=torch.float32, device=device)
        good = torch.zeros((), dtype=torch.int64, device=device)
        return add_slot(state, self.name, lambda: LossScale(scale, good))

    def export(self, state: Any) -> Any:
        """Drop the loss scale's slot."""
        return state if self.policy.loss_scale is None else without_slot(state, self.name)

    def wrap(self, step: StepFn) -> StepFn:
        """The step with its model run under the policy."""
        if self.policy.loss_scale is None:
            return rules.under({Primitive.APPLY: self.apply}, step)

        def scaled(state: Any, batch: Any) -> tuple[Any, Any]:
            old: LossScale = slot(state, self.name)
            scaling = _Scaling(old.scale)
            handlers: dict[Primitive, Rule] = {
                Primitive.APPLY: self.apply,
                Primitive.GRADIENT: scaling.gradient,
                Primitive.UPDATE: scaling.update,
            }
            with rules.install(handlers):
                new, metrics = step(state, batch)
            return with_slot(new, self.name, self._adjust(old, scaling.finite())), metrics

        return scaled

    def host(self, step: StepFn) -> StepFn:
        """The step with torch's setting for products of float32 matrices; a compiled one is compiled under it too."""
        if self.policy.matmul is None:
            return step
        wanted = self.policy.matmul

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            with float32_products(wanted):
                return step(state, batch)

        return run

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """The rule for P0: the model run in the policy's dtypes."""
        compute, output = self.policy.compute, self.policy.output
        kept, frozen = _norm_params(call.target), call.target.frozen - _norm_params(call.target)
        params = {k: p if k in kept else _cast(p, compute) for k, p in call.params.items()}
        given = {k: _cast(b, compute) if k in frozen else b for k, b in call.buffers.items()}
        args, kwargs = torch_pytree.tree_map(lambda x: _cast(x, compute), (call.args, dict(call.kwargs)))
        out, buffers = next(call.replace(params=params, buffers=given, args=args, kwargs=kwargs))
        buffers = {k: call.buffers[k] if k in frozen else b.to(call.buffers[k].dtype) for k, b in buffers.items()}
        return torch_pytree.tree_map(lambda x: _cast(x, output), out), buffers

    def _adjust(self, old: LossScale, finite: Tensor) -> LossScale:
        grown = old.good + 1 >= self.policy.growth_interval
        up = torch.where(grown, old.scale * 2, old.scale)
        scale = torch.where(finite, up, (old.scale / 2).clamp(min=1.0))
        return LossScale(scale, torch.where(finite & ~grown, old.good + 1, torch.zeros_like(old.good)))


class _Scaling:
    """One step's loss scaling: scale the loss, unscale the grads, skip what overflowed."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self._flags: list[Tensor] = []
        self._apart = False  # whether other processes have other flags
        self._agreed: Tensor | None = None

    def gradient(self, next: Next, call: GradientCall) -> Gradient:
        def scaled_loss(*args: Any) -> Any:
            out = call.loss_fn(*args)
            loss, aux = out if call.has_aux else (out, None)
            if isinstance(loss, Mean):
                loss = Mean(loss.total * self.scale, loss.weight)
            elif isinstance(loss, Tensor):
                loss = loss * self.scale
            return (loss, aux) if call.has_aux else loss

        scaled_loss.__wrapped__ = call.loss_fn  # type: ignore[attr-defined]
        scaled_loss.__qualname__ = getattr(call.loss_fn, "__qualname__", "loss")
        answer: Gradient = next(call.replace(loss_fn=scaled_loss))
        inverse = 1.0 / self.scale
        grads = tree.map(lambda g: g * inverse.to(g.device, g.dtype), answer.grads)
        # Where params are kept on the host, so are their gradients, and flags; a scale lives with the loss.
        finite = leaf_norms(tree.leaves(grads)).isfinite().all().to(self.scale.device)
        self._flags.append(finite)
        self._apart |= not answer.joint
        self._agreed = None
        # What still overflows at the smallest scale is no fault of the scale: a guard outside must see it.
        hide = ~finite & (self.scale > 1.0)
        grads = tree.map(lambda g: torch.where(hide.to(g.device), torch.zeros_like(g), g), grads)
        loss = answer.loss
        if isinstance(loss, Mean):
            return answer.replace(loss=type(loss)(loss.total * inverse, loss.weight), grads=grads)
        return answer.replace(loss=loss * inverse, grads=grads)

    def update(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        bad = ~self.finite()
        return next(call.skipping(bad))  # type: ignore[no-any-return]

    def finite(self) -> Tensor:
        """Whether all gradients of this step were finite so far, on every process."""
        if not self._flags:
            return torch.ones_like(self.scale, dtype=torch.bool)
        if self._agreed is None:
            # Once for all microbatches, of which other processes may have more.
            self._agreed = sharding.everywhere(torch.stack(self._flags).all(), self._apart)
        return self._agreed


def _norm_params(target: Any) -> frozenset[str]:
    """Names of params that belong to batch or instance norms: their statistics need the wider dtype."""
    cached = target.__dict__.get("_norm_params")
    if cached is None:
        cached = frozenset(
            f"{prefix}.{name}" if prefix else name
            for prefix, module in target.module.named_modules()
            if isinstance(module, _NORMS)
            for name in module._parameters
        )
        target.__dict__["_norm_params"] = cached
    return cached  # type: ignore[no-any-return]


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(values, Tensor):
        # Eight bits are codes, to which a scale belongs: what `lm.quantise` keeps.
        return values.to(dtype) if values.is_floating_point() and values.itemsize > 1 else values
    if isinstance(values, dict):
        return {key: _cast(value, dtype) for key, value in values.items()}
    return values
