"""`TrainState`: everything that training changes, as one immutable pytree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lumen import random, tree
from lumen.core import rules
from lumen.core.arguments import checked, describe
from lumen.core.brief_repr import brief, count, number, opt_state_text
from lumen.core.buffer_rules import Merges, check_statistics
from lumen.core.donation import retire_updated
from lumen.core.module import Apply, Pure, pure
from lumen.core.primitives import Optimizer, UpdateCall
from lumen.core.pytree_dataclass import dataclass as pytree_dataclass
from lumen.core.pytree_dataclass import static
from lumen.core.rules import Primitive
from lumen.errors import ArgumentError, ParamsError, StateError


@pytree_dataclass
class TrainState:
    """Params, buffers, optimizer state, counters and slots; the model's function and optimizer are static.

    `step` counts calls of `apply_gradients` (int64 scalar), `seed` is an int64 scalar, `slots` holds what transforms
    with memory keep, by their name. Subclass it with `@lm.dataclass` to add fields; one with an entry for each row of
    the batch is an `lm.row_field()`.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1), seed=0)
    >>> sorted(state.params), int(state.step)
    (['bias', 'weight'], 0)
    >>> state
    TrainState(Linear; step 0; params: 2 tensors, 3 numbers, float32 on cpu; SGDState lr 0.1)
    """

    step: Tensor
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    opt_state: Any
    seed: Tensor
    slots: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    apply_fn: Apply = static(kw_only=True)
    tx: Any = static(kw_only=True)

    if TYPE_CHECKING:

        def replace(self, **changes: Any) -> Self:
            """A changed copy; `lm.dataclass` gives it to every state class."""

    @classmethod
    @checked
    def create(
        cls,
        model: Pure | nn.Module,
        tx: Optimizer,
        seed: int = 0,
        *,
        merge: Merges | None = None,
        **fields: Any,
    ) -> Self:
        """A state at step 0 for a module (or `lm.pure(module)`) and an optimizer.

        `merge` gives the rules by which microbatches merge a module's buffers, as in `lm.pure(module, merge=...)`.
        `fields` are those that a subclass adds. The params are the model's own tensors: a donated step changes them,
        so `donate().init(state)` copies them first.

        Warns with `InexactWarning` where BatchNorm's running statistics are 16-bit, as after `net.bfloat16()`.
        """
        if isinstance(model, Pure):
            if merge is not None:
                raise ParamsError("the model is an lm.pure already. Write lm.pure(net, merge={...}).")
        else:
            model = pure(model, merge=merge)
        _check_optimizer(tx)
        if not model.params:
            raise ParamsError("the model has no trainable parameters: each has requires_grad=False, or it has none.")
        check_statistics(model.apply.module, model.buffers)
        first = next(iter(model.params.values()))
        device = torch.device("cpu") if first.is_meta else first.device  # a seed without a value would be none
        return cls(
            step=torch.zeros((), dtype=torch.int64, device=device),
            params=model.params,
            buffers=model.buffers,
            opt_state=tx.init(model.params),
            seed=torch.tensor(seed, dtype=torch.int64, device=device),
            apply_fn=model.apply,
            tx=tx,
            **fields,
        )

    def __repr__(self) -> str:
        params = tree.tensors(self.params)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in params})
        where = f", {'/'.join(dtypes)} on {params[0].device}" if params else ""
        texts = [f"step {number(self.step)}", f"params: {count(params)}{where}"]
        texts += [f"buffers: {count(tree.tensors(self.buffers))}"] if self.buffers else []
        texts += [text] if (text := opt_state_text(self.opt_state)) else []
        kind: Any = type(self)
        base: Any = TrainState
        own = [name for name in kind._dynamic_fields_ if name not in base._dynamic_fields_]
        texts += [f"{name}: {brief(getattr(self, name))}" for name in own]
        texts += [f"slots: {', '.join(self.slots)}"] if self.slots else []
        return f"{type(self).__name__}({type(self.apply_fn.module).__name__}; {'; '.join(texts)})"

    @property
    def key(self) -> Tensor:
        """A random key for this step, from `seed` and `step` (see `lm.random`)."""
        return random.fold_in(random.key(self.seed), self.step)

    def apply(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """APPLY: the model on `args` with these params and the state's buffers: `(out, new_buffers)`."""
        if not hasattr(params, "keys"):
            raise ArgumentError(
                f"state.apply: params is {describe(params)}; it takes the params first, and then what the model takes."
                " Write: out, buffers = state.apply(state.params, x)"
            )
        return self.apply_fn(params, self.buffers, *args, **kwargs)

    def apply_gradients(self, grads: Any, *, buffers: Mapping[str, Tensor] | None = None, **changes: Any) -> Self:
        """UPDATE: the state one update later, with new `buffers` and any other `changes`."""
        if not hasattr(grads, "keys"):
            raise ArgumentError(
                f"state.apply_gradients: grads is {describe(grads)}; it takes gradients by the names of the params."
                " Write: loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)"
            )
        if grads.keys() != self.params.keys():
            raise StateError(
                f"grads and params differ: {'; '.join(tree.differences(self.params, grads))}."
                " Pass the grads that lm.value_and_grad gave for state.params."
            )
        params, opt_state = apply_gradients(self.tx, grads, self.opt_state, self.params)
        if buffers:
            changes["buffers"] = buffers
        new = self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)
        if params is self.params:  # updated in place: what self holds is no longer what it was
            retire_updated(self)
        return new

    def eval(self) -> Self:
        """The same state with the model in evaluation mode, for validation steps."""
        return self.replace(apply_fn=self.apply_fn.eval())

    def train(self) -> Self:
        """The same state with the model in training mode."""
        return self.replace(apply_fn=self.apply_fn.train())


def apply_gradients(tx: Optimizer, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """UPDATE: one optimizer update, through whatever transforms (clip, guard, donate …) surround the step.

    Returns `(params, opt_state)`. `TrainState.apply_gradients` calls it; a step with a state of its own (a GAN's two
    players, say) calls it for each optimizer.

    >>> import lumen as lm, torch
    >>> tx = lm.optim.sgd(0.5)
    >>> params = {"w": torch.ones(2)}
    >>> params, opt_state = lm.apply_gradients(tx, {"w": torch.ones(2)}, tx.init(params), params)
    >>> params["w"]
    tensor([0.5000, 0.5000])
    """
    if not rules.stack.rules[Primitive.UPDATE]:
        try:
            update = tx.apply
        except AttributeError:
            _check_optimizer(tx)
            raise
        return update(grads, opt_state, params)
    return rules.bind(Primitive.UPDATE, _update, UpdateCall(tx, grads, opt_state, params))  # type: ignore[no-any-return]


def _update(call: UpdateCall) -> tuple[Any, Any]:
    skip = call.skip
    if skip is not None:  # found where the step computes, which need not be where params are kept
        skip = skip.to(tree.tensors(call.params)[0].device)
    return call.tx.apply(call.grads, call.opt_state, call.params, skip=skip, donate=call.donate)  # type: ignore[no-any-return]


def _check_optimizer(tx: Any) -> None:
    """Raise `StateError` for what is no optimizer of Lumen's kind, with the line to write."""
    if isinstance(tx, type) or not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "apply", None))):
        name = tx.__name__ if isinstance(tx, type) else type(tx).__name__
        kind = tx if isinstance(tx, type) else type(tx)
        known = kind.__module__.startswith("torch.optim")
        fix = f"lm.optim.from_torch(torch.optim.{name}, lr=1e-3)" if known else "lm.optim.adamw(1e-3)"
        raise StateError(f"tx is {name}, which is not an optimizer of lm.optim. Write tx = {fix}.")
