"""`lm.sam`: sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core import rules, sharding
from lumen.core.primitives import Gradient, GradientCall
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, Transform
from lumen.errors import HyperparameterError
from lumen.optim._clip import global_norm
from lumen.optim._hyperparams import check_scalar
from lumen.optim._numerics import Coefficients, widen
from lumen.transforms._support.frozen import frozen_params, without_frozen

_EPS = 1e-12  # a zero gradient perturbs nothing


class sam(Transform):
    """Take the gradient at the worst params within a distance of `rho`, found by one step up the slope.

    Each gradient is computed twice on the same batch: at the params w, and at `w + rho * g / |g|`, where g is the first
    gradient and |g| its L2 norm over all leaves. The update uses the second. Loss, metrics and buffers are those of the
    first, so BatchNorm counts a batch once. With `adaptive`, distances are relative to the size of each entry (ASAM):
    the perturbation is `rho * w² * g / ||w| * g|`, and useful values of `rho` are about ten times as large.

    Both gradients are those of the full batch: transforms that split it, `lm.accumulate` and the parallel ones, are
    inside. Params that the state's optimizer freezes (`lm.optim.freeze`) are neither perturbed nor counted. Masks of
    dropout are drawn for each of the two gradients; numbers from `lm.random` are the same in both.

    Declared change: the gradient. Law: `sam(0)` is bitwise the step. A step costs twice the time, and memory for
    another copy of the params.

    Raises `HyperparameterError` for a `rho` that is negative or not finite. Algorithms: Foret et al. 2021,
    "Sharpness-Aware Minimization for Efficiently Improving Generalization"; Kwon et al. 2021, "ASAM", with η = 0.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     loss_fn = lambda params, batch: lm.Mean.of(state.apply(params, batch)[0] ** 2)
    ...     loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 2.0)
    >>> state = lm.TrainState.create(net, lm.optim.sgd(0.25))
    >>> new, _ = lm.sam(0.5)(step)(state, torch.ones(1, 1))  # 2.0 - 0.25 * 2 * (2.0 + 0.5)
    >>> new.params["weight"]
    tensor([[0.7500]])
    """

    name = "sam"
    level = "sam"
    reason = "sam perturbs the params by the gradient of the full batch, of all microbatches and ranks"
    incompatible: Mapping[str, str] = {
        "dp_sgd": "the perturbation would depend on gradients without noise, which no privacy budget counts",
        "deepspeed": "its engine keeps the gradients, and sam needs them between two passes. Use lm.fsdp()",
    }

    def __init__(self, rho: float = 0.05, *, adaptive: bool = False) -> None:
        check_scalar("rho", rho, schedule=False)
        if isinstance(rho, Tensor | bool):
            raise HyperparameterError(f"sam takes a number as rho, got {rho!r}. Write lm.sam(0.05).")
        if not isinstance(adaptive, bool):
            raise HyperparameterError(
                f"sam(adaptive={adaptive!r}) must be True or False. Write lm.sam(0.5, adaptive=True)."
            )
        self.rho = rho
        self.adaptive = adaptive

    def wrap(self, step: StepFn) -> StepFn:
        """The step with gradients at perturbed params."""
        if self.rho == 0:
            return step

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            frozen = frozen_params(getattr(state, "tx", None), getattr(state, "params", None))

            def rule(next: Next, call: GradientCall) -> Gradient:
                first: Gradient = next(call)
                direction = without_frozen(first.grads, frozen)
                first = first.replace(grads=None)  # frees the gradients while the second ones are computed
                params = self._perturbed(call.params, direction)
                second: Gradient = next(call.replace(params=params))
                return second.replace(loss=first.loss, aux=first.aux)

            with rules.rule_context({Primitive.GRADIENT: rule}):
                return step(state, batch)

        return run

    def _perturbed(self, params: Any, grads: Any) -> Any:
        """`params` at distance `rho` in the direction of `grads`; of shards where params or grads are sharded."""
        gatherer = self._gatherer_of_grads()
        shards = params if gatherer is None else tree.map(gatherer.shard, params)
        if self.adaptive:
            scaled = tree.map(lambda p, g: widen(p).abs() * widen(g), shards, grads)
            direction = tree.map(lambda p, g: widen(p).abs() * g, shards, scaled)
        else:
            scaled = direction = grads
        factor = Coefficients(self.rho / (global_norm(scaled) + _EPS))

        def perturb(p: Tensor, d: Tensor) -> Tensor:
            distance = widen(d) * factor.like(widen(d))[0]
            if gatherer is not None and p.dim():
                (distance,) = gatherer.gather([distance], p.shape)
            return (widen(p) + distance).to(p.dtype)

        return tree.map(perturb, params, direction)

    def _gatherer_of_grads(self) -> sharding.ParamGatherer | None:
        """What gathers gradients, where they are shards of params that are full: at stage 2 of `lm.fsdp`."""
        transforms = () if self.within is None else self.within.transforms
        shards_grads_only = any(t.level == "parallel" and getattr(t, "stage", 0) == 2 for t in transforms)
        return sharding.param_gatherer() if shards_grads_only else None
