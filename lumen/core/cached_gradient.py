"""The gradient of a `lm.grad_cache` loss in microbatches (GradCache, Gao et al. 2021), in three stages.

The embeddings of every microbatch are computed without a graph; then the loss on all of them, with its gradient in the
embeddings; then every microbatch once more, back from its rows of that gradient. Each backward pass is an ordinary call
of the gradient primitive, so what is inside `accumulate` (loss scaling, autocast) acts on it as on any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, distributed, rules
from lumen.core._torch_compat import in_make_fx
from lumen.core.device import Generators
from lumen.core.draws import refusing_draws
from lumen.core.dtypes import NARROW
from lumen.core.grad_cache import GradCache, is_pair, joined_aux, name_of
from lumen.core.metrics import Mean
from lumen.core.primitives import Aux, Gradient, GradientCall, rewrapped
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.rules import Rule
from lumen.errors import LossError, OrderError

_compared: set[Any] = set()  # the code of each `encode` whose two passes gave the same


def check_inside(settings: Any, inside: Sequence[Rule]) -> None:
    """Raise `OrderError` where a rule inside of `settings` may not suit the gradients that the stages ask for."""
    for rule in inside:
        owner = getattr(rule, "__self__", rule)
        if not getattr(owner, "suits_any_gradient", False):
            name = getattr(rule, "__qualname__", type(rule).__name__)
            raise OrderError(
                f"lm.grad_cache under {settings!r} takes a gradient in the embeddings and hands it to each microbatch,"
                f" and {getattr(owner, 'settings', name)!r}, inside, changes gradients or losses: it would change both."
                f" Apply it outside of {settings!r}, or leave one of them out."
            )


@pytree_dataclass
class Differentiated:
    """What the loss on all rows is differentiated in: params, and the floating leaves of the embeddings."""

    params: Any
    embeddings: list[Tensor]


class CachedGradient:
    """The stages of one gradient: `embed` each call, `loss_call`, `receive` its result, `backward_call` each call.

    `close` at the end leaves torch's generators as the loss on all rows did.
    """

    def __init__(self, cache: GradCache, call: GradientCall) -> None:
        self._cache, self._call = cache, call
        self._embeddings: list[list[Tensor]] = []
        self._spec: tree.Spec | None = None
        self._grads: list[list[Tensor]] = []  # of each microbatch's floating leaves
        self._aux: Any = None
        self._mapped = _torch_compat.peek_interpreter_stack() is not None
        self._graphless = not self._mapped and not _is_live(call)
        self._recorded = in_make_fx()
        has_values = not self._recorded and not distributed.is_dry_run()
        self._generators = Generators((call.params, call.batch)) if has_values else None
        self._states: list[Any] = []
        self._end: Any = None
        code = getattr(inspect.unwrap(cache.encode), "__code__", type(cache.encode))
        self._compares = has_values and not self._mapped and code not in _compared
        self._code = code

    def embed(self, call: GradientCall, real: bool = True) -> Any:
        """Compute the embeddings of a microbatch, and give its aux; not `real` is one that weighs nothing."""
        flattened: list[Any] = []

        def encode(params: Any, batch: Any, *extras: Any) -> Any:
            embeddings, aux = self._cache.encoded(params, batch, extras)
            self._check_aux(aux)
            flattened.append(tree.flatten(embeddings))
            zero = torch.zeros(())
            return (Mean(zero, zero), () if aux is None else aux) if call.has_aux else Mean(zero, zero)

        encode.__wrapped__ = self._cache.encode  # type: ignore[attr-defined]
        if real and self._generators is not None:
            self._states.append(self._generators.get())
        with rules.inside_loss, self._without_graph(), self._without_draws():
            out = rules.call_loss(rewrapped(call.loss_fn, encode), call.params, call.batch, call.extras)
        ((leaves, spec),) = flattened
        if real:
            self._add(leaves, spec)
        return out[1] if call.has_aux else None

    def _add(self, leaves: list[Tensor], spec: tree.Spec) -> None:
        if self._spec is not None and self._spec != spec:
            raise LossError(
                f"{name_of(self._cache.encode)} returned embeddings of one structure for one microbatch, {self._spec},"
                f" and of another for the next, {spec}."
            )
        self._spec = spec
        self._embeddings.append(leaves)

    def _check_aux(self, aux: Aux | None) -> None:
        if aux is not None and not self._call.has_aux:
            raise LossError(
                f"{name_of(self._cache.encode)} returned (embeddings, lm.Aux(...)). Write:"
                " lm.value_and_grad(lm.grad_cache(encode, loss), has_aux=True)."
            )
        if aux is not None:
            self._aux = aux

    def _without_graph(self) -> AbstractContextManager[Any]:
        return torch.no_grad() if self._graphless else nullcontext()

    def _without_draws(self) -> AbstractContextManager[Any]:
        if not self._recorded:
            return nullcontext()
        return refusing_draws(
            f"{name_of(self._cache.encode)} draws random numbers from torch's generators, and lm.compile cannot make"
            " the two passes of lm.grad_cache draw the same. Draw by lm.random from state.key, switch dropout off by"
            " state.eval(), or leave out lm.compile()."
        )

    def loss_call(self) -> GradientCall:
        """The loss on all rows, to be differentiated in params and in the embeddings."""
        leaves = [torch.cat(column) for column in zip(*self._embeddings, strict=True)]
        floating = [leaf for leaf in leaves if leaf.is_floating_point()]
        cache, has_aux, embedded = self._cache, self._call.has_aux, self._aux

        def on_all(inputs: Differentiated, batch: Any, *extras: Any) -> Any:
            live = iter(inputs.embeddings)
            embeddings = tree.unflatten(
                self._spec,  # type: ignore[arg-type]
                [next(live) if leaf.is_floating_point() else leaf for leaf in leaves],
            )

            def loss(params: Any, batch: Any, *extras: Any) -> Any:
                out = cache.compared(params, embeddings, batch, extras)
                return (out, ()) if has_aux and embedded is not None and not is_pair(out) else out

            loss.__wrapped__ = cache.loss  # type: ignore[attr-defined]
            return rewrapped(self._call.loss_fn, loss)(inputs.params, batch, *extras)

        on_all.__wrapped__ = cache.loss  # type: ignore[attr-defined]
        inputs = Differentiated(self._call.params, floating)
        return self._call.replace(loss_fn=on_all, params=inputs, summed=True, reduction=None, grad_sums=None)

    def receive(self, embedding_grads: Sequence[Tensor]) -> None:
        """Take the gradient of the loss in the embeddings of all rows."""
        if self._generators is not None:
            self._end = self._generators.get()
        sizes = [len(leaves[0]) for leaves in self._embeddings]
        columns = [grad.split(sizes) for grad in embedding_grads]
        self._grads = [[column[index] for column in columns] for index in range(len(sizes))]
        if not self._compares:
            self._embeddings = []

    def backward_call(self, call: GradientCall, index: int, real: bool = True) -> GradientCall:
        """The microbatch at `place` again: a loss whose gradient in params is that of the loss through its rows."""

        def through(params: Any, batch: Any, *extras: Any) -> Any:
            if real and self._generators is not None:
                self._generators.set(self._states[index])
            embeddings, aux = self._cache.encoded(params, batch, extras)
            leaves = tree.leaves(embeddings)
            if self._compares and real:
                self._compare(index, leaves)
            floating = [leaf for leaf in leaves if leaf.is_floating_point()]
            total = _tied(_inner_product(floating, self._grads[index]), params)
            loss = Mean(total, torch.ones_like(total.detach()))
            return (loss, () if aux is None else aux) if call.has_aux else loss

        through.__wrapped__ = self._cache.encode  # type: ignore[attr-defined]
        return call.replace(loss_fn=rewrapped(call.loss_fn, through))

    def _compare(self, index: int, recomputed: Sequence[Tensor]) -> None:
        """Raise `LossError` where the embeddings of a microbatch are not what they were without a graph."""
        if _torch_compat.peek_interpreter_stack() is not None:
            return
        for before, now in zip(self._embeddings[index], recomputed, strict=True):
            if not _is_near(before, now.detach()):
                raise LossError(
                    f"{name_of(self._cache.encode)} returned other embeddings when it was called again for the same"
                    " rows, so lm.grad_cache would compute the gradient of another loss. It depends on something that"
                    " is neither an argument nor torch's global generators: a torch.Generator of its own, numpy's or"
                    " Python's random numbers, a counter. Draw from torch's global generators, or by lm.random from"
                    " state.key."
                )

    def close(self) -> None:
        """Leave torch's generators as after the loss on all rows."""
        if self._compares:
            _compared.add(self._code)
        if self._generators is not None:
            self._generators.set(self._end)

    def finished(self, total: Gradient, result: Gradient) -> Gradient:
        """The gradient of all rows: `total` is the sum over microbatches, `result` that of `loss_call`."""
        if self._graphless and any(leaf.requires_grad for leaf in tree.tensors(total.grads)):
            raise LossError(
                f"{self._cache!r} depends on tensors that require grad and are not among params, and the microbatches'"
                " embeddings were computed without a graph. Detach them, make them part of params, or hand them over as"
                " a further argument: lm.value_and_grad(loss_fn)(params, batch, tensor)."
            )
        aux = joined_aux(total.aux, result.aux) if self._call.has_aux else None
        return total.replace(loss=result.loss, scalar=result.scalar, aux=aux, rows=result.rows)


def _is_live(call: GradientCall) -> bool:
    """Whether an enclosing derivative differentiates through the gradient."""
    if not torch.is_grad_enabled():
        return False
    return any(leaf.requires_grad for leaf in tree.tensors((call.params, call.batch, call.extras)))


def _inner_product(leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    terms = [(_wide(leaf) * _wide(grad)).sum() for leaf, grad in zip(leaves, grads, strict=True)]
    return sum(terms[1:], terms[0]) if terms else torch.zeros(())


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in NARROW else x


def _tied(total: Tensor, params: Any) -> Tensor:
    """`total`, differentiable also where embeddings do not depend on params: then with a gradient of zeros."""
    if total.requires_grad or _torch_compat.peek_interpreter_stack() is not None:
        return total
    return total + tree.tensors(params)[0].reshape(-1)[:0].sum()


def _is_near(before: Tensor, now: Tensor) -> bool:
    """Whether two tensors are one but for rounding: kernels may differ where no graph is made."""
    if not now.is_floating_point() or not now.numel():
        return torch.equal(before, now)
    finite = now[now.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(before, now, rtol=0.0, atol=torch.finfo(now.dtype).eps ** 0.5 * largest, equal_nan=True)
