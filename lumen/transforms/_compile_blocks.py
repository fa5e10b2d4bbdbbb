"""`lm.compile(blocks=...)`: the repeated blocks of a model, compiled one kind at a time.

AOTAutograd traces and differentiates a block as a function of its params, its buffers and its arguments, and compiles
its forward and backward graphs. Blocks that compute the same function share these graphs, so compile time does not grow
with the number of blocks. The rest of the step runs uncompiled.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumen.core import _torch_compat, distributed
from lumen.core.module import param_slots
from lumen.core.primitives import ApplyCall, GradientCall, user_loss
from lumen.core.rules import Next
from lumen.errors import GraphBreakWarning, LumenError
from lumen.transforms._support.compiled_graph import as_compiling, summary_of
from lumen.transforms._support.module_patterns import Pattern, disable_kv_cache, select_modules

CompileFn = Callable[[nn.Module, list[Tensor]], Callable[..., Any]]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_NOT_SETTINGS = (*_torch_compat.MODULE_TABLES, "training")


class Blocks:
    """The compiled blocks of one step.

    `compile_fn(module, example)` compiles a function of tensors; `graph_breaks()` gives the errors that tracing raises
    where it needs the value of a tensor.
    """

    def __init__(
        self, pattern: Pattern | None, requested_by: str, compile_fn: CompileFn, graph_breaks: Callable[[], Any]
    ) -> None:
        self._pattern, self._requested_by = pattern, requested_by
        self._compile_fn, self._graph_breaks = compile_fn, graph_breaks
        self._by_call: dict[Hashable, CompiledBlock | None] = {}
        self._by_graph: dict[Hashable, CompiledBlock] = {}
        self._warned: set[str] = set()
        self._uncompiled_losses: set[Any] = set()
        self._is_paused = False

    def __deepcopy__(self, _memo: Any) -> Blocks:
        return self  # copies of a model share its compiled blocks

    def rule(self, next: Next, call: ApplyCall) -> Any:
        """APPLY: apply the model with its blocks compiled."""
        if distributed.is_dry_run() or self._is_paused:
            return next(call)
        if _torch_compat.peek_interpreter_stack() is not None:
            self.warn("it was called under vmap or torch.func.grad, which cannot transform a compiled block.")
            return next(call)
        return next(call.replace(target=call.target.variant(("compiled", self), self._patch)))

    def gradient(self, next: Next, call: GradientCall) -> Any:
        """GRADIENT: compute a loss that differentiates a block twice, which AOTAutograd cannot, with none compiled."""
        loss_fn = user_loss(call.loss_fn)
        key = getattr(loss_fn, "__code__", loss_fn)
        if key not in self._uncompiled_losses:
            try:
                return next(call)
            except RuntimeError as error:
                if "does not currently support double backward" not in str(error):
                    raise
            self._uncompiled_losses.add(key)
            self.warn("its loss differentiates a block twice, as a gradient penalty does. Write lm.compile()")
        before, self._is_paused = self._is_paused, True
        try:
            return next(call)
        finally:
            self._is_paused = before

    def _patch(self, module: nn.Module) -> None:
        for block in select_modules(module, self._pattern, self._requested_by):
            block.forward = _BlockForward(block, block.forward, self)
        disable_kv_cache(module)

    def find(self, block: _BlockForward, call: BlockCall) -> CompiledBlock | None:
        """The compiled block for this call; None if it cannot be compiled."""
        key = (block.kind, call.signature)
        if key not in self._by_call:
            self._by_call[key] = self._compile(block, call)
        return self._by_call[key]

    def _compile(self, block: _BlockForward, call: BlockCall) -> CompiledBlock | None:
        function = _BlockFunction(block, call)
        try:
            with _no_saved_tensor_hooks():
                graph = (function.traced_code(), call.signature, function.outputs)
            self._compile_graph(graph, function, call.example())
        except self._graph_breaks() as error:
            self.warn(f"it needs the value of a tensor in Python ({type(error).__name__}). Use torch.where", block)
            return None
        except _UncompiledError as error:
            self.warn(str(error), block)
            return None
        except (LumenError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of torch or the model: whatever a tracer or a compiler cannot do
            self.warn(f"its compilation failed: {summary_of(error)}.", block)
            return None
        return self._by_graph[graph]

    def _compile_graph(self, graph: Hashable, function: _BlockFunction, example: list[Tensor]) -> None:
        if graph not in self._by_graph:
            # A step's backward pass runs outside the autocast context of its loss.
            config: Any = _torch_compat.functorch_config
            with _no_saved_tensor_hooks(), config.patch(backward_pass_autocast="off"):
                run = self._compile_fn(function, example)
            self._by_graph[graph] = CompiledBlock(run, function.outputs)

    def warn(self, why: str, block: _BlockForward | None = None) -> None:
        """Warn once for each reason why blocks run uncompiled."""
        if why not in self._warned:
            self._warned.add(why)
            kind = "a model" if block is None else type(block.module).__name__
            warnings.warn(
                f"{self._requested_by}: {kind} runs uncompiled, because {why}", GraphBreakWarning, stacklevel=3
            )


def _no_saved_tensor_hooks() -> contextlib.AbstractContextManager[None]:
    """Hide the tensors that tracing saves from hooks on the tensors that the step saves, such as those of remat."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class OutputStructure(NamedTuple):
    """The structure of a block's return value; `constants` has None for each tensor and a 1-tuple for other leaves."""

    spec: Any
    constants: tuple[Any, ...]


class CompiledBlock(NamedTuple):
    """A compiled function of tensors, and the structure of what the block returns."""

    run: Callable[..., Any]
    outputs: OutputStructure

    def __call__(self, operands: list[Tensor]) -> Any:
        """What the block returns for its params, buffers and tensor arguments."""
        tensors = iter(self.run(*operands))
        leaves = [next(tensors) if leaf is None else leaf[0] for leaf in self.outputs.constants]
        return _torch_compat.torch_pytree.tree_unflatten(leaves, self.outputs.spec)


class BlockCall:
    """One call of a block: its `operands` (params, buffers, tensor arguments) and its constant arguments."""

    def __init__(self, block_tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = _torch_compat.torch_pytree.tree_flatten((args, kwargs))
        self._num_block_tensors = len(block_tensors)
        self.constants = tuple([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves])
        self.operands = [*block_tensors, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]

    def unsupported(self) -> str | None:
        """Why this call cannot be compiled; None if it can."""
        for leaf in self.constants:
            if leaf is not None and not isinstance(leaf[0], _PLAIN):
                return f"it is called with a {type(leaf[0]).__name__}, which is neither a tensor nor a plain value."
        for tensor in self.operands:
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"it is called with tensors of type {type(tensor).__name__}."
        return None

    @property
    def signature(self) -> Hashable:
        """Everything that determines the graph, except for the block itself."""
        kinds = [(t.shape, t.dtype, t.stride(), t.device, t.requires_grad) for t in self.operands]
        first_index: dict[int, int] = {}
        aliases = [first_index.setdefault(id(t), index) for index, t in enumerate(self.operands)]
        return (*kinds, *aliases, self._spec, self.constants, torch.is_grad_enabled(), *_autocast(self.operands))

    def example(self) -> list[Tensor]:
        """The operands, detached from the autograd graph."""
        copies = {id(t): t.detach().requires_grad_(t.requires_grad) for t in self.operands}
        return [copies[id(t)] for t in self.operands]

    def arguments(self, operands: Sequence[Tensor]) -> tuple[Any, Any]:
        """The arguments of a call with other operands: args, and kwargs."""
        inputs = iter(operands[self._num_block_tensors :])
        leaves = [next(inputs) if leaf is None else leaf[0] for leaf in self.constants]
        args, kwargs = _torch_compat.torch_pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs


def _autocast(operands: Sequence[Tensor]) -> list[Any]:
    kinds = {t.device.type for t in operands}
    return [(kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]


class _BlockForward:
    """Replaces a module's `forward` by its compiled version."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], blocks: Blocks) -> None:
        self.module, self.forward, self._blocks = module, forward, blocks
        self.kind: Hashable = None  # equal for blocks that compute the same function of their operands

    def __deepcopy__(self, memo: Any) -> _BlockForward:
        # A copy of a model may be changed before it runs, so its kind is determined again.
        return _BlockForward(copy.deepcopy(self.module, memo), copy.deepcopy(self.forward, memo), self._blocks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kind is None:
            self.kind = _kind_of(self)
            self.slots = list({name: (table, key) for table, key, name in param_slots(self.module)}.values())
            self._hooked = any(_torch_compat.has_hooks(module) for module in list(self.module.modules())[1:])
        call = BlockCall([table[key] for table, key in self.slots], args, kwargs)
        why = (
            "modules inside it have hooks, which would run only once, during compilation."
            if self._hooked
            else call.unsupported()
        )
        if why is not None:
            self._blocks.warn(why, self)
            return self.forward(*args, **kwargs)
        compiled = self._blocks.find(self, call)
        return self.forward(*args, **kwargs) if compiled is None else compiled(call.operands)


class _UncompiledError(Exception):
    """Why a block cannot be compiled."""


class _BlockFunction(nn.Module):
    """A block as a function of its operands, which is what AOTAutograd takes."""

    def __init__(self, block: _BlockForward, call: BlockCall) -> None:
        super().__init__()
        self._block, self._call = (block,), call  # the tuple keeps nn.Module from registering the block's tensors
        self.outputs = OutputStructure(None, ())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the block returns."""
        (block,) = self._block
        replacements = list(zip(block.slots, tensors, strict=False))
        originals = [table[key] for table, key in block.slots]
        args, kwargs = self._call.arguments(tensors)
        try:
            for (table, key), tensor in replacements:
                table[key] = tensor
            with as_compiling():
                returned = block.forward(*args, **kwargs)
            for (table, key), tensor in replacements:
                if table[key] is not tensor:
                    raise _UncompiledError(
                        f"it replaces its buffer {key!r} with another tensor. Change the buffer in place:"
                        f" self.{key}.copy_(new)"
                    )
        finally:
            for (table, key), tensor in zip(block.slots, originals, strict=True):
                table[key] = tensor
        leaves, spec = _torch_compat.torch_pytree.tree_flatten(returned)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise _UncompiledError(
                    f"it returns a {type(leaf).__name__}, which is neither a tensor nor a plain value."
                )
        self.outputs = OutputStructure(spec, tuple([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]))
        return tuple([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def traced_code(self) -> Hashable:
        """The code of the block's forward and backward graph.

        Raises `_UncompiledError` if the block is not a function of its operands.
        """

        example = self._call.example()
        needs_grad = [t.requires_grad and torch.is_grad_enabled() for t in example]

        def joint(*tensors: Tensor) -> Any:
            live = [t.detach().requires_grad_(flag) for t, flag in zip(tensors, needs_grad, strict=True)]
            outputs = self(*live)
            differentiable = [output for output in outputs if output.requires_grad]
            inputs = [t for t, flag in zip(live, needs_grad, strict=True) if flag]
            if not differentiable or not inputs:
                return outputs
            ones = [torch.ones_like(output) for output in differentiable]
            with contextlib.ExitStack() as contexts:
                for device_type in {t.device.type for t in tensors}:
                    contexts.enter_context(torch.autocast(device_type, enabled=False))
                return outputs, torch.autograd.grad(differentiable, inputs, ones, allow_unused=True)

        traced = _torch_compat.record(joint, example)
        return traced.code, *map(_literal, traced.graph.find_nodes(op="get_attr"))


def _literal(node: Any) -> Hashable:
    """The value of a tensor that the block creates from numbers, as `torch.tensor(0.5)` does."""
    tensor = getattr(node.graph.owning_module, node.target)
    if any(user.target is not torch.ops.aten.lift_fresh_copy.default for user in node.users):
        raise _UncompiledError(
            f"it uses a tensor of shape {tuple(tensor.shape)} that is neither an argument nor a param or buffer. Write"
            ' self.register_buffer("name", tensor)'
        )
    return tensor.dtype, tensor.shape, repr(tensor.tolist())


def _kind_of(block: _BlockForward) -> Hashable:
    """What a block is apart from its tensors: classes, modes and attributes by value, other objects by identity."""
    module, forward = block.module, block.forward
    function = forward.__func__ if getattr(forward, "__self__", None) is module else forward  # type: ignore[attr-defined]
    modules = [
        (name, type(submodule), submodule.training, *_attributes(submodule))
        for name, submodule in module.named_modules()
    ]
    return (_ById(function), *(name for _, _, name in param_slots(module)), *modules)


def _attributes(module: nn.Module) -> list[Hashable]:
    """Attributes other than tensors and modules, which are listed elsewhere, and hooks, which run outside."""
    return [
        (name, _comparable(value))
        for name, value in vars(module).items()
        if name not in _NOT_SETTINGS and "_hooks" not in name and not isinstance(value, _BlockForward)
    ]


def _comparable(value: Any) -> Hashable:
    if isinstance(value, float):
        return float, repr(value)  # 0.0 is not -0.0, and nan is nan
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return (type(value), *map(_comparable, value))
    if isinstance(value, dict):
        return (type(value), *((_comparable(key), _comparable(item)) for key, item in value.items()))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_comparable, value))
    return _ById(value)


class _ById:
    """Compares an object by identity, and keeps it alive so that its id is not reused."""

    __slots__ = ("_object",)

    def __init__(self, obj: Any) -> None:
        self._object = obj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self._object is other._object

    def __hash__(self) -> int:
        return id(self._object)
