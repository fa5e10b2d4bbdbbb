"""Any `torch.optim` optimizer as a transform whose state is a pytree."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import distributed, rules
from lumen.core.arguments import checked
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.errors import HyperparameterError, InexactWarning, PurityError
from lumen.optim import _fused_kernels
from lumen.optim._base import GradientTransformation, clone
from lumen.optim._hyperparams import HParams, Hyper, ScalarOrSchedule
from lumen.optim._stored_values import as_tensor, is_number, restore, store
from lumen.optim._torch_memory import (
    TRIALS,
    Memory,
    attributes,
    changes,
    layouts_of,
    not_carried,
    options_of,
    own_rule,
    unshared,
)

_ELEMENTWISE = (  # torch's elementwise rules
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"),
)


@pytree_dataclass
class TorchState:
    """A torch optimizer's state: for each leaf a dict of its tensors, and for each param group one of what it counts.

    `count` and `hparams` are on the CPU, where the optimizer reads them, and so are the numbers of `groups`. `numbers`
    names the entries that it keeps as Python numbers.
    """

    count: Tensor
    memory: Any
    hparams: HParams
    groups: Any
    numbers: tuple[str, ...] = static()


@checked
def from_torch(optimizer: type[torch.optim.Optimizer], **kwargs: Any) -> GradientTransformation:
    """The optimizer class `optimizer`, built with `kwargs`, as a transform.

    The results are bitwise those of the torch optimizer. It runs in eager mode only, because torch optimizers change
    tensors in place: not under `vmap`, `lm.compile` or differentiation. The learning rate is in
    `opt_state.hparams["lr"]` and may be a schedule. Gradients get the memory layout of their params, as autograd
    gives `.grad`. The optimizer chooses the dtype of its state: torch's optimizers keep the moments of 16-bit
    params in 16 bits, where small changes are rounded away; `lm.optim.adamw` keeps them in float32. What an optimizer
    of another library counts in its param groups is in `opt_state.groups`; lists and dicts in its state, and tensors
    that wrap others, such as quantized moments, are leaves as the tensors that they are made of. One with a training
    mode runs in it, with an `InexactWarning` if it has an evaluation mode with other params.

    Args:
        optimizer: the class, of torch or of another library.
        **kwargs: its arguments, without the params.

    Raises:
        HyperparameterError: the class rejects the arguments, or needs a closure; or, at init, it keeps memory outside
            of its state and its param groups, or its fused kernel in this version of torch is wrong for the dtype of
            a param.
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
            " possible in an update from computed gradients. Train with another optimizer, such as lm.optim.adam(1e-3),"
            " and finish on the module with torch alone: see 'Physics-informed networks' in the recipes."
        )
    lr: ScalarOrSchedule | None = kwargs.pop("lr", None)
    defaults = _build(optimizer, [torch.zeros(1, 1)], kwargs, None).defaults
    if lr is None:  # the constructor's argument, of which some make another rate
        argument = inspect.signature(optimizer).parameters.get("lr")
        lr = argument.default if argument is not None and is_number(argument.default) else defaults.get("lr")
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
        self.of_torch = optimizer.__module__.startswith("torch.optim.")

    def init(self, params: Any) -> TorchState:
        """The initial state. Torch creates it at the first step, so this runs steps on copies."""
        self._check_kernel(params)
        if callable(getattr(self.optimizer, "eval", None)):
            warnings.warn(
                f"{self.optimizer.__name__} has other params for evaluation, for which a loop calls its eval() and a"
                " state has no call: validation sees the params of training. Write lm.optim.schedule_free(...), and"
                " evaluate with lm.optim.schedule_free_eval_params(state.opt_state, state.params).",
                InexactWarning,
                stacklevel=3,
            )
        count, hparams = self.hyper.init({"cpu": torch.zeros(())})
        leaves, spec = tree.flatten(clone(params))
        _, lr = self._lr(count, hparams)
        memories, groups = self._tried(leaves, lr)
        numbers = {key for memory in (*memories, *groups) for key, value in memory.items() if is_number(value)}
        stored = [{key: store(value) for key, value in memory.items()} for memory in memories]
        blank = tree.map(torch.zeros_like, stored)
        blank_groups = [{k: torch.zeros_like(as_tensor(v)) for k, v in group.items()} for group in groups]
        counted = blank_groups if any(blank_groups) else ()
        return TorchState(count, tree.unflatten(spec, blank), hparams, counted, tuple(sorted(numbers)))

    def _tried(self, leaves: list[Tensor], lr: float | None) -> tuple[list[Memory], list[Memory]]:
        """What the optimizer keeps for each leaf and in each param group, from steps on `leaves`, which may change.

        Torch's own optimizers keep nothing in groups. Of others several steps are watched: some count later.
        """
        if self.of_torch:
            try:
                return self._step(leaves, [torch.zeros_like(leaf) for leaf in leaves], None, None, lr)[0], []
            except RuntimeError as error:
                raise self._failure(error) from error
        optimizer = self._built([_walkable(leaf) for leaf in leaves], lr)
        params = [leaf for group in optimizer.param_groups for leaf in group["params"]]
        numbers = attributes(optimizer)
        changed, layouts = self._watched(optimizer, params)
        reason = not_carried(optimizer, numbers, len(params), changed, layouts)
        if reason:
            raise self._refusal(reason)
        return [dict(optimizer.state[leaf]) for leaf in params], changed

    def _watched(self, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> tuple[list[Memory], list[Memory]]:
        """The options of each param group that steps change or may change, and the layout of the state after each step.

        A number that is no argument of the class is one that it counts, even where the first steps leave it alone.
        """
        options = [options_of(group) for group in optimizer.param_groups]
        arguments = inspect.signature(self.optimizer).parameters
        changed: list[Memory] = [
            {key: value for key, value in group.items() if key not in arguments and type(value) in (int, float)}
            for group in options
        ]
        layouts: list[Memory] = []
        for _ in range(TRIALS):
            for leaf in params:
                leaf.grad = torch.full_like(leaf, 0.5)
            try:
                optimizer.step()
            except Exception as error:
                raise self._failure(error) from error
            layouts.append(layouts_of(optimizer, params))
            for known, before, group in zip(changed, options, optimizer.param_groups, strict=True):
                known.update(changes(before, options_of(group), {**known}))
        return changed, layouts

    def _built(self, leaves: list[Tensor], lr: float | None) -> torch.optim.Optimizer:
        """A new optimizer of these leaves, in its training mode if it has one."""
        optimizer = _build(self.optimizer, leaves, self.kwargs, lr)
        train = getattr(optimizer, "train", None)
        if callable(train):
            train()
        return optimizer

    def _like(self, key: str, value: Any, old: Tensor) -> Tensor:
        """What an option of a param group has become, in the dtype that it has in the state."""
        new = as_tensor(value)
        if new.is_floating_point() and not old.is_floating_point():
            raise self._refusal(f"makes {key!r} of its param_groups a float after its first {TRIALS} steps")
        if new.numel() != old.numel():
            raise self._refusal(f"changes the shape of {key!r} of its param_groups after its first {TRIALS} steps")
        return new.to(old.dtype).reshape(old.shape)

    def _refusal(self, text: str) -> HyperparameterError:
        return HyperparameterError(
            f"{self.optimizer.__name__} {text}, which cannot be carried in a state that is a pytree. {self._own_rule()}"
        )

    def _failure(self, error: Exception) -> HyperparameterError:
        return HyperparameterError(
            f"{self.optimizer.__name__} fails at a step with a dense gradient for each param ({type(error).__name__}:"
            f" {error}). {self._own_rule()}"
        )

    def _own_rule(self) -> str:
        own = own_rule(self.optimizer.__name__)
        return f"Write lm.optim.{own}(...){'' if own != 'adamw' else ' or another rule of lm.optim'}."

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
        memories = groups = None
        if int(state.count) > 0:
            memories, groups = (
                [{k: v.item() if k in state.numbers else restore(v) for k, v in memory.items()} for memory in kept]
                for kept in (memory_leaves, state.groups)
            )
        memories, groups = self._step(leaves, grad_leaves, memories, groups, lr, state.groups)
        new_memories = unshared([{key: store(value) for key, value in memory.items()} for memory in memories])
        new_groups = [
            {key: self._like(key, group[key], old) for key, old in olds.items()}
            for group, olds in zip(groups, state.groups, strict=False)
        ]
        return TorchState(state.count + 1, tree.unflatten(spec, new_memories), hparams, new_groups or (), state.numbers)

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
        self,
        params: list[Tensor],
        grads: list[Tensor],
        memories: list[Memory] | None,
        groups: list[Memory] | None,
        lr: float | None,
        counted: Sequence[Memory] = (),
    ) -> tuple[list[Memory], list[Memory]]:
        """One step of a new optimizer that starts from `memories` and `groups`; params change in place.

        `counted` has the options of each param group that may change.
        """
        aliases = [_walkable(p.detach()) for p in params]  # the user's own tensors get no `.grad`
        for alias, grad in zip(aliases, grads, strict=True):
            laid_out = _with_strides_of(grad, alias, alias.dtype)
            # Torch's own leave gradients as they are; others may compute in their memory.
            alias.grad = laid_out.clone() if laid_out is grad and not self.of_torch else laid_out
        optimizer = self._built(aliases, lr)
        if memories is not None:
            for alias, memory in zip(aliases, memories, strict=True):
                optimizer.state[alias] = {
                    k: _with_strides_of(v, alias, v.dtype) if type(v) is Tensor and v.shape == alias.shape else v
                    for k, v in memory.items()
                }
        for group, kept in zip(optimizer.param_groups, groups or (), strict=False):
            group.update(kept)
        before = [options_of(group) for group in optimizer.param_groups]
        optimizer.step()
        after = [options_of(group) for group in optimizer.param_groups]
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            late = sorted(changes(old, new, {}).keys() - (counted[i].keys() if counted else ()))
            if late:
                raise self._refusal(f"changes {late[0]!r} of its param_groups after its first {TRIALS} steps")
        for alias, param in zip(aliases, params, strict=True):
            if alias.data_ptr() != param.data_ptr():
                param.copy_(alias)
        return [dict(optimizer.state[alias]) for alias in aliases], after


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
    except Exception as error:
        text = str(error) if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"
        raise HyperparameterError(
            f"{optimizer.__name__} rejects its arguments, a list of params and {kwargs}: {text}"
        ) from error
