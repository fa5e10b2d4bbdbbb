"""Modules that recompute activations in the backward pass, by `torch.utils.checkpoint`, as parts of a pure function.

When a function that was given to `checkpoint` runs again, `Apply.run` has long taken the params out of the module, and
the rules of the step may be gone: autograd runs the backward pass of a GPU in threads of its own. So each call of
`checkpoint` inside of a model or a loss function records what was there, and its recomputation puts that back:

- the tensors in the modules' tables, and the rules of the step;
- copies of the buffers as they were when the function ran first, so that its second run changes none;
- while a step is recorded, the random draws. A graph would draw new ones, whatever the states of the generators.

A reentrant checkpoint differentiates in `.grad` of leaves, which a pure function does not have. It is computed by the
implementation that is not reentrant. Inside of `torch.func` transforms, which record the computation themselves, a
checkpoint only calls its function.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch.utils.checkpoint
from torch import Tensor, nn

from lumen.core import _torch_compat, rules
from lumen.core.closures import cell_value
from lumen.core.draws import keeping_draws, repeating_draws


class Placement(Protocol):
    """What a recomputation needs of one of the `rules.stack.forwards` that its first run was in."""

    def again(self) -> AbstractContextManager[None]:
        """Entered around the recomputation."""


class TensorPlacement:
    """The tensors in the `slots` of a module that runs, of which `tensors` were put there, `buffers` copied.

    `own` are the modules that the function has, or none where they are unknown. A module whose forward has the
    attribute `recomputes` is all that its own recomputation changes.
    """

    def __init__(
        self,
        own: Sequence[nn.Module],
        slots: list[tuple[dict[str, Any], str, str]],
        tensors: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._tables = [(table, key) for table, key, _ in slots]
        self._contents = [table[key] for table, key in self._tables]
        self._changeable: list[int] = []
        own_tables = {id(table) for module in own for sub in module.modules() for table in _tables_of(sub)}
        is_block = len(own) == 1 and hasattr(vars(own[0]).get("forward"), "recomputes")
        if not is_block and own_tables.issuperset(id(table) for table, _ in self._tables):
            own_tables.clear()
        for index, (table, _, name) in enumerate(slots):
            before = buffers.get(name)
            if before is None or before is tensors[name]:  # a param, or frozen
                continue
            self._changeable.append(index)
            # No version counts a write through `.data`, or one by BatchNorm. So what the function has is copied. Of all
            # buffers of a model each checkpoint would keep copies: there they are made where a write is known.
            current = self._contents[index]
            is_changed = current is not tensors[name] or _torch_compat.version_of(current) > 0
            self._contents[index] = current.clone() if is_changed or id(table) in own_tables else before

    @contextmanager
    def again(self) -> Iterator[None]:
        """Put the tensors back."""
        current = [table[key] for table, key in self._tables]
        tensors = [*self._contents]
        for index in self._changeable:
            tensors[index] = tensors[index].clone()
        try:
            for (table, key), tensor in zip(self._tables, tensors, strict=True):
                table[key] = tensor
            yield
        finally:
            for (table, key), tensor in zip(self._tables, current, strict=True):
                table[key] = tensor


def _tables_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return _torch_compat.own_params(module), _torch_compat.own_buffers(module)


def _modules_of(value: Any, depth: int = 4) -> Iterator[nn.Module]:
    """The modules that a function runs, as far as it holds them: by its closure, as its `self`, in a partial."""
    if isinstance(value, nn.Module):
        yield value
    elif depth:
        for content in _contents_of(value):
            yield from _modules_of(content, depth - 1)


def _contents_of(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, functools.partial):
        return value.func, value.args, [*value.keywords.values()]
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, types.FunctionType):
        return [*map(cell_value, value.__closure__ or ()), *(value.__defaults__ or ())]
    return ()


class _Region:
    """One call of `checkpoint`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._rules = rules.snapshot()
        own = [*_modules_of(function)]
        self._placements: list[Placement] = [capture(own, *args) for capture, *args in rules.stack.forwards]
        self._draws: list[Any] | None = [] if _torch_compat.in_make_fx() else None

    def around(self, inner: Generator[None]) -> Generator[None]:
        """Torch's own work before and after the first run, and this one's."""
        next(inner)
        try:
            with nullcontext() if self._draws is None else keeping_draws(self._draws):
                yield
        except BaseException as error:
            inner.throw(error)
            raise
        yield from inner

    def recomputing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with everything back in its place."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with rules.restored(self._rules), ExitStack() as entered:
                for placement in self._placements:
                    entered.enter_context(placement.again())
                if self._draws is not None:
                    entered.enter_context(repeating_draws(self._draws))
                return function(*args, **kwargs)

        return run


def _only_call() -> Generator[None]:
    yield


def _generator(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Generator[None]:
    """In place of the function that `checkpoint` runs before and after the first run of `function`."""
    if not _is_ours():
        own: Generator[None] = _torch_generator(function, *args, **kwargs)
        return own
    if _torch_compat.peek_interpreter_stack() is not None or not torch.is_grad_enabled():
        return _only_call()
    region = _Region(function)
    return region.around(_torch_generator(region.recomputing(function), *args, **kwargs))


def _reentrant(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """In place of `CheckpointFunction.apply`."""
    if not _is_ours():
        return _torch_reentrant(function, preserve_rng_state, *args)
    checkpoint = torch.utils.checkpoint.checkpoint
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _is_ours() -> bool:
    """Whether this runs inside of a model that Lumen applies, or of a loss that it differentiates."""
    return bool(rules.stack.forwards or rules.stack.in_loss)


# `checkpoint` looks both up when it is called, so a model may have imported it by any name, at any time.
_torch_generator: Any = getattr(torch.utils.checkpoint, _torch_compat.CHECKPOINT_GENERATOR)
_torch_reentrant: Any = torch.utils.checkpoint.CheckpointFunction.apply
setattr(torch.utils.checkpoint, _torch_compat.CHECKPOINT_GENERATOR, _generator)
setattr(torch.utils.checkpoint.CheckpointFunction, "apply", staticmethod(_reentrant))  # noqa: B010 (mypy: a method)
