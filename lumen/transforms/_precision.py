"""`lm.precision`: compute in another dtype than the params are kept in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lumen import tree
from lumen.core import rules, sharding
from lumen.core.dtypes import NARROW, wide_dtype
from lumen.core.metrics import Mean
from lumen.core.primitives import ApplyCall, Gradient, GradientCall, UpdateCall
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform, add_slot, device_of, slot, with_slot, without_slot
from lumen.errors import HyperparameterError
from lumen.optim._norms import leaf_norms
from lumen.optim._numerics import widen
from lumen.transforms._support.autocast import Autocast, explained, is_on
from lumen.transforms._support.casts import cast, cast_all, cast_inputs, map_tensors
from lumen.transforms._support.matmul_precision import PRECISIONS, float32_products
from lumen.transforms._support.unapplied import Unapplied

Cast = Literal["autocast", "model"]

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


@pytree_dataclass
class LossScale:
    """The slot of `precision` with loss scaling: the `scale` (float32) and the good steps since it last changed."""

    scale: Tensor
    good: Tensor


class precision(Transform):
    """Compute in another precision: "bf16", "fp16", "tf32", "fp32", "fp64", or a `Policy`.

    In 16 bits, `cast` says what is cast. With "autocast", the default there, each operation of the loss function and of
    the model gets the dtype that `torch.autocast` gives it: matrix products and convolutions compute in 16 bits, what
    needs more digits in float32. Inputs, buffers, and tensors that the model makes stay as they are, so every model
    that runs under `torch.autocast` runs, and a float input such as a time step of 999 is not rounded. It holds for a
    loss that calls `torch.func.functional_call`, or is a plain function of params, as well; not for backward passes,
    whose operations have the dtypes of the forward pass. A weight that is used several times is cast each time, and its
    gradient summed in float32.

    With "model" all params (frozen ones too) and all float inputs are cast where the model is applied, once: often
    faster, with activations of half the size. BatchNorm's and InstanceNorm's params stay as they are, as do all
    buffers. A model that makes float32 tensors of its own, or has buffers of them, may fail then, and inputs lose
    digits; `keep` names arguments of the model's forward that are left alone (`"t"`, or `"batch.t"` in a dict;
    globs). Policies of 32 or 64 bits always cast so, and so does `lm.deepspeed`, whose engine keeps 16-bit params.

    Either way outputs come back in the policy's `output` dtype, in any pytree, dataclass or
    `torch.distributions.Distribution`, and the update runs in the params' own dtype, in which their gradients
    arrive. In `lm.fsdp()` at stage 3, matrices outside of embeddings are cast before they are gathered, as by FSDP's
    `MixedPrecisionPolicy(param_dtype=...)`; they travel, and are kept, in 16 bits.

    "fp16" multiplies the loss by a dynamic scale (Micikevicius et al. 2018), kept in `state.slots["precision"]`: it
    halves after a non-finite gradient, whose update is left out, and doubles after 2,000 good steps. "tf32" is "fp32"
    with matrix products in TF32, on GPUs that have it (compute capability 8.0 and above); torch's own setting for these
    is what it was again when the step has returned.

    Declared change: rounding, and updates left out while the scale is too large.

    Raises:
        HyperparameterError: an unknown name or setting; params of float64, which autocast leaves as they are; a device
            for which torch has no autocast.
        PatternError: `keep` names no argument of the model.
    Warns:
        InexactWarning: once, for a step in which it changes nothing.

    >>> import lumen as lm
    >>> lm.precision("bf16"), lm.precision("bf16", cast="model", keep="t")
    (lm.precision('bf16'), lm.precision('bf16', cast='model', keep='t'))
    """

    name = "precision"
    level = "precision"
    reason = "casts and loss scaling belong to each single gradient computation"

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
                f"precision({self._name!r}, cast='autocast'): torch.autocast computes in 16 bits alone. Leave cast out."
            )
        if self.cast == "autocast" and self.keep:
            raise HyperparameterError(
                f"precision({self._name!r}, keep={self.keep!r}): autocast leaves all inputs as they are. Leave keep"
                " out, or write cast='model'."
            )

    def _canonical(self) -> Mapping[str, Any]:
        default = "autocast" if self.policy.compute in NARROW else "model"
        return {"cast": None if self.cast == default else self.cast, "keep": self.keep or ()}

    def init(self, state: Any) -> Any:
        """Cast params, buffers and optimizer state to the policy's `param`; add the loss scale's slot."""
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
        """Drop the loss scale's slot."""
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
        """The step with torch's setting for products of float32 matrices; a compiled one is compiled under it too."""
        if self.policy.matmul is None:
            return step
        matmul = self.policy.matmul

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            with float32_products(matmul):
                return step(state, batch)

        return run

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """The rule for P0 that casts the model: its params and inputs before, its outputs after."""
        compute = self.policy.compute
        norms = _norm_params(call.target)
        frozen = call.target.frozen - norms
        params = {k: p if k in norms else cast(p, compute) for k, p in call.params.items()}
        buffers_in = {k: cast(b, compute) if k in frozen else b for k, b in call.buffers.items()}
        args, kwargs = cast_inputs(call.target.module, call.args, call.kwargs, compute, self.keep)
        with explained(self, "it makes, or keeps as buffers, tensors of another dtype. Write " + self._autocast()):
            outputs, buffers = next(call.replace(params=params, buffers=buffers_in, args=args, kwargs=kwargs))
        return cast_all(outputs, self.policy.output), _restore_buffer_dtypes(buffers, call, frozen)

    def _autocast(self) -> str:
        if self.policy.compute not in NARROW:
            return "x.to(self.weight.dtype) in the model."
        return f"lm.precision({self._name!r}), which casts for each operation, or x.to(self.weight.dtype) in the model."

    def _adjust(self, old: LossScale, finite: Tensor) -> LossScale:
        grown = old.good + 1 >= self.policy.growth_interval
        up = torch.where(grown, old.scale * 2, old.scale)
        scale = torch.where(finite, up, (old.scale / 2).clamp(min=1.0))
        return LossScale(scale, torch.where(finite & ~grown, old.good + 1, torch.zeros_like(old.good)))


class _Casting:
    """One step with whole models cast."""

    def __init__(self, transform: precision) -> None:
        self._transform = transform
        self._applied = False

    def apply(self, next: Next, call: ApplyCall) -> Any:
        self._applied = True
        return self._transform.apply(next, call)

    def around(self, inputs: Any) -> Any:
        return contextlib.nullcontext()

    def idle(self, state: Any) -> bool:
        """Whether the step was to compute in another dtype than its params', and did not."""
        if self._applied:
            return False
        param = tree.first_tensor(getattr(state, "params", state))
        return param is not None and param.dtype is not self._transform.policy.compute


class _Autocasting:
    """One step under autocast: its loss functions, and its models where they are applied outside of one."""

    def __init__(self, transform: precision) -> None:
        self._policy, self._transform = transform.policy, transform
        self._autocast = Autocast(self._policy.compute)
        self._casts_before_gather = _params_are_sharded(transform)
        self._used = False
        self._loss_depth = 0  # losses; in one of them the user may have switched autocast off around a model

    @contextlib.contextmanager
    def around(self, inputs: Any) -> Iterator[None]:
        self._used = True
        self._loss_depth += 1
        try:
            with self._autocast.over(*inputs):
                yield
        finally:
            self._loss_depth -= 1

    def apply(self, next: Next, call: ApplyCall) -> Any:
        self._used = True
        inputs = call.params, (call.args, call.kwargs)
        autocast: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not self._loss_depth:
            autocast = self._autocast.over(*inputs)
        if self._casts_before_gather and (not self._loss_depth or is_on(*inputs)):
            call = call.replace(params=_matrices_in(call, self._policy.compute))
        advice = f"torch.autocast has no rule for one of its operations. Write lm.precision({self._transform._name!r}"
        with explained(self._transform, advice + ", cast='model'), or cast there: x.to(self.weight.dtype)."), autocast:
            outputs, buffers = next(call)
        return map_tensors(self._widened, outputs), _restore_buffer_dtypes(buffers, call, call.target.frozen)

    def _widened(self, x: Tensor) -> Tensor:
        return x.to(self._policy.output) if x.dtype is self._policy.compute else x

    def idle(self, _state: Any) -> bool:
        """Whether there was neither a loss nor a model."""
        return not self._used


class _Scaling:
    """One step's loss scaling: scale the loss, unscale the grads, skip what overflowed."""

    suits_any_gradient = True  # see `lumen.core.cached_gradient.check_inside`

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self._flags: list[Tensor] = []
        self._differs_by_rank = False  # whether other processes have other flags
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
        answer: Gradient = next(call.replace(loss_fn=scaled_loss))
        inverse = 1.0 / self.scale
        # Those of 16-bit params stay in float32: what had to be scaled to be seen there would be lost again.
        grads = tree.map(lambda g: widen(g) * inverse.to(g.device, wide_dtype(g.dtype)), answer.grads)
        # Where params are kept on the host, so are their gradients, and flags; a scale lives with the loss.
        finite = leaf_norms(tree.leaves(grads)).isfinite().all().to(self.scale.device)
        self._flags.append(finite)
        self._differs_by_rank |= not answer.joint
        self._all_finite = None
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
        if self._all_finite is None:
            # Once for all microbatches, of which other processes may have more.
            self._all_finite = sharding.all_ranks(torch.stack(self._flags).all(), self._differs_by_rank)
        return self._all_finite


def _norm_params(target: Any) -> frozenset[str]:
    """Names of params that belong to batch or instance norms: their statistics need the wider dtype."""
    return _names_of(target, _NORMS, "_norm_params")


def _names_of(target: Any, kinds: tuple[type[nn.Module], ...], key: str) -> frozenset[str]:
    """Names of params that modules of these kinds hold, kept on `target` under `key`."""
    if key not in target.__dict__:
        target.__dict__[key] = frozenset(
            f"{prefix}.{name}" if prefix else name
            for prefix, module in target.module.named_modules()
            if isinstance(module, kinds)
            for name in module._parameters
        )
    return target.__dict__[key]  # type: ignore[no-any-return]


def _restore_buffer_dtypes(buffers: Any, call: ApplyCall, frozen: frozenset[str]) -> Any:
    """What the model made of its buffers, in their own dtypes; frozen params as they were given."""
    return {k: call.buffers[k] if k in frozen else b.to(call.buffers[k].dtype) for k, b in buffers.items()}


def _params_are_sharded(inner: precision) -> bool:
    """Whether params lie in parts outside: what autocast made of them would be kept whole for the backward pass."""
    outside = () if inner.within is None else inner.within.transforms
    return any(getattr(transform, "stage", 0) == 3 for transform in outside)


def _matrices_in(call: ApplyCall, compute: torch.dtype) -> dict[str, Tensor]:
    """Params with those cast that only products read, as far as their names and dims tell."""
    tables = _names_of(call.target, (nn.Embedding, nn.EmbeddingBag), "_tables")
    return {k: cast(p, compute) if p.dim() > 1 and k not in tables else p for k, p in call.params.items()}
