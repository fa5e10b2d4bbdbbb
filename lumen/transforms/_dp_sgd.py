"""`lm.dp_sgd`: differentially private SGD."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lumen import random, tree
from lumen.core import _torch_compat, batching, rules
from lumen.core.apply_failure import in_place_explained
from lumen.core.buffers import BufferTracker, merge_rows
from lumen.core.metrics import Mean, is_value, without_rows
from lumen.core.primitives import ApplyCall, Aux, Gradient, GradientCall, UpdateCall
from lumen.core.rules import Next, Primitive, Rule
from lumen.core.step import StepFn, Transform, add_slot, as_step, device_of, field_of, slot, with_slot, without_slot
from lumen.core.undeclared_buffers import Undeclared
from lumen.core.versions import install_extra
from lumen.errors import BatchError, HyperparameterError, PurityError, StateError
from lumen.transforms._support.frozen import frozen_params, without_frozen

_SALT = 0x6470  # separates the noise from random numbers that a step draws from state.key


class dp_sgd(Transform):
    """DP-SGD: clip the gradient of every row to L2 norm `clip`, add Gaussian noise, and average over the rows.

    The noise of an update has standard deviation `noise * clip` on the sum of the clipped gradients. It is drawn from
    `lm.random` with the state's seed and step. `epsilon(...)` computes the privacy budget spent so far (it needs the
    `[dp-sgd]` extra).

    The sum is divided by the number of rows, or by `batch_size` if it is set. Poisson sampling, where each row is drawn
    with the same probability, needs `batch_size`, and the accountant assumes such sampling: the actual number of rows
    is private, so the divisor must be the expected number. Such a batch may be empty: the update is then the noise
    alone, and a loss that is a plain number is 0.

    A param that the state's optimizer freezes (`lm.optim.freeze`) is excluded: its gradient is zero and does not
    contribute to a row's norm.

    Per-row gradients are computed by `vmap`, `chunk` rows at a time (all by default). Declared change: the gradient.
    With `noise=0` and a `clip` above every row's norm, it is the plain mean over rows.

    A buffer that the model changes row by row needs a merge rule, `lm.pure(net, merge=...)`; otherwise `MergeError` is
    raised. Buffers are not private: the statistics that they collect are neither clipped nor noised.

    Raises `PurityError` if the model has BatchNorm in training mode, which mixes rows; `ParamsError` if it uses a
    `torch.autograd.Function` without `setup_context`, as Bloom does; `HyperparameterError` for settings out of range;
    and `StateError` if another optimizer updates params that the state's optimizer freezes.
    Algorithm: Abadi et al. 2016, "Deep Learning with Differential Privacy".

    >>> import lumen as lm
    >>> lm.dp_sgd(clip=1.0, noise=1.1)
    lm.dp_sgd(clip=1.0, noise=1.1)
    """

    name = "dp_sgd"
    level = "dp_sgd"
    reason = "dp_sgd clips each row's gradient before gradients are summed over microbatches or ranks"

    def __init__(self, clip: float, noise: float, *, batch_size: float | None = None, chunk: int | None = None) -> None:
        if not clip > 0.0:
            raise HyperparameterError(f"dp_sgd takes a positive clip (an L2 norm), got {clip!r}.")
        if not noise >= 0.0:
            raise HyperparameterError(f"dp_sgd takes a noise multiplier of at least 0, got {noise!r}.")
        if batch_size is not None and not 0.0 < batch_size < math.inf:
            raise HyperparameterError(
                f"dp_sgd takes a positive batch_size (the expected number of rows), got {batch_size!r}."
            )
        self.clip = clip
        self.noise = noise
        self.batch_size = batch_size
        self.chunk = chunk

    def init(self, state: Any) -> Any:
        """Add the slot: the number of noisy updates so far (int64 scalar)."""
        return add_slot(state, self.name, lambda: torch.zeros((), dtype=torch.int64, device=device_of(state)))

    def export(self, state: Any) -> Any:
        """Drop the slot."""
        return without_slot(state, self.name)

    def epsilon(self, state: Any, *, delta: float, sample_rate: float) -> float:
        """The epsilon spent so far, by Rényi accounting of a Poisson-subsampled Gaussian mechanism.

        `sample_rate` is the probability with which each row is drawn: the expected batch size (the `batch_size` of
        `dp_sgd`) divided by the size of the data set. Needs the `[dp-sgd]` extra.
        """
        try:
            from dp_accounting import dp_event, rdp
        except ImportError as error:
            raise ImportError(f"epsilon needs an accountant: {install_extra('dp-sgd')}") from error
        steps = int(slot(state, self.name))
        if steps == 0:
            return 0.0
        event = dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(self.noise))
        accountant = rdp.RdpAccountant()
        accountant.compose(event, steps)
        return float(accountant.get_epsilon(delta))

    def wrap(self, step: StepFn) -> StepFn:
        """The step with private gradients."""
        for inner in as_step(step).transforms:
            if getattr(getattr(inner, "policy", None), "loss_scale", None) is not None:
                raise HyperparameterError(
                    f"{inner!r} scales the loss and must detect overflow in each gradient, but lm.dp_sgd clips"
                    ' gradients row by row. Write lm.precision("bf16"), or a policy with loss_scale=None.'
                )

        undeclared = Undeclared(f"lm.{self.name}")

        def run(state: Any, batch: Any) -> tuple[Any, Any]:
            update_count = slot(state, self.name)
            key = random.fold_in(random.fold_in(random.key(field_of(state, "seed", self.name)), state.step), _SALT)
            unused = frozen_params(getattr(state, "tx", None), getattr(state, "params", None))
            update = _PrivateGradients(self, key, undeclared, unused, getattr(state, "buffers", None))
            handlers: dict[Primitive, Rule] = {
                Primitive.APPLY: update.apply,
                Primitive.GRADIENT: update.gradient,
                Primitive.UPDATE: update.add_noise,
            }
            with rules.rule_context(handlers):
                new, metrics = step(state, batch)
            return with_slot(new, self.name, update_count + update.count), metrics

        return run


class _PrivateGradients:
    """The rules for one step: private gradients, and the noise of its updates."""

    def __init__(
        self, settings: dp_sgd, key: Tensor, undeclared: Undeclared, unused: dict[str, bool], buffers: Any
    ) -> None:
        self.settings = settings
        self.buffers = buffers  # of the state, before the step
        self.unused = unused  # which of the state's params its optimizer freezes, by path
        self.key = key
        self.undeclared = undeclared
        self.tracker = BufferTracker(marks=True)
        self.rows = 0  # since the last update
        self.count = 0  # of updates

    def apply(self, next: Next, call: ApplyCall) -> Any:
        """APPLY: reject models that mix rows, and track buffers."""
        _check_no_batchnorm(call)
        return self.tracker.apply(next, call)

    def gradient(self, next: Next, call: GradientCall) -> Gradient:
        """GRADIENT: the mean of the clipped gradients of all rows, or their sum if the call requests it."""
        size = batching.count(call.batch)
        if not size and self.settings.batch_size is None:
            raise BatchError(
                "lm.dp_sgd got a batch without rows, and divides by their number. For batches that are drawn by chance"
                f" give the expected number: lm.dp_sgd({self.settings.clip}, {self.settings.noise}, batch_size=64)."
            )
        self.rows += size
        batch, count = call.batch, size
        if not size:  # a batch that was drawn by chance may be empty: one dummy row, which counts nothing
            count = 1
            batch = tree.map(lambda x: x.new_zeros((1, *x.shape[1:])) if isinstance(x, Tensor) else x, batch)

        self.tracker.begin()
        call = call.replace(loss_fn=self.tracker.watching(call.loss_fn, call.has_aux))

        def row_gradient(row: Any, lane: Tensor) -> tuple[Any, Any, Any]:
            self.tracker.lane = lane
            row_batch = tree.map(lambda x: x.unsqueeze(0), row)
            result: Gradient = next(call.replace(batch=row_batch, summed=True, engine="func"))
            row_result["first"] = result.replace(loss=None, grads=None, aux=None)
            grads = _clipped(without_frozen(result.grads, self.unused), self.settings.clip)
            return grads, result.loss, () if result.aux is None else result.aux

        row_result: dict[str, Gradient] = {}
        mapped = torch.func.vmap(row_gradient, randomness="different", chunk_size=self.settings.chunk)
        lanes = torch.arange(count, device=tree.tensors(call.params)[0].device)
        with rules.splitting(repr(self.settings)), in_place_explained():
            grads, losses, aux = mapped(batch, lanes)
        self.tracker.lane = None
        grads = tree.map(lambda g: g.sum(0) if size else torch.zeros_like(g[0]), grads)
        loss = Mean(losses.total.sum(), losses.weight.sum())
        if not size:
            loss = tree.map(torch.zeros_like, loss)
        elif not call.summed:
            grads = tree.map(lambda g: g / size, grads)
        scalar = row_result["first"].scalar
        mean_loss = loss.compute() if size else loss.total
        returned_loss = mean_loss if scalar and not call.summed else loss
        return Gradient(
            # A private gradient is a mean over rows, so the loss's own weights must not divide it.
            Mean(loss.total, loss.total.new_full((), size)) if call.summed and not scalar else returned_loss,
            grads,
            None if aux == () else self._aux(aux, count) if size else self._neutral_aux(self._aux(aux, count)),
            scalar,
            size,
        )

    def _check_unused(self, call: UpdateCall) -> None:
        """Raise `StateError` if the update uses gradients that were left out."""
        if not any(self.unused.values()):
            return
        unused_by_tx = dict.fromkeys(tree.paths(call.params), False) | frozen_params(call.tx, call.params)
        used = [name for name, unused in unused_by_tx.items() if self.unused.get(name) and not unused]
        if used:
            raise StateError(
                f"lm.dp_sgd left out the gradients of {', '.join(used[:3])}{', …' * (len(used) > 3)}, because the"
                " state's optimizer freezes these params, but this update uses them. Give the state one optimizer for"
                " all params that are trained: lm.optim.partition({'encoder.*': tx_1}, default=tx_2)."
            )

    def _aux(self, aux: Any, size: int) -> Any:
        """The aux of the batch from the stacked aux of its rows; buffers are merged by their rules."""
        if not isinstance(aux, Aux) or not aux.buffers:
            return _merged(aux, size)
        leaves, spec = tree.flatten(aux.buffers)
        with_origins = list(zip(self.tracker.origins, leaves, strict=True))
        self.undeclared.look([(o, leaf) for o, leaf in with_origins if o.merge is None and not o.frozen], rows=True)
        buffers = tree.unflatten(spec, [merge_rows(origin, leaf) for origin, leaf in with_origins])
        return Aux(buffers, _merged(aux.metrics, size))

    def _neutral_aux(self, aux: Any) -> Any:
        """The aux of the dummy row of an empty batch: metrics of no rows, and the buffers as they were."""
        metrics = aux.metrics if isinstance(aux, Aux) else aux
        metrics = tree.map(lambda leaf: without_rows(leaf, 1), metrics, is_leaf=is_value)
        if not isinstance(aux, Aux):
            return metrics
        is_state = self.buffers is not None and aux.buffers.keys() == self.buffers.keys()
        return Aux(self.buffers if is_state else aux.buffers, metrics)

    def add_noise(self, next: Next, call: UpdateCall) -> tuple[Any, Any]:
        """UPDATE: add noise to the mean gradient, once per update, however many microbatches it has."""
        self._check_unused(call)
        divisor = self.settings.batch_size or self.rows or 1
        std = self.settings.noise * self.settings.clip / divisor
        leaves, spec = tree.flatten(call.grads)
        if divisor != self.rows:  # the grads are a mean over the actual rows
            leaves = [g * (self.rows / divisor) for g in leaves]
        if std:
            base = random.fold_in(self.key, self.count)
            keys = random.split(base, len(leaves))
            leaves = [g + std * random.normal(k, g.shape, g.dtype) for g, k in zip(leaves, keys, strict=True)]
        self.count += 1
        self.rows = 0
        return next(call.replace(grads=tree.unflatten(spec, leaves)))  # type: ignore[no-any-return]


def _clipped(grads: Any, bound: float) -> Any:
    norm = torch.stack([g.square().sum() for g in tree.leaves(grads)]).sum().sqrt()
    factor = (bound / norm.clamp(min=1e-12)).clamp(max=1.0)
    return tree.map(lambda g: g * factor.to(g.dtype), grads)


def _merged(row_aux: Any, size: int) -> Any:
    """The aux of the batch from a tree stacked over rows."""
    return batching.merge_aux([tree.map(lambda x, i=i: x[i], row_aux) for i in range(size)], [1] * size)


def _check_no_batchnorm(call: ApplyCall) -> None:
    for name, module in call.target.module.named_modules():
        if isinstance(module, _torch_compat.BatchNorm) and module.training:
            raise PurityError(
                f"module {name!r} is a {type(module).__name__} in training mode, which mixes the rows of a batch, so"
                " single rows have no gradients to clip. Use nn.GroupNorm or nn.LayerNorm, or state.eval()."
            )
