"""The rule stack: what a transform installs for as long as its step runs.

A step touches the machinery through three primitives. A rule for one of them is a function
`rule(next, call)`: it may change the call, call `next` any number of times (none included), and change the
result. Rules nest outside-in: the outermost transform sees a call first, `next` leads to the rule inside it,
and the innermost `next` is the primitive's base.

The stack is per thread. It is the only state of this package that changes what a call does, and it is only
ever entered and left by `with`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from enum import IntEnum
from functools import partial
from typing import Any

from lumen.core.arguments import checked
from lumen.errors import ArgumentError, HyperparameterError

Next = Callable[[Any], Any]
Rule = Callable[[Next, Any], Any]
LossContext = Callable[[Any], AbstractContextManager[Any]]


class Primitive(IntEnum):
    """The three calls through which a step touches the machinery.

    >>> import lumen as lm
    >>> [each.name for each in lm.extend.Primitive]
    ['APPLY', 'GRADIENT', 'UPDATE']
    """

    APPLY = 0
    GRADIENT = 1
    UPDATE = 2


class RuleStack(threading.local):
    """What is installed in this thread. The primitives read it directly, several times a step."""

    def __init__(self) -> None:
        self.rules: tuple[list[Rule], list[Rule], list[Rule]] = ([], [], [])
        self.in_loss = 0
        self.in_update = 0
        self.in_weightless = 0
        self.tracing = 0
        self.axes: dict[str, Any] = {}
        self.joined_axes: set[str] = set()  # over which a step has summed or gathered, since axes were bound
        self.loss_contexts: list[LossContext] = []
        self.step: Any = None  # the outermost step that is being called, prepared or exported
        self.splitters: list[str | None] = []
        # The models that are running: what captures each of them for a recomputation, and its arguments.
        self.forwards: list[tuple[Any, ...]] = []


stack = RuleStack()


def bind(primitive: Primitive, base: Next, call: Any) -> Any:
    """Run `call` through the installed rules of `primitive`, outermost first, then `base`.

    Inside a loss function only APPLY rules hold: gradients and updates taken there belong to the loss's own
    mathematics (an inner loop, say), not to the training step.
    """
    handler = base
    if not stack.in_loss or primitive is Primitive.APPLY:
        for rule in reversed(stack.rules[primitive]):
            handler = partial(rule, handler)
    return handler(call)


class rule_context:  # noqa: N801
    """`with rule_context({primitive: rule}):` adds one rule for each primitive, inside those that are already there.

    >>> import lumen as lm, torch
    >>> def rule(next, call):
    ...     print(f"update of {sorted(call.params)}")
    ...     return next(call)
    >>> state = lm.TrainState.create(torch.nn.Linear(1, 1, bias=False), lm.optim.sgd(1.0))
    >>> with lm.extend.rule_context({lm.extend.Primitive.UPDATE: rule}):
    ...     _ = state.apply_gradients({"weight": torch.ones(1, 1)})
    update of ['weight']
    """

    __slots__ = ("_rules",)

    def __init__(self, rules: Mapping[Primitive, Rule]) -> None:
        self._rules = rules

    def __enter__(self) -> None:
        installed = 0
        try:
            for primitive, rule in self._rules.items():
                stack.rules[primitive].append(rule)
                installed += 1
        except (AttributeError, TypeError, IndexError):
            for primitive in [*self._rules][:installed] if isinstance(self._rules, Mapping) else ():
                stack.rules[primitive].pop()
            raise _not_rules(self._rules) from None

    def __exit__(self, *_exc: object) -> None:
        for primitive in self._rules:
            stack.rules[primitive].pop()


def _not_rules(handlers: Any) -> ArgumentError:
    keys = list(handlers)[:1] if isinstance(handlers, Mapping) else ()
    shown = f"a dict with the key {keys[0]!r:.40}" if keys else f"{handlers!r:.60} of type {type(handlers).__name__}"
    return ArgumentError(
        f"handlers, the rules, are {shown}; they are a dict from a primitive to a function rule(next, call):"
        " {lm.extend.Primitive.UPDATE: rule}"
    )


@checked
def with_rules(handlers: Mapping[Primitive, Rule], step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`step` with `handlers` installed for as long as it runs: all that a transform without memory does.

    >>> import lumen as lm, torch
    >>> def twice(next, call):
    ...     return next(call.replace(grads=lm.tree.map(lambda g: 2 * g, call.grads)))
    >>> def step(state, batch):
    ...     return state.apply_gradients({"weight": batch}), {}
    >>> state = lm.TrainState.create(torch.nn.Linear(1, 1, bias=False), lm.optim.sgd(1.0))
    >>> new, _ = lm.extend.with_rules({lm.extend.Primitive.UPDATE: twice}, step)(state, torch.ones(1, 1))
    >>> round(float(state.params["weight"] - new.params["weight"]), 4)
    2.0
    """

    with rule_context(handlers):  # raises for what are no rules
        pass

    def run(state: Any, batch: Any) -> Any:
        with rule_context(handlers):
            return step(state, batch)

    return run


class around_losses:  # noqa: N801
    """`with around_losses(make):` runs each loss function inside `make((params, batch))`, but not its backward pass.

    It is no rule of the gradient, so gradients may still be added in place or reduced.
    """

    __slots__ = ("_make",)

    def __init__(self, make: LossContext) -> None:
        self._make = make

    def __enter__(self) -> None:
        stack.loss_contexts.append(self._make)

    def __exit__(self, *_exc: object) -> None:
        stack.loss_contexts.pop()


def call_loss(loss_fn: Callable[..., Any], params: Any, batch: Any, extras: tuple[Any, ...]) -> Any:
    """What `loss_fn` returns, inside what transforms have put around losses."""
    if not stack.loss_contexts:
        return loss_fn(params, batch, *extras)
    with ExitStack() as entered:
        for make in stack.loss_contexts:
            entered.enter_context(make((params, batch)))
        return loss_fn(params, batch, *extras)


class _Inside:
    """A reentrant marker on the stack, cheaper than a generator-based context manager in the hot path."""

    def __init__(self, counter: str) -> None:
        self._counter = counter

    def __enter__(self) -> None:
        setattr(stack, self._counter, getattr(stack, self._counter) + 1)

    def __exit__(self, *_exc: object) -> None:
        setattr(stack, self._counter, getattr(stack, self._counter) - 1)


inside_loss = _Inside("in_loss")
inside_update = _Inside("in_update")
inside_weightless = _Inside("in_weightless")
tracing = _Inside("tracing")


def is_inside_loss() -> bool:
    """Whether a loss function is being differentiated by an enclosing `value_and_grad`."""
    return stack.in_loss > 0


def is_weightless() -> bool:
    """Whether a loss runs on dummy rows, only to take part in collectives."""
    return stack.in_weightless > 0


def is_tracing() -> bool:
    """Whether `lm.compile` is tracing the step, so that host-side work must wait until it runs."""
    return stack.tracing > 0


def is_innermost(primitive: Primitive, rule: Rule) -> bool:
    """Whether `rule` is the last before the primitive's base."""
    installed = stack.rules[primitive]
    return bool(installed) and installed[-1] == rule


def inside(primitive: Primitive, rule: Rule) -> list[Rule]:
    """The rules between `rule` and the primitive's base."""
    installed = stack.rules[primitive]
    return installed[installed.index(rule) + 1 :]


class splitting:  # noqa: N801
    """`with splitting(name):` while a transform hands microbatches to a loss function in place of the batch."""

    __slots__ = ("_name",)

    def __init__(self, name: str | None) -> None:
        self._name = name

    def __enter__(self) -> None:
        stack.splitters.append(self._name)

    def __exit__(self, *_exc: object) -> None:
        stack.splitters.pop()


def splitter() -> str | None:
    """The transform that hands microbatches to a loss function now, or None."""
    return stack.splitters[-1] if stack.splitters else None


def intercepts_updates() -> bool:
    """Whether a transform must see updates that are made now."""
    return bool(stack.rules[Primitive.UPDATE]) and not stack.in_update and not stack.in_loss


def snapshot() -> dict[str, Any]:
    """All that is installed in this thread now, for `restored`."""
    copies = {name: [*value] if isinstance(value, list) else value for name, value in vars(stack).items()}
    return {**copies, "rules": tuple([*installed] for installed in stack.rules), "axes": {**stack.axes}}


class restored:  # noqa: N801
    """`with restored(snapshot()):` installs what was there at an earlier time, maybe in another thread."""

    __slots__ = ("_before", "_installed")

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._installed = values

    def __enter__(self) -> None:
        self._before = {**vars(stack)}
        vars(stack).update(self._installed)

    def __exit__(self, *_exc: object) -> None:
        vars(stack).update(self._before)


class running:  # noqa: N801
    """`with running(step):` while a step is called, prepared or exported, unless it is part of one that already is."""

    __slots__ = ("_before", "_step")

    def __init__(self, step: Any) -> None:
        self._step = step

    def __enter__(self) -> None:
        self._before = stack.step
        if self._before is None or not self._before.has(self._step):
            stack.step = self._step

    def __exit__(self, *_exc: object) -> None:
        stack.step = self._before


def current_step() -> Any:
    """The outermost step that is being called, prepared or exported, or None."""
    return stack.step


class bound_axes:  # noqa: N801
    """`with bound_axes({name: axis}):` binds each axis to its name for collectives that run inside."""

    __slots__ = ("_axes",)

    def __init__(self, axes: Mapping[str, Any]) -> None:
        self._axes = axes

    def __enter__(self) -> None:
        bound = stack.axes
        for name in self._axes:
            if name in bound:
                raise HyperparameterError(
                    f"axis {name!r} is already bound by an enclosing transform; give this one another name."
                )
        bound.update(self._axes)

    def __exit__(self, *_exc: object) -> None:
        for name in self._axes:
            del stack.axes[name]


class unbound_axis:  # noqa: N801
    """`with unbound_axis(name):` while a loss runs on one process alone, for which the axis has no other members."""

    __slots__ = ("_axis", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._axis = stack.axes.pop(self._name)

    def __exit__(self, *_exc: object) -> None:
        stack.axes[self._name] = self._axis


def bound_axis(name: str, axis: Any) -> bound_axes:
    """Bind one axis."""
    return bound_axes({name: axis})


def axis(name: str) -> Any | None:
    """What is bound to the axis `name`, or None."""
    return stack.axes.get(name)


def depth() -> dict[str, int]:
    """How many rules each primitive has, for `lm.inspect`."""
    return {primitive.name.lower(): len(stack.rules[primitive]) for primitive in Primitive}
