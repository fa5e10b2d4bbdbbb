"""`lm.pure`: a torch module as a pure function of its params and buffers (primitive APPLY)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lumen.core import _torch_compat, rules
from lumen.core.apply_failure import explain_failure
from lumen.core.arguments import checked
from lumen.core.buffer_rules import Merge, Merges, merges_of
from lumen.core.buffer_writes import is_marking, mark_unwritten, touched
from lumen.core.primitives import ApplyCall
from lumen.core.recompute import TensorPlacement
from lumen.core.rules import Primitive
from lumen.errors import ParamsError, printable


class Pure(NamedTuple):
    """A module as a pure function, `apply(params, buffers, *args) -> (out, new_buffers)`, and its initial tensors.

    >>> import lumen as lm, torch
    >>> apply, params, buffers = lm.pure(torch.nn.BatchNorm1d(2))
    >>> list(params), list(buffers)
    (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
    """

    apply: Apply
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


@checked
def pure(module: nn.Module, *, merge: Merges | None = None) -> Pure:
    """Take `module` apart into a pure function, its params and its buffers.

    Both dicts are flat, by fully qualified name in the order of `named_parameters()`; tied weights appear once.
    Parameters with `requires_grad=False` are not differentiated and count as buffers. The tensors are the module's
    own; the function works on a skeleton without memory, so later changes of `module` do not reach it, and `train()`
    or `eval()` mode is the one the module was in. Of modules from `torch.compile` it takes the originals.

    `merge` says, by patterns of buffers' names, how the new buffers of microbatches are merged into that of the batch,
    where several processes or the rows under `lm.dp_sgd` compute them: "sum" adds up the changes from the start of the
    step, "mean" averages by rows, "max", "min" and "any" reduce over all of them, "first" takes the first, "gather"
    concatenates rows in order, and "sync" declares that the module synchronizes the buffer itself. Buffers of BatchNorm
    and other modules of torch have rules. A buffer without a rule may not change there.

    Raises `ParamsError` for a lazy module that has not seen its first input, for a tensor that a module computed from
    its parameters before (old-style `weight_norm`, `prune`), and for two parameters in the same memory
    that are not one `nn.Parameter` in two places (updates would move them apart), `PatternError` for a pattern that
    matches no buffer, and `HyperparameterError` for a rule that does not exist or does not suit the buffer's dtype.

    >>> import lumen as lm, torch
    >>> model = lm.pure(torch.nn.Linear(2, 1, bias=False))
    >>> out, buffers = model.apply({"weight": torch.tensor([[1.0, 2.0]])}, {}, torch.ones(3, 2))
    >>> out.tolist()
    [[3.0], [3.0], [3.0]]
    """
    module = _uncompiled(module, {})
    _check_leaves(module)
    named = dict(module.named_parameters())
    lazy = [name for name, p in named.items() if is_lazy(p)]
    lazy += [name for name, b in module.named_buffers() if is_lazy(b)]
    if lazy:
        raise ParamsError(
            f"{type(module).__name__} has uninitialized lazy parameters ({', '.join(map(printable, lazy[:4]))}), whose"
            " shapes are not known yet. Run it once before: net(example_input); model = lm.pure(net)"
        )
    _check_memory(named)
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    frozen = {name: p.detach() for name, p in named.items() if not p.requires_grad}
    buffers = {name: b.detach() for name, b in module.named_buffers() if b is not None}
    apply = Apply(skeleton_of(module), frozenset(frozen), merges_of(module, merge))
    return Pure(apply, params, {**buffers, **frozen})


def _uncompiled(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """`module` with the originals of all modules from `torch.compile` in it; itself if there are none."""
    if module not in known:
        original = _torch_compat.uncompiled(module)
        old = _torch_compat.own_modules(original)
        new = {name: None if child is None else _uncompiled(child, known) for name, child in old.items()}
        if any(new[name] is not child for name, child in old.items()):
            original = copy.copy(original)  # the user's own keeps its children
            setattr(original, _torch_compat.MODULES, new)
        known[module] = original
    return known[module]


def _check_leaves(module: nn.Module) -> None:
    """Raise `ParamsError` for a module with a tensor that it computed from its parameters before."""
    for prefix, submodule in module.named_modules():
        for name, value in vars(submodule).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                path = f"{prefix}.{name}" if prefix else name
                raise ParamsError(
                    f"{printable(path)} is a tensor that was computed from parameters, as torch.nn.utils.weight_norm"
                    " and torch.nn.utils.prune leave it, and would not follow their updates. Write"
                    " torch.nn.utils.parametrizations.weight_norm(layer), or after pruning"
                    f" torch.nn.utils.prune.remove(layer, {name!r})."
                )


def _check_memory(named: Mapping[str, Tensor]) -> None:
    """Raise `ParamsError` where two parameters, of which one is trained, share memory."""
    by_storage: dict[int, list[tuple[int, int, str, bool]]] = {}
    for name, p in named.items():
        extent = 1 + sum(int((size - 1) * stride) for size, stride in zip(p.shape, p.stride(), strict=True))
        if type(p) is nn.Parameter and 0 < p.numel() == extent:  # others may be interleaved without sharing an entry
            begin = int(p.storage_offset()) * p.element_size()
            entry = begin, begin + extent * p.element_size(), name, p.requires_grad
            by_storage.setdefault(_torch_compat.storage_id(p.untyped_storage()), []).append(entry)
    for extents in by_storage.values():
        for (_, end, name, trained), (begin, _, other, other_trained) in pairwise(sorted(extents)):
            if begin < end and (trained or other_trained):
                raise ParamsError(
                    f"{name!r} and {other!r} are two parameters in the same memory, and updates would separate them."
                    " Make them one: layer.weight = other.weight. peft makes such pairs of adapters: leave"
                    " ensure_weight_tying=True out of its config."
                )


class Apply:
    """The function of a module: `apply(params, buffers, *args, **kwargs) -> (out, new_buffers)`.

    Params and buffers are not changed in place: buffers that the module updates (BatchNorm's running statistics) are
    returned as new tensors. `train()` and `eval()` return the function in the other mode.
    """

    def __init__(
        self, skeleton: nn.Module, frozen: frozenset[str] = frozenset(), merges: Mapping[str, Merge] | None = None
    ) -> None:
        self.module = skeleton
        self.frozen = frozen
        self.merges = merges_of(skeleton, None) if merges is None else merges
        self._slots = param_slots(skeleton)
        self._names = {name for _, _, name in self._slots}
        self.origin: Apply = self  # of which this is another mode or a variant
        self._modes: dict[bool, Apply] = {}
        self._variants: dict[Any, Apply] = {}

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """APPLY: run the module through whatever transforms surround the step."""
        if not rules.stack.rules[Primitive.APPLY]:
            return self.run(params, buffers, args, kwargs)
        return rules.bind(Primitive.APPLY, _apply, ApplyCall(self, params, buffers, args, kwargs))  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"Apply({type(self.module).__name__}, {'train' if self.module.training else 'eval'})"

    def eval(self) -> Apply:
        """The same function in evaluation mode (dropout off, BatchNorm on its running statistics)."""
        return self._mode(False)

    def train(self) -> Apply:
        """The same function in training mode."""
        return self._mode(True)

    def variant(self, key: Any, change: Callable[[nn.Module], None], frozen: frozenset[str] | None = None) -> Apply:
        """This function over a skeleton that `change` has modified; made once for each `key`.

        Where the skeleton then has other frozen tensors, `frozen` names them all.
        """
        if key not in self._variants:
            module = skeleton_of(self.module)
            change(module)
            variant = Apply(module, self.frozen if frozen is None else frozen, self.merges)
            variant.origin = self.origin
            self._variants[key] = variant
        return self._variants[key]

    def forms(self) -> list[Apply]:
        """This function and its variants that were made so far."""
        return [self, *(form for variant in self._variants.values() for form in variant.forms())]

    def calling(self, function: Callable[..., Any]) -> Apply:
        """The same with `function(module, *args, **kwargs)` in place of the module's forward: another method, say.

        `module` has these params and buffers during the call. Hooks of the module itself run once, around `function`,
        and not again where `function` calls the module.

        >>> import lumen as lm, torch
        >>> class Coder(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.eye(2))
        ...     def encode(self, x):
        ...         return x @ self.weight
        >>> model = lm.pure(Coder())
        >>> encode = model.apply.calling(Coder.encode)
        >>> encode(model.params, model.buffers, torch.ones(1, 2))[0]
        tensor([[1., 1.]])
        """

        def change(module: nn.Module) -> None:
            module.__class__ = _calling(type(module), function)

        return self.variant(("calling", function), change)

    def run(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the module with these tensors in place of its own, past all rules."""
        tensors = params
        if buffers:
            tensors = {**params, **{k: b if k in self.frozen else b.clone() for k, b in buffers.items()}}
        if tensors.keys() != self._names:
            raise self._mismatch(tensors)
        before = [table[key] for table, key, _ in self._slots]
        forwards = rules.stack.forwards
        forwards.append((TensorPlacement, self._slots, tensors, buffers))
        try:
            for table, key, name in self._slots:
                table[key] = tensors[name]
            if buffers and is_marking():
                return self._traced(tensors, buffers, args, kwargs)
            out = self.module(*args, **kwargs)
            self._check_replaced(tensors)
            return out, self._after(buffers) if buffers else {}
        except (RuntimeError, TypeError, AttributeError) as error:
            explain_failure(error, self.module, tensors, args, kwargs)
            raise
        finally:
            forwards.pop()
            for (table, key, _), tensor in zip(self._slots, before, strict=True):
                table[key] = tensor

    def _check_replaced(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `ParamsError` for a parameter that the forward pass has replaced, which would be lost."""
        for table, key, name in self._slots:
            tensor = table[key]
            if type(tensor) is nn.Parameter and tensor.requires_grad and tensor is not tensors[name]:
                raise ParamsError(
                    f"the forward pass of {type(self.module).__name__} replaced its parameter {printable(name)!r},"
                    " which only the optimizer changes. What the model updates itself, such as a codebook, is a"
                    f" buffer: self.register_buffer({printable(key)!r}, ...) in its module, and in its forward pass"
                    f" self.{printable(key)} = ... of a tensor."
                )

    def _after(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The current tensors in the slots of `buffers`, in the same order."""
        after = {name: table[key] for table, key, name in self._slots if name in buffers}
        return {name: after[name] for name in buffers}

    def _traced(
        self, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the module, and mark the buffers that it does not write to."""
        with touched([tensors[name] for name in buffers]) as writes:
            out = self.module(*args, **kwargs)
        after = self._after(buffers)
        for name, buffer in after.items():
            if writes.is_same(tensors[name], buffer):
                mark_unwritten(buffer)
        return out, after

    def _mode(self, training: bool) -> Apply:
        if self.module.training == training and not self._modes:
            self._modes[training] = self
        if training not in self._modes:
            other = Apply(skeleton_of(self.module).train(training), self.frozen, self.merges)
            other._modes, other.origin = self._modes, self.origin
            self._modes.setdefault(self.module.training, self)
            self._modes[training] = other
        return self._modes[training]

    def _mismatch(self, tensors: Mapping[str, Tensor]) -> ParamsError:
        missing, unexpected = sorted(self._names - tensors.keys()), sorted(tensors.keys() - self._names)
        return ParamsError(
            f"{type(self.module).__name__} was applied to other params or buffers than it has:"
            f" missing {missing or 'none'}, unexpected {unexpected or 'none'}."
            " Pass the state's own: state.apply(state.params, x), or lm.pure(net).params."
        )


def _calling(kind: type[nn.Module], function: Callable[..., Any]) -> type[nn.Module]:
    """A kind of module whose forward is `function` where it is called from outside, and its own inside of that."""

    class Calling(kind):  # type: ignore[valid-type, misc]
        _inside = False

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return super().forward(*args, **kwargs)
            return super().__call__(*args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return super().forward(*args, **kwargs)
            self._inside = True
            try:
                return function(self, *args, **kwargs)
            finally:
                self._inside = False

    Calling.__name__, Calling.__qualname__ = kind.__name__, kind.__qualname__
    return Calling


def _apply(call: ApplyCall) -> tuple[Any, dict[str, Tensor]]:
    return call.target.run(call.params, call.buffers, call.args, call.kwargs)  # type: ignore[no-any-return]


def skeleton_of(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors are on the meta device: the structure without the memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        shell = nn.Parameter(_on_meta(parameter), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = shell
    for buffer in module.buffers():
        memo[id(buffer)] = _on_meta(buffer)
    return copy.deepcopy(module, memo)


def _on_meta(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return torch.empty_like(tensor, device="meta")
    # `empty_like` of a tensor on the meta device imports SymPy, which takes a second.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def param_slots(module: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """The table and key of each tensor of a module, with its name; tied tensors share one name."""
    first: dict[int, str] = {}
    slots = []
    for prefix, sub in module.named_modules(remove_duplicate=True):
        for table in (_torch_compat.own_params(sub), _torch_compat.own_buffers(sub)):
            for key, tensor in table.items():
                if tensor is not None:
                    name = first.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                    slots.append((table, key, name))
    return slots
