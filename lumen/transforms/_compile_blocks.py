"""The repeated blocks of a model, compiled one kind at a time: `lm.compile(blocks=...)`.

A block is traced and differentiated by AOTAutograd, as a function of its params, its buffers and what it is called
with, and its forward and backward graphs are compiled. Blocks that compute the same share them, so the time that
compiling takes does not grow with their number. The rest of the step runs as it does without.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils import _pytree as torch_pytree

from lumen.core import distributed, rules
from lumen.core.module import param_slots
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Next
from lumen.errors import GraphBreakWarning
from lumen.transforms._support.module_patterns import Pattern, choose, disable_kv_cache

Build = Callable[[nn.Module, list[Tensor]], Callable[..., Any]]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_NO_STATE = ("_parameters", "_buffers", "_modules", "training")


class Blocks:
    """The compiled blocks of one step; `build(module, example)` compiles a function of tensors."""

    def __init__(self, pattern: Pattern | None, requested_by: str, build: Build, breaks: Callable[[], Any]) -> None:
        self._pattern, self._requested_by, self._build, self._breaks = pattern, requested_by, build, breaks
        self._forms: dict[Hashable, Form | None] = {}
        self._graphs: dict[Hashable, Form] = {}
        self._warned: set[str] = set()

    def __deepcopy__(self, _memo: Any) -> Blocks:
        return self  # copies of a model share what has been compiled

    def rule(self, next: Next, call: ApplyCall) -> Any:
        """P0: the model with compiled blocks in place of its own."""
        if distributed.is_dry_run():
            return next(call)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.warn("it was called under vmap or torch.func.grad, which look into what they run.")
            return next(call)
        return next(call.replace(target=call.target.variant(("compiled", self), self._patch)))

    def _patch(self, module: nn.Module) -> None:
        for block in choose(module, self._pattern, self._requested_by):
            block.forward = _Block(block, block.forward, self)
        disable_kv_cache(module)

    def find(self, block: _Block, call: Call) -> Form | None:
        """The compiled form for a call of `block`; None where it cannot be compiled."""
        key = (block.form, call.signature)
        if key not in self._forms:
            self._forms[key] = self._compile(block, call)
        return self._forms[key]

    def _compile(self, block: _Block, call: Call) -> Form | None:
        function = _Function(block, call)
        try:
            with _unhooked():
                graph = (function.graph(), call.signature, function.outputs)
        except self._breaks() as error:
            self.warn(f"it needs the value of a tensor in Python ({type(error).__name__}). torch.where compiles", block)
            return None
        except _UncompiledError as error:
            self.warn(str(error), block)
            return None
        if graph not in self._graphs:
            # A step's backward pass runs outside of the autocast that its loss ran in.
            config: Any = torch._functorch.config
            with _unhooked(), config.patch(backward_pass_autocast="off"):
                self._graphs[graph] = Form(self._build(function, call.example()), function.outputs)
        return self._graphs[graph]

    def warn(self, why: str, block: _Block | None = None) -> None:
        """Say once for each reason that blocks run uncompiled."""
        if why not in self._warned:
            self._warned.add(why)
            kind = "a model" if block is None else type(block.module).__name__
            warnings.warn(f"{self._requested_by}: {kind} runs uncompiled, since {why}", GraphBreakWarning, stacklevel=3)


def _unhooked() -> contextlib.AbstractContextManager[None]:
    """Tracing saves tensors too, which is no matter of those who keep a record of what the step saves (remat)."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class Outputs(NamedTuple):
    """The form of what a block returns; `rest` are its leaves, None where a tensor stands."""

    spec: Any
    constants: tuple[Any, ...]


class Form(NamedTuple):
    """A compiled block."""

    run: Callable[..., Any]
    outputs: Outputs

    def __call__(self, operands: list[Tensor]) -> Any:
        """What the block returns for these operands."""
        tensors = iter(self.run(*operands))
        leaves = [next(tensors) if leaf is None else leaf[0] for leaf in self.outputs.constants]
        return torch_pytree.tree_unflatten(leaves, self.outputs.spec)


class Call:
    """What a block is called with: its own tensors and those among its arguments, and the rest."""

    def __init__(self, own: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self._spec = torch_pytree.tree_flatten((args, kwargs))
        self._own = len(own)
        self.constants = tuple([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves])
        self.operands = [*own, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]

    def unsupported(self) -> str | None:
        """What of it cannot be compiled over, in words."""
        for leaf in self.constants:
            if leaf is not None and not isinstance(leaf[0], _PLAIN):
                return f"it is called with a {type(leaf[0]).__name__}, which is neither a tensor nor plain."
        for tensor in self.operands:
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"it is called with tensors of the kind {type(tensor).__name__}."
        return None

    @property
    def signature(self) -> Hashable:
        """All that decides how it is computed, but for the block itself."""
        kinds = [(t.shape, t.dtype, t.stride(), t.device, t.requires_grad) for t in self.operands]
        first: dict[int, int] = {}
        same = [first.setdefault(id(t), index) for index, t in enumerate(self.operands)]
        return (*kinds, *same, self._spec, self.constants, torch.is_grad_enabled(), *_autocast(self.operands))

    def example(self) -> list[Tensor]:
        """Operands like these, without their history."""
        copies = {id(t): t.detach().requires_grad_(t.requires_grad) for t in self.operands}
        return [copies[id(t)] for t in self.operands]

    def rebuilt(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """The arguments with other tensors."""
        inputs = iter(tensors[self._own :])
        leaves = [next(inputs) if leaf is None else leaf[0] for leaf in self.constants]
        args, kwargs = torch_pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs


def _autocast(operands: Sequence[Tensor]) -> list[Any]:
    kinds = {t.device.type for t in operands}
    return [(kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]


class _Block:
    """A module's forward, compiled."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], blocks: Blocks) -> None:
        self.module, self.forward, self._blocks = module, forward, blocks
        self.form: Hashable = None  # equal for blocks that compute the same function of the same operands

    def __deepcopy__(self, memo: Any) -> _Block:
        # A copy of a model may be changed before it runs, so that its form is to be found again.
        return _Block(copy.deepcopy(self.module, memo), copy.deepcopy(self.forward, memo), self._blocks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.form is None:
            self.form = _form_of(self)
            self.slots = list({name: (table, key) for table, key, name in param_slots(self.module)}.values())
            self._hooked = any(_hooks(module) for module in list(self.module.modules())[1:])
        call = Call([table[key] for table, key in self.slots], args, kwargs)
        why = (
            "modules inside it have hooks, which would run once, when it is compiled."
            if self._hooked
            else call.unsupported()
        )
        if why is not None:
            self._blocks.warn(why, self)
            return self.forward(*args, **kwargs)
        form = self._blocks.find(self, call)
        return self.forward(*args, **kwargs) if form is None else form(call.operands)


class _UncompiledError(Exception):
    """Why a block cannot be compiled."""


class _Function(nn.Module):
    """A block as a function of its operands, in the form that AOTAutograd takes."""

    def __init__(self, block: _Block, call: Call) -> None:
        super().__init__()
        self._block, self._call = (block,), call  # a tuple hides the block's own tensors
        self.outputs = Outputs(None, ())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the block returns."""
        (block,) = self._block
        own = list(zip(block.slots, tensors, strict=False))
        before = [table[key] for table, key in block.slots]
        args, kwargs = self._call.rebuilt(tensors)
        try:
            for (table, key), tensor in own:
                table[key] = tensor
            with rules.tracing:
                returned = block.forward(*args, **kwargs)
            for (table, key), tensor in own:
                if table[key] is not tensor:
                    raise _UncompiledError(
                        f"it puts another tensor in the place of its buffer {key!r}. Change it in place:"
                        f" self.{key}.copy_(new)"
                    )
        finally:
            for (table, key), tensor in zip(block.slots, before, strict=True):
                table[key] = tensor
        leaves, spec = torch_pytree.tree_flatten(returned)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise _UncompiledError(f"it returns a {type(leaf).__name__}, which is neither a tensor nor plain.")
        self.outputs = Outputs(spec, tuple([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]))
        return tuple([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def graph(self) -> Hashable:
        """The text of what the block computes, forward and backward.

        Raises `_UncompiledError` where that is no function of its operands.
        """
        from torch.fx.experimental.proxy_tensor import make_fx

        example = self._call.example()
        needs_grad = [t.requires_grad and torch.is_grad_enabled() for t in example]

        def joint(*tensors: Tensor) -> Any:
            live = [t.detach().requires_grad_(flag) for t, flag in zip(tensors, needs_grad, strict=True)]
            outs = self(*live)
            differentiable = [output for output in outs if output.requires_grad]
            over = [t for t, flag in zip(live, needs_grad, strict=True) if flag]
            if not differentiable or not over:
                return outs
            ones = [torch.ones_like(output) for output in differentiable]
            with contextlib.ExitStack() as off:
                for kind in {t.device.type for t in tensors}:
                    off.enter_context(torch.autocast(kind, enabled=False))
                return outs, torch.autograd.grad(differentiable, over, ones, allow_unused=True)

        traced = make_fx(joint, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
        return traced.code, *map(_literal, traced.graph.find_nodes(op="get_attr"))


def _literal(node: Any) -> Hashable:
    """The value of a tensor that the code writes out, as `torch.tensor(0.5)` does."""
    tensor = getattr(node.graph.owning_module, node.target)
    if any(user.target is not torch.ops.aten.lift_fresh_copy.default for user in node.users):
        raise _UncompiledError(
            f"it uses a tensor of shape {tuple(tensor.shape)} that is neither given to it nor a param or buffer. Write"
            ' self.register_buffer("name", tensor)'
        )
    return tensor.dtype, tensor.shape, repr(tensor.tolist())


def _form_of(block: _Block) -> Hashable:
    """What a block is, without its tensors: classes, modes and attributes by value, other objects by identity."""
    module, forward = block.module, block.forward
    own = forward.__func__ if getattr(forward, "__self__", None) is module else forward  # type: ignore[attr-defined]
    modules = [
        (name, type(submodule), submodule.training, *_attributes(submodule))
        for name, submodule in module.named_modules()
    ]
    return (_Same(own), *(name for _, _, name in param_slots(module)), *modules)


def _attributes(module: nn.Module) -> list[Hashable]:
    """Attributes but for tensors and modules, which have places of their own, and hooks, which run outside."""
    return [
        (name, _mark(value))
        for name, value in vars(module).items()
        if name not in _NO_STATE and "_hooks" not in name and not isinstance(value, _Block)
    ]


def _mark(value: Any) -> Hashable:
    if isinstance(value, float):
        return float, repr(value)  # 0.0 is not -0.0, and nan is nan
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return (type(value), *map(_mark, value))
    if isinstance(value, dict):
        return (type(value), *((_mark(key), _mark(item)) for key, item in value.items()))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(_mark, value))
    return _Same(value)


class _Same:
    """An object that equals itself alone, kept so that no other takes its place."""

    __slots__ = ("_object",)

    def __init__(self, obj: Any) -> None:
        self._object = obj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._object is other._object

    def __hash__(self) -> int:
        return id(self._object)


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
