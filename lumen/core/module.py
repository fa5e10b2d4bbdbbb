"""`lm.pure`: a torch module as a pure function of its params and buffers (primitive P0)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lumen.core import _torch_compat, rules
from lumen.core.buffers import Merge, Merges, is_marking, mark_unwritten, merges_of, touched
from lumen.core.primitives import ApplyCall
from lumen.core.rules import Primitive
from lumen.errors import ParamsError, printable


class Pure(NamedTuple):
    """A module taken apart: `apply(params, buffers, *args) -> (out, new_buffers)`, and where to start from.

    >>> import lumen as lm, torch
    >>> apply, params, buffers = lm.pure(torch.nn.BatchNorm1d(2))
    >>> list(params), list(buffers)
    (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
    """

    apply: Apply
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


def pure(module: nn.Module, *, merge: Merges | None = None) -> Pure:
    """Take `module` apart into a pure function, its params and its buffers.

    Both dicts are flat, by fully qualified name in the order of `named_parameters()`; tied weights appear once.
    Parameters with `requires_grad=False` are not differentiated and count as buffers. The tensors are the module's
    own; the function works on a skeleton without memory, so later changes of `module` do not reach it, and `train()`
    or `eval()` mode is the one the module was in.

    `merge` says, by patterns of buffers' names, how the new buffers of parts of a batch make that of the whole batch,
    where several processes or the rows under `lm.dp_sgd` compute them: "sum" adds up the changes from the start of the
    step, "mean" averages by rows, "max", "min" and "any" are over all parts, "first" takes the first part's, "gather"
    joins rows in order, and "sync" says that the module makes the buffer equal everywhere itself. Buffers of BatchNorm
    and other modules of torch have their rules already. A buffer that has none may not change there.

    Raises `ParamsError` for a lazy module that has not seen its first input, and for two parameters in the same memory
    that are not one `nn.Parameter` in two places (updates would move them apart), `PatternError` for a pattern that
    matches no buffer, and `HyperparameterError` for a rule that does not exist or does not suit the buffer's dtype.

    >>> import lumen as lm, torch
    >>> model = lm.pure(torch.nn.Linear(2, 1, bias=False))
    >>> out, buffers = model.apply({"weight": torch.tensor([[1.0, 2.0]])}, {}, torch.ones(3, 2))
    >>> out.tolist()
    [[3.0], [3.0], [3.0]]
    """
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


def _check_memory(named: Mapping[str, Tensor]) -> None:
    """Raise `ParamsError` where two parameters, of which one is trained, lie in the same memory."""
    by_storage: dict[int, list[tuple[int, int, str, bool]]] = {}
    for name, p in named.items():
        extent = 1 + sum(int((size - 1) * stride) for size, stride in zip(p.shape, p.stride(), strict=True))
        if type(p) is nn.Parameter and 0 < p.numel() == extent:  # others may be interleaved without sharing an entry
            begin = int(p.storage_offset()) * p.element_size()
            entry = begin, begin + extent * p.element_size(), name, p.requires_grad
            by_storage.setdefault(_torch_compat.storage_id(p.untyped_storage()), []).append(entry)
    for held in by_storage.values():
        for (_, end, name, trained), (begin, _, other, other_trained) in pairwise(sorted(held)):
            if begin < end and (trained or other_trained):
                raise ParamsError(
                    f"{name!r} and {other!r} are two parameters in the same memory, which updates would move apart."
                    " Make them one: layer.weight = other.weight. peft makes such pairs of adapters: leave"
                    " ensure_weight_tying=True out of its config."
                )


class Apply:
    """The function of a module: `apply(params, buffers, *args, **kwargs) -> (out, new_buffers)`.

    Neither the params nor the given buffers are changed; buffers that the module updates (BatchNorm's running
    statistics) come back as new tensors. `train()` and `eval()` give the function in the other mode.
    """

    def __init__(
        self, skeleton: nn.Module, frozen: frozenset[str] = frozenset(), merges: Mapping[str, Merge] | None = None
    ) -> None:
        self.module = skeleton
        self.frozen = frozen
        self.merges = merges_of(skeleton, None) if merges is None else merges
        self._places = param_slots(skeleton)
        self._names = {name for _, _, name in self._places}
        self._modes: dict[bool, Apply] = {}
        self._variants: dict[Any, Apply] = {}

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """P0: run the module through whatever transforms surround the step."""
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
            self._variants[key] = Apply(module, self.frozen if frozen is None else frozen, self.merges)
        return self._variants[key]

    def forms(self) -> list[Apply]:
        """This function and its variants that were made so far."""
        return [self, *(form for each in self._variants.values() for form in each.forms())]

    def calling(self, function: Callable[..., Any]) -> Apply:
        """The same with `function(module, *args, **kwargs)` in place of the module's forward: another method, say.

        `module` has the given params and buffers for the time of the call. Hooks of the module itself run around the
        whole of it, and not again where `function` calls the module.

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
        given = params
        if buffers:
            given = {**params, **{k: b if k in self.frozen else b.clone() for k, b in buffers.items()}}
        if given.keys() != self._names:
            raise self._mismatch(given)
        before = [table[key] for table, key, _ in self._places]
        try:
            for table, key, name in self._places:
                table[key] = given[name]
            if not buffers:
                return self.module(*args, **kwargs), {}
            if is_marking():
                return self._traced(given, buffers, args, kwargs)
            out = self.module(*args, **kwargs)
            return out, self._after(buffers)
        except RuntimeError as error:
            _explain(error, self.module)
            raise
        finally:
            for (table, key, _), tensor in zip(self._places, before, strict=True):
                table[key] = tensor

    def _after(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stands in the place of `buffers` now, in their order."""
        after = {name: table[key] for table, key, name in self._places if name in buffers}
        return {name: after[name] for name in buffers}

    def _traced(
        self, given: Mapping[str, Tensor], buffers: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the module, and mark the buffers that it does not write to."""
        with touched([given[name] for name in buffers]) as now:
            out = self.module(*args, **kwargs)
        after = self._after(buffers)
        for name, buffer in after.items():
            if now.is_same(given[name], buffer):
                mark_unwritten(buffer)
        return out, after

    def _mode(self, training: bool) -> Apply:
        if self.module.training == training and not self._modes:
            self._modes[training] = self
        if training not in self._modes:
            other = Apply(skeleton_of(self.module).train(training), self.frozen, self.merges)
            other._modes = self._modes
            self._modes.setdefault(self.module.training, self)
            self._modes[training] = other
        return self._modes[training]

    def _mismatch(self, given: Mapping[str, Tensor]) -> ParamsError:
        missing, unexpected = sorted(self._names - given.keys()), sorted(given.keys() - self._names)
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


def _explain(error: RuntimeError, module: nn.Module) -> None:
    """Say what helps where a model of transformers looks at its attention mask's values under vmap."""
    if str(error).startswith("vmap:") and hasattr(module, "set_attn_implementation"):
        error.add_note(
            "lm.dp_sgd and lm.ensemble run a model under vmap, where transformers' attention cannot look whether a"
            " mask masks anything. Write net.set_attn_implementation('eager') before lm.pure(net); an encoder, as BERT,"
            " also needs its mask ready made: attention_mask[:, None, None, :].expand(-1, 1, T, -1).bool()"
        )


def skeleton_of(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors are on the meta device: the structure without the memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        shell = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = shell
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def param_slots(module: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Each table and key where a tensor must stand for a call, with the one name that tied tensors share."""
    first: dict[int, str] = {}
    places = []
    for prefix, sub in module.named_modules(remove_duplicate=True):
        for table in (_torch_compat.own_params(sub), _torch_compat.own_buffers(sub)):
            for key, tensor in table.items():
                if tensor is not None:
                    name = first.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                    places.append((table, key, name))
    return places
