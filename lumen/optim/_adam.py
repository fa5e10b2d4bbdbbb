"""Adam and AdamW: bias-corrected moments of the gradient and of its square."""

from __future__ import annotations

import functools
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.errors import HyperparameterError
from lumen.optim import _fused_kernels, _low_bit_kernels
from lumen.optim._base import GradientTransformation, plain_in_place
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._low_bit import LeafNoise, StateDtype, Storage, loaded, moment_bits, rounded_update, stored
from lumen.optim._numerics import Coefficients, Scalar, as_tree, one_minus_power, widened, zip_map
from lumen.optim._param_names import Selector, selected


@pytree_dataclass
class AdamState:
    """Adam's state: `mu` and `nu` are the moments; `nu_max` is for amsgrad, and otherwise empty."""

    count: Tensor
    mu: Any
    nu: Any
    nu_max: Any
    hparams: HParams


@checked
def adamw(
    lr: ScalarOrSchedule,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    *,
    decay_mask: Selector | None = None,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    state_dtype: StateDtype = None,
    stochastic_rounding: bool = False,
) -> GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, "Decoupled Weight Decay Regularization").

    `p <- p − lr · (m̂ / (√(v̂ + eps_root) + eps) + weight_decay · p)`, with the moments of `adam`.

    Args:
        lr: a number, a 0-d tensor, or a schedule.
        betas: the decay rates of the two moments, in [0, 1).
        eps: added to the root.
        weight_decay: decay by `lr · weight_decay` at each step.
        decay_mask: which leaves decay: a glob or compiled regex on the dotted name, several of them, or a
            predicate `(name, leaf) -> bool`. None means all. `lm.optim.matrices` leaves out norms and biases.
        eps_root: added under the root; keeps meta-gradients finite where a gradient is zero.
        amsgrad: divide by the root of the largest second moment so far (Reddi et al., 2018).
        state_dtype: how the moments are stored. None is the params' own dtype, and float32 for 16-bit params. "int8"
            stores eight bits for each entry and a float32 scale for each block of up to 256 entries of a row, a quarter
            of the bytes; leaves with one dim, fewer than 4,096 entries, or rows of fewer than 32 keep float32. "bf16"
            takes half the bytes. Both are rounded stochastically: to nearest, a mean whose decay rate is above 0.996
            would never fall. torch.float32 and torch.float64 are stored as they are.
        stochastic_rounding: round updated bfloat16 params up or down with the probabilities that make the expectation
            exact, where a step of less than half a unit in the last place would be lost. Params of other dtypes keep
            their rounding.

    Raises:
        HyperparameterError: a value outside its range, NaN included; a `state_dtype` that is unknown, or of low
            bits with `amsgrad`, whose maximum of rounded values would grow by itself.
        PatternError: at init, a pattern in `decay_mask` that matches nothing.
        ParamsError: at init, `stochastic_rounding` for params of which none is bfloat16, or one is float16.

    The fused lowering is bitwise `torch.optim.AdamW(fused=True)`, for states and params that are not rounded
    stochastically.

    Declared change of "int8": where `s` is the largest magnitude in the block of an entry, the first moment becomes one
    of the two levels `±s · (c/127)²` next to it, which are at most `s/63` apart, and the second moment one of the two
    levels `s · (c/255)⁴`, also at most `s/63` apart; a positive one is at least `s · (2/255)⁴`. Over keys, each is
    exact on average, except below that least level. The random bits follow from `hparams["rounding_key"]`, the update
    count and the place of an entry: a resumed run draws those of an uninterrupted one, and a rank of `lm.fsdp` those
    of one process. A rounding has no derivative: an update that is differentiated is rejected.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.adamw(0.1, weight_decay=0.0)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([3.0, -3.0])}, tx.init(params), params)
    >>> params["w"]
    tensor([0.9000, 1.1000])
    """
    hyper = _hyper(lr, betas, eps, weight_decay, eps_root)
    storage = Storage("adamw", state_dtype, stochastic_rounding)
    return _Adam(hyper, decay_mask, decoupled=True, amsgrad=amsgrad, storage=storage).transform()


@checked
def adam(
    lr: ScalarOrSchedule,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    decay_mask: Selector | None = None,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    state_dtype: StateDtype = None,
    stochastic_rounding: bool = False,
) -> GradientTransformation:
    """Adam (Kingma & Ba, 2015), with L2 regularization if `weight_decay` is not zero.

    `m <- β₁ m + (1 − β₁) g`, `v <- β₂ v + (1 − β₂) g²`, `p <- p − lr · m̂ / (√(v̂ + eps_root) + eps)`, where
    `m̂ = m / (1 − β₁ᵗ)`, `v̂ = v / (1 − β₂ᵗ)` and `weight_decay · p` is added to `g` first. The arguments are
    as in `adamw`, `state_dtype` and `stochastic_rounding` with their laws too.

    The fused lowering is bitwise `torch.optim.Adam(fused=True)`.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.adam(0.1)
    >>> opt_state = tx.init({"w": torch.ones(2)})
    >>> lm.optim.learning_rate(opt_state).item()
    0.1
    """
    hyper = _hyper(lr, betas, eps, weight_decay, eps_root)
    storage = Storage("adam", state_dtype, stochastic_rounding)
    return _Adam(hyper, decay_mask, decoupled=False, amsgrad=amsgrad, storage=storage).transform()


@checked
def scale_by_adam(
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    amsgrad: bool = False,
    state_dtype: StateDtype = None,
) -> GradientTransformation:
    """Adam's direction, `m̂ / (√(v̂ + eps_root) + eps)`, without a learning rate: add one behind it in a chain.

    >>> import lumen as lm
    >>> tx = lm.optim.chain(lm.optim.scale_by_adam(), lm.optim.scale_by_learning_rate(1e-3))
    """
    hyper = _hyper(None, betas, eps, 0.0, eps_root)
    storage = Storage("scale_by_adam", state_dtype)
    return _Adam(hyper, None, decoupled=True, amsgrad=amsgrad, storage=storage).transform()


def _hyper(
    lr: ScalarOrSchedule | None,
    betas: tuple[Scalar, Scalar],
    eps: Scalar,
    weight_decay: Scalar,
    eps_root: Scalar,
) -> Hyper:
    return Hyper(
        lr,
        below_one=("beta1", "beta2"),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        eps_root=eps_root,
    )


class _Adam:
    """The update rule with its plain and its fused lowering, for `adam`, `adamw` and `scale_by_adam`."""

    def __init__(
        self,
        hyper: Hyper,
        decay_mask: Selector | None,
        *,
        decoupled: bool,
        amsgrad: bool,
        storage: Storage,
    ) -> None:
        if amsgrad and storage.is_low_bit:
            raise HyperparameterError(
                "amsgrad=True keeps the largest second moment, and the largest of values that are rounded up or down at"
                ' random grows by itself. Leave out amsgrad, or state_dtype="int8" or "bf16".'
            )
        self.hyper = hyper
        self.decay_mask = decay_mask
        self.has_decay = not hyper.is_zero("weight_decay")
        self.decoupled = decoupled
        self.amsgrad = amsgrad
        self.storage = storage
        self.kernel = _torch_compat.fused_adamw_ if decoupled else _torch_compat.fused_adam_

    def transform(self) -> GradientTransformation:
        fusable = self.hyper.has_lr and self.hyper.is_zero("eps_root")  # the kernels need a rate and have no eps_root
        return GradientTransformation(self.init, self.update, self.fused if fusable else None, **self.storage.fields())

    def init(self, params: Any) -> AdamState:
        self._decays(params)  # a pattern without a match fails here, not at the first step
        count, hparams = self.hyper.init(params)
        hparams = self.storage.with_key(hparams, params)
        mu, nu = (self.storage.zeros(params, signed) for signed in (True, False))
        return AdamState(count, mu, nu, self.storage.zeros(params) if self.amsgrad else (), hparams)

    def update(self, grads: Any, state: AdamState, params: Any) -> tuple[Any, AdamState]:
        beta1, beta2, eps, decay, eps_root = self.hyper.values(state.hparams)
        minus_lr, hparams = self.hyper.minus_lr(state.count, state.hparams)
        count = state.count + 1
        step_size = minus_lr / one_minus_power(beta1, count)
        unbias2 = 1 / one_minus_power(beta2, count)
        scalars = Coefficients(1 - beta1, beta2, 1 - beta2, step_size, unbias2, eps_root, eps, decay, minus_lr)

        def leaf(p: Tensor, g: Tensor, m: Any, v: Any, v_max: Any, decays: bool, noise: LeafNoise) -> tuple[Any, ...]:
            g, wide_p, wide_m, wide_v, wide_max = widened(g, p, loaded(m), loaded(v), v_max)
            new1, keep2, new2, step_size, unbias2, eps_root, eps, decay, minus_lr = scalars.like(g)
            if decays and not self.decoupled:
                g = g + decay * wide_p
            wide_m = torch.lerp(wide_m, g, new1)
            wide_v = keep2 * wide_v + new2 * g * g
            largest = wide_v if v_max is None else torch.maximum(wide_max, wide_v)
            update = step_size * wide_m / (torch.sqrt(largest * unbias2 + eps_root) + eps)
            if decays and self.decoupled:
                update = update + minus_lr * decay * wide_p
            bits1, bits2 = moment_bits(noise, m)
            return (
                rounded_update(update, wide_p, p, noise),
                stored(wide_m, m, bits1),
                stored(wide_v, v, bits2),
                None if v_max is None else largest.to(v.dtype),
            )

        decays = as_tree(self._decays(params), params)
        noises = self.storage.noise_tree(state.hparams, state.count, params)
        updates, mu, nu, nu_max = zip_map(leaf, params, grads, state.mu, state.nu, state.nu_max, decays, noises)
        return updates, AdamState(count, mu, nu, nu_max, hparams)

    def fused(self, grads: Any, state: AdamState, params: Any, skip: Tensor | None) -> Any:
        hyper = self.hyper
        cached = _fused_kernels.FusedArgsCache.of(
            _TRIALS[self.decoupled],
            hyper,
            state,
            params,
            state.mu,
            state.nu,
            state.nu_max,
            low_bit=self.storage.is_low_bit,
        )
        if cached is None or any(map(attrgetter("requires_grad"), state.hparams.values())):
            return plain_in_place(self.update, grads, state, params, skip)
        noises = self.storage.noises(state.hparams, state.count, params) if self.storage.is_rounding else []
        if noises and _low_bit_kernels.is_skipped(skip):
            return state
        ps, *moments = cached.lists
        lists = [ps, _fused_kernels.aligned(params, grads), *moments]
        (beta1, beta2, eps, decay, _), lr, hparams = _fused_kernels.scalar_arguments(hyper, state)
        count = _fused_kernels.advance(state.count, skip)
        decaying = self._decays(params)
        batches = _fused_kernels.batches(lists, decaying)
        if noises:
            batches = _low_bit_kernels.batches(lists, decaying, noises, skip)
        for decays, (ps, gs, mus, nus, maxima) in batches:
            kernel_lr, found_inf = _fused_kernels.scalars(ps[0], lr, skip)
            self.kernel(
                ps,
                gs,
                mus,
                nus,
                maxima,
                _fused_kernels.steps(ps, count),
                lr=kernel_lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay if decays else 0.0,
                eps=eps,
                amsgrad=self.amsgrad,
                maximize=False,
                found_inf=found_inf,
            )
        if hparams is state.hparams:
            return state
        hparams = _fused_kernels.select_hparams(state.hparams, hparams, skip)
        return AdamState(state.count, state.mu, state.nu, state.nu_max, hparams)

    def _decays(self, params: Any) -> bool | list[bool]:
        """Whether leaves decay: one flag for all, or one for each leaf."""
        if not self.has_decay:
            return False
        return True if self.decay_mask is None else selected(self.decay_mask, params)


def _examples(decoupled: bool) -> list[_Adam]:
    hyper = _hyper(0.5, (0.5, 0.75), 0.25, 0.25, 0.0)
    storage = Storage("adam", None)
    return [_Adam(hyper, None, decoupled=decoupled, amsgrad=amsgrad, storage=storage) for amsgrad in (False, True)]


_TRIALS = {decoupled: _fused_kernels.Trial(functools.partial(_examples, decoupled)) for decoupled in (False, True)}
