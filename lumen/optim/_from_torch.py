"""Any `torch.optim` optimizer as a transform whose state is a pytree."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import distributed, rules
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.errors import HyperparameterError, PurityError
from lumen.optim import _fused_kernels
from lumen.optim._base import GradientTransformation, clone
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule

Memory = dict[str, Any]

_ELEMENTWISE = (  # torch's elementwise rules
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"),
)


@pytree_dataclass
class TorchState:
    """A torch optimizer's state: for each leaf a dict of its tensors.

    `count` and `hparams` are on the CPU, where the optimizer reads them. `numbers` names the entries that it keeps as
    Python numbers.
    """

    count: Tensor
    memory: Any
    hparams: HParams
    numbers: tuple[str, ...] = static()


@checked
def from_torch(optimizer: type[torch.optim.Optimizer], **kwargs: Any) -> GradientTransformation:
    """The optimizer class `optimizer`, built with `kwargs`, as a transform.

    The results are bitwise those of the torch optimizer. It runs in eager mode only, because torch optimizers change
    tensors in place: not under `vmap`, `lm.compile` or differentiation. The learning rate is in
    `opt_state.hparams["lr"]` and may be a schedule. Gradients get the memory layout of their params, as autograd
    gives `.grad`. The optimizer chooses the dtype of its state: torch's optimizers keep the moments of 16-bit
    params in 16 bits, where small changes are rounded away; `lm.optim.adamw` keeps them in float32.

    Args:
        optimizer: the class, of torch or of another library.
        **kwargs: its arguments, without the params.

    Raises:
        HyperparameterError: the class rejects the arguments, needs a closure, or keeps memory outside its
            state; or, at init, its fused kernel in this version of torch is wrong for the dtype of a param.
        PurityError: at an update under tracing, vmap or differentiation.

    >>> import torch, lumen as lm
    >>> tx = lm.optim.from_torch(torch.optim.Adamax, lr=0.5)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = tx.apply({"w": torch.tensor([2.0, -1.0])}, tx.init(params), params)
    >>> params["w"]
    tensor([0.5000, 1.5000])
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise HyperparameterError(
            f"{optimizer.__name__}.step needs a closure that evaluates the loss again, which is not"
            " possible in an update from computed gradients."
        )
    lr: ScalarOrSchedule | None = kwargs.pop("lr", None)
    defaults = _build(optimizer, [torch.zeros(1, 1)], kwargs, None).defaults
    lr = defaults.get("lr") if lr is None else lr
    hyper = Hyper(lr)
    rule = _TorchRule(optimizer, kwargs, hyper)
    reason = f"from_torch({optimizer.__name__}) is not known to be elementwise"
    return GradientTransformation(
        rule.init, rule.update, rule.fused, needs_full_tensors="" if _is_elementwise(optimizer) else reason
    )


def _is_elementwise(optimizer: type[torch.optim.Optimizer]) -> bool:
    return optimizer.__module__.startswith("torch.optim.") and optimizer.__name__ in _ELEMENTWISE


class _TorchRule:
    def __init__(self, optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any], hyper: Hyper) -> None:
        self.optimizer = optimizer
        self.kwargs = kwargs
        self.hyper = hyper

    def init(self, params: Any) -> TorchState:
        """The initial state. Torch creates it at the first step, so this runs one step on copies."""
        self._check_kernel(params)
        count, hparams = self.hyper.init({"cpu": torch.zeros(())})
        leaves, spec = tree.flatten(clone(params))
        _, lr = self._lr(count, hparams)
        memories = self._step(leaves, [torch.zeros_like(leaf) for leaf in leaves], None, lr)
        numbers = {key for memory in memories for key, value in memory.items() if isinstance(value, int | float)}
        unknown = {key: value for memory in memories for key, value in memory.items() if not _is_value(value)}
        if unknown:
            raise HyperparameterError(
                f"{self.optimizer.__name__} keeps values in its state that are neither tensors nor numbers: {unknown!r}"
            )
        blank = [{key: torch.zeros_like(_as_tensor(value)) for key, value in memory.items()} for memory in memories]
        return TorchState(count, tree.unflatten(spec, blank), hparams, tuple(sorted(numbers)))

    def update(self, grads: Any, state: TorchState, params: Any) -> tuple[Any, TorchState]:
        leaves = tree.leaves(params) + tree.leaves(grads)
        if rules.is_tracing() or not _fused_kernels.allowed(leaves):
            raise PurityError(
                f"from_torch({self.optimizer.__name__}) runs in eager mode only: it changes tensors in place, which"
                " vmap, lm.compile and differentiation cannot follow. Use one of lm.optim's own optimizers there, such"
                " as lm.optim.adamw."
            )
        new_params, state = clone((params, state))
        state = self.fused(grads, state, new_params, None)
        return tree.map(torch.sub, new_params, params), state

    def fused(self, grads: Any, state: TorchState, params: Any, skip: Tensor | None) -> TorchState:
        if skip is not None and bool(skip):
            return state
        leaves, spec = tree.flatten(params)
        hparams, lr = self._lr(state.count, state.hparams)
        memory_leaves: list[Any] = spec.flatten_up_to(state.memory)
        grad_leaves: list[Any] = spec.flatten_up_to(grads)
        memories = None
        if int(state.count) > 0:
            memories = [
                {k: v.item() if k in state.numbers else v for k, v in memory.items()} for memory in memory_leaves
            ]
        memories = self._step(leaves, grad_leaves, memories, lr)
        new_memories = [{key: _as_tensor(value) for key, value in memory.items()} for memory in memories]
        return TorchState(state.count + 1, tree.unflatten(spec, new_memories), hparams, state.numbers)

    def _check_kernel(self, params: Any) -> None:
        """Raise `HyperparameterError` for a fused kernel that computes wrong updates for these params."""
        if not self.kwargs.get("fused") or distributed.is_dry_run():
            return
        for dtype, device in {(leaf.dtype, leaf.device): None for leaf in tree.leaves(params)}:
            key = (self.optimizer, dtype, device.type)
            if key not in _works:
                _works[key] = _fused_works(self.optimizer, self.kwargs, dtype, device)
            if not _works[key]:
                name = self.optimizer.__name__
                own = f" or lm.optim.{name.lower()}" if name.lower() in ("sgd", "adam", "adamw", "adagrad") else ""
                raise HyperparameterError(
                    f"from_torch({name}, fused=True): the fused kernel of torch {torch.__version__} gives wrong numbers"
                    f" for {dtype} params on {device.type}. Write lm.optim.from_torch(torch.optim.{name}, fused=False,"
                    f" ...){own}."
                )

    def _lr(self, count: Tensor, hparams: HParams) -> tuple[HParams, float | None]:
        if not self.hyper.has_lr:
            return hparams, None
        lr, hparams = self.hyper.lr(count, hparams)
        return hparams, lr.item()

    def _step(
        self, params: list[Tensor], grads: list[Tensor], memories: list[Memory] | None, lr: float | None
    ) -> list[Memory]:
        """One step of a new optimizer that starts from `memories`; params change in place."""
        aliases = [_walkable(p.detach()) for p in params]  # the user's own tensors get no `.grad`
        for alias, grad in zip(aliases, grads, strict=True):
            alias.grad = _with_strides_of(grad, alias, alias.dtype)
        optimizer = _build(self.optimizer, aliases, self.kwargs, lr)
        if memories is not None:
            for alias, memory in zip(aliases, memories, strict=True):
                optimizer.state[alias] = {
                    k: _with_strides_of(v, alias, v.dtype) if isinstance(v, Tensor) and v.shape == alias.shape else v
                    for k, v in memory.items()
                }
        before = [_options(group) for group in optimizer.param_groups]
        optimizer.step()
        if [_options(group) for group in optimizer.param_groups] != before:
            raise HyperparameterError(
                f"{self.optimizer.__name__} keeps memory in its param_groups, which cannot be carried in a pytree."
            )
        for alias, param in zip(aliases, params, strict=True):
            if alias.data_ptr() != param.data_ptr():
                param.copy_(alias)
        return [dict(optimizer.state[alias]) for alias in aliases]


_works: dict[tuple[Any, torch.dtype, str], bool] = {}  # whether the fused kernel is right, by optimizer, dtype, device


def _fused_works(
    optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether one step of the fused kernel matches plain operations in float64, on several vectors of entries."""
    start = torch.linspace(-1.0, 1.0, 1031, dtype=torch.float64, device="cpu").to(device, dtype)
    by_kernel, exact = start.clone(), start.double()
    for param, fused in ((by_kernel, True), (exact, False)):
        param.grad = 0.5 - param
        _build(optimizer, [param], {**kwargs, "fused": fused}, 0.125).step()
    tolerance = 4 * torch.finfo(dtype).eps
    return torch.allclose(by_kernel.double(), exact, rtol=tolerance, atol=tolerance)


def _walkable(leaf: Tensor) -> Tensor:
    """`leaf`, or a copy of it without gaps or overlaps: fused kernels read memory consecutively."""
    dense = leaf.is_contiguous() or torch.empty_like(leaf).stride() == leaf.stride()
    return leaf if dense else leaf.contiguous()


def _with_strides_of(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` with the strides of `like` and in `dtype`, copied if it has others."""
    if value.stride() == like.stride() and value.dtype == dtype:
        return value
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=value.device).copy_(value)


def _build(
    optimizer: type[torch.optim.Optimizer], params: list[Tensor], kwargs: dict[str, Any], lr: float | None
) -> torch.optim.Optimizer:
    if lr is not None:
        kwargs = {**kwargs, "lr": lr}
    try:
        return optimizer(params, **kwargs)
    except (TypeError, ValueError) as error:
        raise HyperparameterError(f"{optimizer.__name__} rejects its arguments: {error}") from error


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params" and not isinstance(value, Tensor)}


def _is_value(value: Any) -> bool:
    return isinstance(value, Tensor | int | float)


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
