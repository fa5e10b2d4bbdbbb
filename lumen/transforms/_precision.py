"""`lm.precision`: compute in a dtype other than that of the params."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, rules, sharding
from lumen.core.arguments import checked
from lumen.core.dtypes import NARROW, wide_dtype
from lumen.core.metrics import Mean
from lumen.core.primitives import ApplyCall, Gradient, GradientCall, UpdateCall
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform, add_slot, device_of, slot, with_slot, without_slot
from lumen.errors import HyperparameterError
from lumen.optim._norms import leaf_norms
from lumen.optim._numerics import widen
from lumen.transforms._support import early_casts
from lumen.transforms._support.autocast import Autocast, explain_dtype_mismatch, is_autocast_on
from lumen.transforms._support.casts import cast, cast_all, cast_inputs, map_tensors
from lumen.transforms._support.matmul_precision import PRECISIONS, float32_products
from lumen.transforms._support.unapplied import Unapplied

Cast = Literal["autocast", "model"]

_NORMS = (_torch_compat.BatchNorm, _torch_compat.InstanceNorm)


@checked
@dataclass(frozen=True)
class Policy:
    """The dtypes of a step: of stored params (`param`; None keeps theirs), inside the model, and of its outputs.

    `loss_scale` is the initial scale of dynamic loss scaling; None turns it off. `matmul` sets how float32 matrices are
    multiplied during the step: "tf32" (19 bits of each factor, on GPUs that support it), "ieee" (all 32 bits), or None
    for torch's current setting.

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


@pytree_dataclass
class LossScale:
    """The slot of `precision` with loss scaling: the `scale` (float32), and the `good` steps since it last changed."""

    scale: Tensor
    good: Tensor


class precision(Transform):
    """Compute in another precision: "bf16", "fp16", "tf32", "fp32", "fp64", or a `Policy`.

    For 16-bit policies, `cast` selects what is cast. The default, "autocast", runs the loss function and the model
    under `torch.autocast`: matrix products and convolutions compute in 16 bits, operations that need more precision in
    float32. Inputs, buffers and tensors created by the model keep their dtypes. Every model that works with
    `torch.autocast` therefore works here, and a float input such as the time step 999 is not rounded. This includes
    losses that call `torch.func.functional_call` or are plain functions of params. Backward passes run outside
    autocast, in the dtypes of the forward pass. A weight that is used several times is cast each time, and its gradient
    is summed in float32.

    "model" casts all params (frozen ones too) and all float inputs once, where the model is applied. It is often
    faster, and activations take half the memory. The params of BatchNorm and InstanceNorm and all buffers keep their
    dtypes. Inputs lose digits, and a model that creates float32 tensors or has float32 buffers may fail. `keep` names
    arguments of the model's forward that are not cast (`"t"`, or `"batch.t"` for an entry of a dict; globs are
    allowed). Policies of 32 or 64 bits always cast the model, and so does `lm.deepspeed`, whose engine stores 16-bit
    params.

    In both modes, outputs are cast to the policy's `output` dtype, in any pytree, dataclass or
    `torch.distributions.Distribution`. Gradients arrive in the params' dtype, and the update runs in it. Under
    `lm.fsdp()` at stage 3, matrices outside of embeddings, and frozen weights of linear layers, are cast to 16 bits
    before they are all-gathered, as with FSDP's `MixedPrecisionPolicy(param_dtype=...)`.

    "fp16" multiplies the loss by a dynamic scale (Micikevicius et al. 2018), stored in `state.slots["precision"]`. A
    non-finite gradient halves the scale, and its update is skipped; 2,000 good steps double it. "tf32" is "fp32" with
    matrix products in TF32, on GPUs that support it (compute capability 8.0 and above); torch's own setting is restored
    when the step returns.

    Declared change: rounding, and updates skipped while the scale is too large.

    Raises:
        HyperparameterError: the name or a setting is unknown; params are float64, which autocast does not cast; torch
            has no autocast for the device.
        PatternError: `keep` names no argument of the model.
    Warns:
        InexactWarning: once, for a step in which it changes nothing.

    >>> import lumen as lm
    >>> lm.precision("bf16"), lm.precision("bf16", cast="model", keep="t")
    (lm.precision('bf16'), lm.precision('bf16', cast='model', keep='t'))
    """

    name = "precision"
    level = "precision"
    reason = "precision casts and scales the loss in each single gradient computation"

    def __init__(self, policy: str | Policy, *, cast: Cast | None = None, keep: str | Sequence[str] = ()) -> None:
        if isinstance(policy, str) and policy not in POLICIES:
            raise HyperparameterError(
                f"precision {policy!r} is unknown; give one of {', '.join(map(repr, POLICIES))}, or a policy:"
                " lm.precision(lm.Policy(compute=torch.bfloat16, output=torch.float32))"
            )
        if not isinstance(policy, str | Policy):
            raise HyperparameterError(f"precision takes a name or an lm.Policy, not {policy!r}.")
        self.policy = POLICIES[policy] if isinstance(policy, str) else policy
        self.cast: Cast = cast or ("autocast" if self.policy.compute in NARROW else "model")
        self.keep = keep if isinstance(keep, str) else tuple(keep)
        self._name = policy
        self._check()

    def _check(self) -> None:
        if self.cast not in ("autocast", "model"):
            raise HyperparameterError(f"precision(cast={self.cast!r}) is unknown; give 'autocast' or 'model'.")
        if self.cast == "autocast" and self.policy.compute not in NARROW:
            raise HyperparameterError(
                f"precision({self._name!r}, cast='autocast'): torch.autocast casts to 16-bit dtypes only. Leave"
                " cast out."
            )
        if self.cast == "autocast" and self.keep:
            raise HyperparameterError(
                f"precision({self._name!r}, keep={self.keep!r}): autocast casts no inputs, so there are none to keep."
                " Leave keep out, or write cast='model'."
            )

    def _canonical(self) -> Mapping[str, Any]:
        default = "autocast" if self.policy.compute in NARROW else "model"
        return {"cast": None if self.cast == default else self.cast, "keep": self.keep or ()}

    def init(self, state: Any) -> Any:
        """Cast params, buffers and optimizer state to the policy's `param` dtype; add the slot for the loss scale."""
        dtype = self.policy.param
        if dtype is not None:
            averages = wide_dtype(dtype)
            state = state.replace(
                params=cast_all(state.params, dtype),
                buffers=cast_all(state.buffers, dtype),
                opt_state=tree.map(lambda x: cast(x, averages) if x.dim() else x, state.opt_state),
            )
            if "ema" in getattr(state, "slots", ()):
                params = cast_all(state.slots["ema"].params, averages)
                state = with_slot(state, "ema", state.slots["ema"].replace(params=params))
        if self.policy.loss_scale is None:
            return state
        device = device_of(state)
        scale = torch.tensor(self.policy.loss_scale, dtype=torch.float32, device=device)
        good = torch.zeros((), dtype=torch.int64, device=device)
        return add_slot(state, self.name, lambda: LossScale(scale, good))

    def export(self, state: Any) -> Any:
        """Drop the slot for the loss scale."""
        return state if self.policy.loss_scale is None else without_slot(state, self.name)

    def wrap(self, step: StepFn) -> StepFn:
        """The step computed under the policy."""
        unapplied = Unapplied(self, step)

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            casting: _Casting | _Autocasting = _Casting(self) if self.cast == "model" else _Autocasting(self)
            with rules.rule_context({Primitive.APPLY: casting.apply}), rules.around_losses(casting.around):
                new = step(state, batch)
            if casting.idle(state):
                unapplied.warn()
            return new

        if self.policy.loss_scale is None:
            return run

        def scaled(state: Any, batch: Any) -> tuple[Any, Any]:
            old: LossScale = slot(state, self.name)
            scaling = _Scaling(old.scale)
            with rules.rule_context({Primitive.GRADIENT: scaling.gradient, Primitive.UPDATE: scaling.update}):
                new, metrics = run(state, batch)
            return with_slot(new, self.name, self._adjust(old, scaling.finite())), metrics

        return scaled

    def wrap_host(self, step: StepFn) -> StepFn:
        """The step with torch's setting for float32 matrix products, which a step compiled inside it uses too."""
        if self.policy.matmul is None:
            return step
        matmul = self.policy.matmul

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            with float32_products(matmul):
                return step(state, batch)

        return run

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """APPLY: cast the model's params and inputs before it is applied, and its outputs after."""
        compute = self.policy.compute
        norms = _norm_params(call.target)
        frozen = call.target.frozen - norms
        params = {k: p if k in norms else cast(p, compute) for k, p in call.params.items()}
        buffers_in = {k: cast(b, compute) if k in frozen else b for k, b in call.buffers.items()}
        args, kwargs = cast_inputs(call.target.module, call.args, call.kwargs, compute, self.keep)
        advice = f"it creates tensors or has buffers of another dtype. Write {self._advice()}"
        with explain_dtype_mismatch(self, advice):
            outputs, buffers = next(call.replace(params=params, buffers=buffers_in, args=args, kwargs=kwargs))
        return cast_all(outputs, self.policy.output), _restore_buffer_dtypes(buffers, call, frozen)

    def _advice(self) -> str:
        if self.policy.compute not in NARROW:
            return "x.to(self.weight.dtype) in the model."
        return f"lm.precision({self._name!r}), which casts for each operation, or x.to(self.weight.dtype) in the model."

    def _adjust(self, old: LossScale, finite: Tensor) -> LossScale:
        grows = old.good + 1 >= self.policy.growth_interval
        increased = torch.where(grows, old.scale * 2, old.scale)
        scale = torch.where(finite, increased, (old.scale / 2).clamp(min=1.0))
        return LossScale(scale, torch.where(finite & ~grows, old.good + 1, torch.zeros_like(old.good)))


class _Casting:
    """The rules for one step with `cast="model"`."""

    def __init__(self, transform: precision) -> None:
        self._transform = transform
        self._applied = False

    def apply(self, next: Next, call: ApplyCall) -> Any:
        self._applied = True
        return self._transform.apply(next, call)

    def around(self, inputs: Any) -> Any:
        return contextlib.nullcontext()

    def idle(self, state: Any) -> bool:
        """Whether the step should have computed in another dtype than that of its params, and did not."""
        if self._applied:
            return False
        param = tree.first_tensor(getattr(state, "params", state))
        return param is not None and param.dtype is not self._transform.policy.compute


class _Autocasting:
    """The rules for one step with `cast="autocast"`: for its loss functions, and for models applied outside of them."""

    def __init__(self, transform: precision) -> None:
        self._policy, self._transform = transform.policy, transform
        self._autocast = Autocast(self._policy.compute)
        self._casts_before_gather = _params_are_sharded(transform)
        self._used = False
        self._loss_depth = 0  # inside a loss, the user may have turned autocast off around a model

    @contextlib.contextmanager
    def around(self, inputs: Any) -> Iterator[None]:
        self._used = True
        self._loss_depth += 1
        try:
            with self._autocast.context(*inputs):
                yield
        finally:
            self._loss_depth -= 1

    def apply(self, next: Next, call: ApplyCall) -> Any:
        self._used = True
        inputs = call.params, (call.args, call.kwargs)
        autocast: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not self._loss_depth:
            autocast = self._autocast.context(*inputs)
        inner = call
        if self._casts_before_gather and (not self._loss_depth or is_autocast_on(*inputs)):
            compute = self._policy.compute
            inner = call.replace(params=early_casts.matrices(call, compute), buffers=early_casts.frozen(call, compute))
        advice = (
            f"torch.autocast does not handle one of its operations. Write lm.precision({self._transform._name!r},"
            " cast='model'), or x.to(self.weight.dtype) there."
        )
        with explain_dtype_mismatch(self._transform, advice), autocast:
            outputs, buffers = next(inner)
        return map_tensors(self._widened, outputs), _restore_buffer_dtypes(buffers, call, call.target.frozen)

    def _widened(self, x: Tensor) -> Tensor:
        return x.to(self._policy.output) if x.dtype is self._policy.compute else x

    def idle(self, _state: Any) -> bool:
        """Whether the step called neither a loss nor a model."""
        return not self._used


class _Scaling:
    """The rules for loss scaling in one step: scale the loss, unscale the grads, skip updates that overflowed."""

    suits_any_gradient = True  # see `lumen.core.cached_gradient.check_inside`

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self._flags: list[Tensor] = []
        self._differs_by_rank = False  # whether the flags of other processes may differ
        self._all_finite: Tensor | None = None

    def gradient(self, next: Next, call: GradientCall) -> Gradient:
        def scaled_loss(*args: Any) -> Any:
            returned = call.loss_fn(*args)
            loss, aux = returned if call.has_aux else (returned, None)
            if isinstance(loss, Mean):
                loss = Mean(loss.total * self.scale, loss.weight)
            elif isinstance(loss, Tensor):
                loss = loss * self.scale
            return (loss, aux) if call.has_aux else loss

        scaled_loss.__wrapped__ = call.loss_fn  # type: ignore[attr-defined]
        scaled_loss.__qualname__ = getattr(call.loss_fn, "__qualname__", "loss")
        result: Gradient = next(call.replace(loss_fn=scaled_loss))
        inverse = 1.0 / self.scale
        # Gradients of 16-bit params stay in float32: in 16 bits, the unscaled values would underflow again.
        grads = tree.map(lambda g: widen(g) * inverse.to(g.device, wide_dtype(g.dtype)), result.grads)
        # Params on the host have their gradients and flags there; the scale is on the device of the loss.
        finite = leaf_norms(tree.leaves(grads)).isfinite().all().to(self.scale.device)
        self._flags.append(finite)
        self._differs_by_rank |= not result.is_global
        self._all_finite = None
        # An overflow at the smallest scale is not caused by scaling, so a guard outside must see it.
        hide = ~finite & (self.scale > 1.0)
        grads = tree.map(lambda g: torch.where(hide.to(g.device), torch.zeros_like(g), g), grads)
        loss = result.loss
        if isinstance(loss, Mean):
            return result.replace(loss=type(loss)(loss.total * inverse, loss.weight), grads=grads)
        return result.replace(loss=loss * inverse, grads=grads)

    def update(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        return next(call.skipping(~self.finite()))  # type: ignore[no-any-return]

    def finite(self) -> Tensor:
        """Whether all gradients of this step have been finite so far, in every process."""
        if not self._flags:
            return torch.ones_like(self.scale, dtype=torch.bool)
        if self._all_finite is None:
            # One collective for all microbatches, because other processes may have more of them.
            self._all_finite = sharding.all_ranks(torch.stack(self._flags).all(), self._differs_by_rank)
        return self._all_finite


def _norm_params(target: Any) -> frozenset[str]:
    """The names of params of batch and instance norms, whose statistics need the wider dtype."""
    return early_casts.params_of(target, _NORMS, "_norm_params")


def _restore_buffer_dtypes(buffers: Any, call: ApplyCall, frozen: frozenset[str]) -> Any:
    """The buffers after the model was applied, in their original dtypes; frozen params unchanged."""
    return {k: call.buffers[k] if k in frozen else b.to(call.buffers[k].dtype) for k, b in buffers.items()}


def _params_are_sharded(inner: precision) -> bool:
    """Whether params are sharded outside: autocast's copies of unsharded params would stay alive until the backward."""
    outside = () if inner.within is None else inner.within.transforms
    return any(getattr(transform, "stage", 0) == 3 for transform in outside)
