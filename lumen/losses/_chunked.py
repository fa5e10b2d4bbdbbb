"""The sum of weighted cross-entropies of a linear layer's outputs, with its gradients, a chunk of rows at a time.

The gradients are computed in the forward pass, while a chunk's logits are there: its softmax becomes the gradient in
place. The backward pass scales them. Where derivatives of them are asked for, the dense computation is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class VocabularyShard(Protocol):
    """The classes whose rows of the head's weight this rank has, of all classes, which ranks share."""

    @property
    def first(self) -> int:
        """The first class of this rank."""

    @property
    def classes(self) -> int:
        """The number of classes of all ranks."""

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """The "sum" or the "max" over the ranks."""

    def gather(self, logits: Tensor) -> Tensor:
        """The logits of all classes, `[rows, classes]`, of those of this rank; differentiable."""


class Settings(NamedTuple):
    """What makes the loss of a row of its logits, and how many rows make a chunk."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    soft_cap: float | None
    chunk: int
    scale: float = 1.0  # of the logits
    shard: VocabularyShard | None = None


def total_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, settings: Settings
) -> Tensor:
    """The sum of `weights` times the losses of the rows of `hidden`, a 0-d tensor of the dtype of `weights`."""
    needs = _needs((hidden, weight, bias, weights))
    total: Tensor = _Total.apply(hidden, weight, bias, weights, targets, settings, needs)[0]  # type: ignore[no-untyped-call]
    return total


def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Settings, dtype: torch.dtype
) -> Tensor:
    """The loss of each row of `hidden`, `[rows]`, of `dtype`, zero where it is ignored.

    How much each counts is known in the backward pass only, which computes the logits again.
    """
    losses: Tensor = _TokenLosses.apply(hidden, weight, bias, targets, settings, dtype)  # type: ignore[no-untyped-call]
    return losses


def dense_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, targets: Tensor, settings: Settings
) -> Tensor:
    """The same from all logits at once, by operations that may be differentiated any number of times."""
    logits = linear(hidden, weight, bias, weights.dtype)
    if settings.shard is not None:
        logits = settings.shard.gather(logits)
    logits = capped(logits * settings.scale, settings.soft_cap)
    denominator = logits.logsumexp(1)
    picked = logits.gather(1, _classes(targets, settings)[:, None])[:, 0]
    losses = denominator - (1 - settings.label_smoothing) * picked - settings.label_smoothing * logits.mean(1)
    losses = losses + settings.z_loss * denominator.square()
    return torch.where(weights == 0, 0, losses * weights).sum()


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The outputs of a linear layer in `dtype`, from a product in the dtype of `hidden`."""
    logits = (hidden @ weight.to(hidden.dtype).t()).to(dtype)
    return logits if bias is None else logits + bias.to(dtype)


def capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """Soft-capped logits."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def _classes(targets: Tensor, settings: Settings) -> Tensor:
    return torch.where(targets == settings.ignore_index, 0, targets).long()


def _local(classes: Tensor, settings: Settings, rows: int) -> tuple[Tensor, Tensor | None]:
    """The index of each class among this rank's, `[rows, 1]`, and which of them are there; None for all."""
    if settings.shard is None:
        return classes[:, None], None
    index = classes - settings.shard.first
    is_here = (index >= 0) & (index < rows)
    return torch.where(is_here, index, 0)[:, None], is_here


class _Total(torch.autograd.Function):
    """`(total, gradients for hidden, weight, bias and weights)`; a gradient that nobody needs is empty."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        targets: Tensor,
        settings: Settings,
        needs: list[bool],
    ) -> tuple[Tensor, ...]:
        sums = _Sums(hidden, weight, bias, weights, needs)
        own_weight = weight.to(hidden.dtype)
        for start in range(0, len(hidden), settings.chunk):
            rows = slice(start, start + settings.chunk)
            sums.add(rows, hidden[rows], own_weight, bias, weights[rows], targets[rows], settings)
        return sums.outputs(weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.settings, ctx.needs = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Any, ...]:
        inputs, grads = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if torch.is_grad_enabled():  # the gradients may be differentiated in turn
            scaled = _Scaled.apply(scale, *inputs, *grads, ctx.settings, ctx.needs)  # type: ignore[no-untyped-call]
        else:
            scaled = _scaled(scale, grads)
        return *[grad if needed else None for grad, needed in zip(scaled, ctx.needs, strict=True)], None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        def lane(*own: Any) -> Any:
            *tensors, settings, needs = own
            needs = [known or asked for known, asked in zip(needs, _needs(tensors[:4]), strict=True)]
            return _Total.apply(*tensors, settings, needs)  # type: ignore[no-untyped-call]

        return _lane_by_lane(lane, info, in_dims, inputs)


class _Scaled(torch.autograd.Function):
    """The gradients times `scale`, as a function of what they were computed from."""

    @staticmethod
    def forward(scale: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_scaled(scale, inputs[5:9]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *_, ctx.settings, ctx.needs = inputs
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        scale, *inputs, targets = ctx.saved_tensors
        numbers = [i for i, needed in enumerate(ctx.needs) if needed]

        def gradients(scale: Tensor, *own: Tensor) -> Any:
            def loss(*own: Tensor) -> Tensor:
                hidden, weight, bias, weights = _filled(inputs, numbers, own)
                return scale * dense_loss(hidden, weight, bias, weights, targets, ctx.settings)

            return torch.func.grad(loss, tuple(range(len(own))))(*own)

        pull = torch.func.vjp(gradients, scale, *[inputs[i] for i in numbers])[1]
        own_scale, *own = pull(tuple(cotangents[i] for i in numbers))
        return own_scale, *_filled([None] * 4, numbers, own), *[None] * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _lane_by_lane(_Scaled.apply, info, in_dims, inputs)


class _TokenLosses(torch.autograd.Function):
    """The losses of the rows; the gradient is that of their sum, each times its cotangent."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Settings, dtype: torch.dtype
    ) -> Tensor:
        counted = (targets != settings.ignore_index).to(dtype)
        inputs = hidden, weight, bias, counted, targets, settings, [False, False, False, True]
        losses: Tensor = _Total.apply(*inputs)[4]  # type: ignore[no-untyped-call]
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.settings, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Any, ...]:
        *tensors, targets = ctx.saved_tensors
        cotangents = torch.where(targets == ctx.settings.ignore_index, 0, cotangents)
        needed = ctx.needs_input_grad[:3]

        def total(*own: Tensor) -> Tensor:
            hidden, weight, bias = _filled(tensors, numbers, own)
            return total_loss(hidden, weight, bias, targets, cotangents, ctx.settings)

        numbers = [i for i, is_needed in enumerate(needed) if is_needed]
        grads = torch.func.grad(total, tuple(range(len(numbers))))(*[tensors[i] for i in numbers])
        return *_filled([None] * 3, numbers, grads), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        def lane(*own: Any) -> tuple[Tensor]:
            return (_TokenLosses.apply(*own),)  # type: ignore[no-untyped-call]

        (losses,), (dim,) = _lane_by_lane(lane, info, in_dims, inputs)
        return losses, dim


def _needs(inputs: Sequence[Tensor | None]) -> list[bool]:
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]


def _scaled(scale: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    return [grad * scale.to(grad.dtype) for grad in grads]


def _filled(values: Sequence[Any], numbers: Sequence[int], others: Sequence[Any]) -> list[Any]:
    filled = list(values)
    for i, x in zip(numbers, others, strict=True):
        filled[i] = x
    return filled


def _lane_by_lane(function: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """A rule of `torch.vmap`: one lane after the other, each with a chunk of logits of its own."""
    # A list among the inputs has a list of dims.
    dims = [None if isinstance(dim, (list, tuple)) else dim for dim in in_dims]
    lanes = [
        function(*[x if dim is None else x.select(dim, lane) for x, dim in zip(inputs, dims, strict=True)])
        for lane in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(column) for column in zip(*lanes, strict=True))
    return outputs, (0,) * len(outputs)


class _Sums:
    """The total and the gradients, to which the chunks are added."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, needs: list[bool]) -> None:
        nothing = weights.new_empty(0)
        self._needs = needs
        self._total = weights.new_zeros(())
        self._hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else nothing
        self._weight = torch.zeros_like(weight, dtype=weights.dtype) if needs[1] else nothing
        self._bias = torch.zeros_like(bias, dtype=weights.dtype) if bias is not None and needs[2] else nothing
        self._losses = torch.empty_like(weights) if needs[3] else nothing

    def outputs(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """What `_Total` gives, each gradient in the dtype of its input."""
        own_bias = self._bias if bias is None else self._bias.to(bias.dtype)
        return self._total, self._hidden, self._weight.to(weight.dtype), own_bias, self._losses

    def add(
        self,
        rows: slice,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        targets: Tensor,
        settings: Settings,
    ) -> None:
        """Add the losses and gradients of `rows`, which the tensors are those of."""
        z = linear(hidden, weight, bias, weights.dtype)
        if settings.scale != 1:
            z.mul_(settings.scale)
        slope = _cap(z, settings.soft_cap, any(self._needs[:3]))
        classes, is_here = _local(_classes(targets, settings), settings, z.shape[1])
        losses, sizes, denominators = _softmax(z, classes, is_here, settings)
        is_counted = weights != 0
        losses = torch.where(is_counted, losses, 0)
        self._total += (losses * weights).sum()
        if self._needs[3]:
            self._losses[rows] = losses
        if any(self._needs[:3]):
            z.mul_((weights * (1 + 2 * settings.z_loss * denominators) / sizes)[:, None])
            at_target = weights * (settings.label_smoothing - 1)
            z.scatter_add_(1, classes, (at_target if is_here is None else at_target * is_here)[:, None])
            if settings.label_smoothing:
                z.sub_((weights * (settings.label_smoothing / _count(z, settings)))[:, None])
            if slope is not None:
                z.mul_(slope)
            if settings.scale != 1:
                z.mul_(settings.scale)
            z.masked_fill_(~is_counted[:, None], 0)
            self._add_gradients(rows, z, hidden, weight)

    def _add_gradients(self, rows: slice, z: Tensor, hidden: Tensor, weight: Tensor) -> None:
        narrow = z.to(hidden.dtype)
        if self._needs[0]:
            self._hidden[rows] = narrow @ weight
        if self._needs[1] and self._weight.dtype == narrow.dtype:
            self._weight.addmm_(narrow.t(), hidden)
        elif self._needs[1]:
            self._weight += narrow.t() @ hidden
        if self._needs[2]:
            self._bias += z.sum(0)


def _cap(z: Tensor, cap: float | None, needs_slope: bool) -> Tensor | None:
    """Cap the logits `z` in place; returns the derivative."""
    if cap is None:
        return None
    z.div_(cap).tanh_()
    slope = z.square().neg_().add_(1) if needs_slope else None
    z.mul_(cap)
    return slope


def _count(z: Tensor, settings: Settings) -> int:
    return z.shape[1] if settings.shard is None else settings.shard.classes


def _softmax(z: Tensor, classes: Tensor, is_here: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of the rows, and the sums and logarithms of their softmax's denominators.

    Leaves in `z` the softmax's numerators, relative to the largest.
    """
    picked = z.gather(1, classes)[:, 0]
    if is_here is not None:
        picked = torch.where(is_here, picked, 0)
    means = z.sum(1) / _count(z, settings) if settings.label_smoothing else None
    top = z.amax(1, keepdim=True)
    if settings.shard is not None:
        top = settings.shard.reduce(top, "max")
    sizes = z.sub_(top).exp_().sum(1)
    if settings.shard is not None:
        terms = [picked, sizes] if means is None else [picked, sizes, means]
        picked, sizes, *rest = settings.shard.reduce(torch.stack(terms), "sum")
        means = rest[0] if rest else None
    losses = picked * (settings.label_smoothing - 1)
    if means is not None:
        losses -= settings.label_smoothing * means
    denominators = sizes.log().add_(top[:, 0])
    losses += denominators
    if settings.z_loss:
        losses += settings.z_loss * denominators.square()
    return losses, sizes, denominators
