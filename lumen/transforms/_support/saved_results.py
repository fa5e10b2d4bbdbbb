"""Results of operations that a block keeps for its recomputation, which then takes them instead of computing them.

Two modes, one around a block's first run and one around its recomputation, see every operation below autograd. torch
has such a pair, `torch.utils.checkpoint.create_selective_checkpoint_contexts`. It keeps every result while a step is
traced, has no way to move one to the host, allows one backward pass only, and repeats no random numbers behind an
operation that draws and was skipped.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lumen.core import _torch_compat, distributed
from lumen.core.draws import is_draw
from lumen.errors import StepError

KeepFn = Callable[[Any, int], bool]  # whether to keep the result of an operation, and of which of its calls in a block


class Storage(Protocol):
    """Where kept tensors wait for the backward pass."""

    def pack(self, tensor: Tensor) -> Any:
        """`tensor`, or what it can be restored from."""

    def unpack(self, packed: Any) -> Tensor:
        """The tensor again."""

    def before_write(self, tensor: Tensor) -> None:
        """Called before an operation writes to `tensor`."""


class OnDevice:
    """Keeps tensors where they are."""

    def pack(self, tensor: Tensor) -> Tensor:
        """The tensor itself, without its graph."""
        return alias(tensor)

    def unpack(self, packed: Tensor) -> Tensor:
        """The tensor itself."""
        return alias(packed)

    def before_write(self, tensor: Tensor) -> None:
        """Nothing: writes are noticed where the tensor is used again."""


class SavedResults:
    """The results that one run of a block keeps: of the operations that `keeps` chooses, in `storage`."""

    def __init__(self, keeps: KeepFn, storage: Storage) -> None:
        self.keeps, self.storage = keeps, storage
        self._has_run = False
        self._results: dict[tuple[Any, int], _SavedResult] = {}
        self._owners: dict[int, _SavedResult] = {}  # of memory that the block may still write to

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the block, for the first time or again."""
        is_first, self._has_run = not self._has_run, True
        # Inside of what `lumen.core.recompute` does for a recomputation, which `checkpoint(context_fn=...)` is not.
        with _Keeping(self) if is_first else _Reusing(self):
            out = forward(*args, **kwargs)
        if is_first:
            self._owners.clear()
        return out

    def keep(self, func: Any, index: int, args: Any, kwargs: Any) -> Any:
        """Run an operation, and keep its result."""
        out = func(*args, **kwargs)
        state = _generator_state(out) if is_draw(func, args, kwargs) else None
        result = _SavedResult(self.storage, out, _shapes((args, kwargs)), state)
        self._results[func, index] = result
        for tensor in tensors_of(out):
            self._owners[memory_of(tensor)] = result
        return out

    def before_write(self, tensor: Tensor) -> None:
        """Let a result have memory of its own, if an operation is about to write to it."""
        self.storage.before_write(tensor)
        result = self._owners.pop(memory_of(tensor), None) if self._owners else None
        if result is not None:
            result.copy()

    def reuse(self, func: Any, index: int, args: Any, kwargs: Any) -> Any:
        """The result that was kept."""
        result = self._results.get((func, index))
        if result is None or result.shapes != _shapes((args, kwargs)):
            raise StepError(
                f"remat(save=...): the recomputation of a block calls {func} where its first run did not, or with other"
                " shapes, so the block depends on something that has changed in between. Leave this operation out of"
                " save, or the block out of the pattern."
            )
        return result.again(func)


class _SavedResult:
    """What an operation returned: its tensors in a storage, and the state of the generator that it drew from."""

    def __init__(self, storage: Storage, out: Any, shapes: list[Any], generator_state: _GeneratorState | None) -> None:
        self.shapes = shapes
        self._storage, self._generator_state = storage, generator_state
        leaves, self._structure = _torch_compat.torch_pytree.tree_flatten(out)
        self._leaves = [storage.pack(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._is_written = False
        self._note_versions()

    def _note_versions(self) -> None:
        self._versions = [_torch_compat.version_of(x) if isinstance(x, Tensor) else 0 for x in self._leaves]

    def copy(self) -> None:
        """Copy the tensors: the block writes to them."""
        if not self._is_written:
            self._is_written = True
            self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
            self._note_versions()

    def again(self, func: Any) -> Any:
        """The result, for a recomputation."""
        leaves = [
            self._tensor(func, leaf, version) if is_tensor else leaf
            for leaf, version, is_tensor in zip(self._leaves, self._versions, self._is_tensor, strict=True)
        ]
        if self._generator_state is not None:
            self._generator_state.restore()
        return _torch_compat.torch_pytree.tree_unflatten(leaves, self._structure)

    def _tensor(self, func: Any, leaf: Any, version: int) -> Tensor:
        if isinstance(leaf, Tensor) and _torch_compat.version_of(leaf) != version:
            raise StepError(
                f"remat(save=...) kept a result of {func}, and something outside of the block changed it in place"
                " afterwards. Write that operation out of place (x = x + y instead of x += y, inplace=False), or leave"
                f" {func} out of save."
            )
        tensor = self._storage.unpack(leaf)
        return tensor.clone() if self._is_written else tensor


class _Mode(_torch_compat.TorchDispatchMode):
    """Numbers the calls of each operation in a block; `answer` gives the results that are kept."""

    supports_higher_order_operators = True

    def __init__(self, results: SavedResults, answer: Callable[[Any, int, Any, Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results, self._answer = results, answer
        self._calls: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, or skip it."""
        kwargs = kwargs or {}
        if not is_keepable(func, args, kwargs):
            return func(*args, **kwargs)
        index = self._calls[func]
        self._calls[func] += 1
        if not self._results.keeps(func, index):
            return func(*args, **kwargs)
        return self._answer(func, index, args, kwargs)


class _Keeping(_Mode):
    """Keeps results during the first run of a block."""

    def __init__(self, results: SavedResults) -> None:
        super().__init__(results, results.keep)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, before which what was kept may need memory of its own."""
        for tensor in _written(func, args, kwargs or {}):
            self._results.before_write(tensor)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Reusing(_Mode):
    """Returns what was kept during a recomputation."""

    def __init__(self, results: SavedResults) -> None:
        super().__init__(results, results.reuse)


def is_keepable(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation returns new tensors and writes to none, so that its result can stand for it.

    While a step is traced, `lumen.core.draws` keeps what is drawn, with or without `save`.
    """
    return _returns_new(func) and not (_torch_compat.in_make_fx() and is_draw(func, args, kwargs))


@functools.cache
def _returns_new(func: Any) -> bool:
    schema = getattr(func, _torch_compat.SCHEMA, None)
    if schema is None:  # a higher-order operator, such as flex_attention
        return True
    new = [value for value in schema.returns if "Tensor" in str(value.type)]
    return bool(new) and not schema.is_mutable and all(value.alias_info is None for value in schema.returns)


@functools.cache
def _write_positions(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operation writes to."""
    schema = getattr(func, _torch_compat.SCHEMA, None)
    if schema is None or not schema.is_mutable:
        return ()
    arguments = enumerate(schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for index, name in _write_positions(func):
        yield from tensors_of(args[index] if index < len(args) else kwargs.get(name))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a tree of arguments or results."""
    return [leaf for leaf in _torch_compat.torch_pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _shapes(value: Any) -> list[Any]:
    return [tensor.shape for tensor in tensors_of(value)]


def memory_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    address: int = _torch_compat.storage_id(tensor.untyped_storage())
    return address


def alias(tensor: Tensor) -> Tensor:
    """The same memory and version counter, outside of the graph, which would refer to itself."""
    with _torch_compat.SetExcludeDispatchKeyGuard(_torch_compat.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _GeneratorState:
    """The state of a device's generator behind an operation, for the draws that follow it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state = torch.get_rng_state() if device.type == "cpu" else self._module().get_rng_state(device)

    def restore(self) -> None:
        """Have the generator go on from here."""
        if self._device.type == "cpu":
            torch.set_rng_state(self._state)
        else:
            self._module().set_rng_state(self._state, self._device)

    def _module(self) -> Any:
        return torch.get_device_module(self._device)


def _generator_state(out: Any) -> _GeneratorState | None:
    """What a recomputation that skips a draw must restore; a plan has no numbers."""
    return None if distributed.is_dry_run() else _GeneratorState(tensors_of(out)[0].device)
