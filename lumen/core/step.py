"""Transforms and the steps they make.

A transform is one object with four functions, each the identity unless overridden:

- `init(state) -> state` adds its slot, or places the params;
- `wrap(step) -> step` changes how a step is computed, traceably: it installs rules;
- `wrap_host(step) -> step` adds what must run on the host, outside a compiled region: seeding, raising, bookkeeping;
- `export(state) -> state` returns the plain state.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from lumen import tree
from lumen.core import _torch_compat, order, pending_weights, rules, stale_reads
from lumen.core.arguments import checked, checked_first
from lumen.core.donation import is_retired, noting_donated, storage_of
from lumen.core.dropped_buffers import BufferChanges
from lumen.core.nested_states import all_slots
from lumen.core.rules import Primitive, Rule
from lumen.core.sharding import STATE_VIEW, ShardingSlot, ShardSpec, composed, extend_specs, viewed
from lumen.core.step_function import check_takes_state_and_batch, explained, not_a_pair
from lumen.core.value_object import ValueObject
from lumen.errors import PurityError, SlotError, StateError, StepError, printable

State = Any
Metrics = Any
StepFn = Callable[[State, Any], tuple[State, Metrics]]


class Transform(ValueObject):
    """Base of all transforms; `transform(step)` gives a `Step`.

    `name` is used in messages and for its slot. `level` is its position in the canonical order, or "" where any
    position will do. `reason` is a short explanation of that position.

    A transform is a value: frozen once its `__init__` has returned, and equal to another of its class that was made
    with the same arguments, which `repr` shows. Any number of steps, threads and runs may share one.

    >>> import lumen as lm
    >>> class counted(lm.Transform):
    ...     name = "counted"
    ...     def wrap(self, step):
    ...         def run(state, batch):
    ...             new, metrics = step(state, batch)
    ...             return new, {**metrics, "rows": len(batch)}
    ...         return run
    >>> counted()(lambda state, batch: (state, {}))(0, [1, 2])
    (0, {'rows': 2})
    >>> lm.clip(1.0) == lm.clip(1.0), lm.clip(1.0).replace(norm=2.0)
    (True, lm.clip(2.0))
    """

    name: str = "transform"
    level: str = ""
    reason: str = ""
    donates: bool = False
    shards: bool = False  # whether each process has a shard of the state only; its slot is then static
    reads_pending: bool = False  # whether `init` reads a rank's shards of weights that are still in files
    opaque_state: bool = False  # whether another library holds the state, so that checkpoints take what `export` gives
    encloses: Mapping[str, str] = {}  # by the name of a transform that cannot be outside of this one: why
    incompatible: Mapping[str, str] = {}  # by the name of a transform that cannot be combined with this one: what to do

    def init(self, state: State) -> State:
        """The state this transform needs, from a plain one."""
        return state

    def wrap(self, step: StepFn) -> StepFn:
        """The step under this transform."""
        return step

    def wrap_host(self, step: StepFn) -> StepFn:
        """The step with this transform's host-side work around it; skipped while the step is being traced."""
        return step

    def export(self, state: State) -> State:
        """The plain state again."""
        return state

    def shard_specs(self, state: State) -> Mapping[int, ShardSpec]:
        """The specs of the leaves that this transform shards, by their positions in `tree.leaves(state)`."""
        return {}

    @property
    def within(self) -> Step | None:
        """The outermost step that is being called, prepared or exported, if it has this transform; stored nowhere."""
        step: Step | None = rules.stack.step
        return step if step is not None and id(self) in map(id, step.transforms) else None

    def _new_memory(self) -> Any:
        """A new host-side memory, of which each step of this transform has one beside its state; None for none."""
        return None

    @property
    def _memory(self) -> Any:
        """The host-side memory of this transform in the step that is being called, prepared or exported.

        Outside of steps it is a new one each time.
        """
        step: Step | None = rules.stack.step
        while step is not None and not (step.transforms and step.transforms[0] is self):
            step = step.inner
        return self._new_memory() if step is None else step.memory

    @property
    def key(self) -> Hashable:
        """What, besides the step's input, decides how it is computed; a compiled step is made anew when it changes."""
        return None

    def __call__(self, step: StepFn) -> Step:
        """The step under this transform, after those it already has."""
        inner = as_step(step)
        order.check((self, *inner.transforms))
        return Step(inner.user, (self, *inner.transforms), inner)


class Step:
    """A step with its transforms: call it as `(state, batch) -> (state, metrics)`.

    `init(state)` prepares a plain state for the whole stack, innermost transform first; `export(state)` undoes that.

    >>> import lumen as lm, torch
    >>> step = lm.ema(0.9)(lambda state, batch: (state, {}))
    >>> state = step.init(lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1)))
    >>> list(state.slots), list(step.export(state).slots)
    (['ema'], [])
    """

    def __init__(self, user: StepFn, transforms: tuple[Transform, ...], inner: Step | None) -> None:
        self.user = user
        self.transforms = transforms
        self.inner = inner
        self.memory: Any = None if inner is None else transforms[0]._new_memory()  # of the outermost transform
        if inner is None:
            self._traceable: StepFn = _Checked(user)
            self._run: StepFn = self._traceable
        else:
            self._traceable = transforms[0].wrap(inner)
            self._run = transforms[0].wrap_host(self._traceable)
        self._nested: frozenset[int] = frozenset((id(self), *(() if inner is None else inner._nested)))
        self.__name__ = getattr(user, "__name__", type(user).__name__)

    def __call__(self, state: State, batch: Any) -> tuple[State, Metrics]:
        """One step."""
        stack = rules.stack
        outer: Step | None = stack.step
        if outer is None or id(self) not in outer._nested:  # as in `rules.running`, without its three calls
            stack.step = self
        try:
            return self._traceable(state, batch) if stack.tracing else self._run(state, batch)
        finally:
            stack.step = outer

    def has(self, step: Step) -> bool:
        """Whether `step` is this one, or what some of its transforms are around."""
        return id(step) in self._nested

    def init(self, state: State) -> State:
        """The state that this step takes, from a plain one; of one that it has prepared already, nothing is sharded."""
        self._check_shards(state)
        lanes = self._lanes()
        with rules.running(self):
            state = pending_weights.load_unsharded(state, self.transforms)
            for index, transform in reversed(list(enumerate(self.transforms))):
                state = _per_lane(transform.init, state) if index > lanes >= 0 else transform.init(state)
        return state

    def export(self, state: State) -> State:
        """The plain state, without slots and in ordinary places: the inverse of `init`."""
        lanes = self._lanes()
        with rules.running(self):
            for index, transform in enumerate(self.transforms):
                state = _per_lane(transform.export, state) if index > lanes >= 0 else transform.export(state)
        return state

    def shard_specs(self, state: State) -> dict[int, ShardSpec]:
        """The specs of all sharded leaves, by their positions in `tree.leaves(state)`."""
        specs: dict[int, ShardSpec] = {}
        with rules.running(self):
            for transform in reversed(self.transforms):
                for index, spec in transform.shard_specs(state).items():
                    specs[index] = composed(specs[index], spec) if index in specs else spec
        return specs

    def _check_shards(self, state: State) -> None:
        """Raise `StateError` for one rank's shard of a state, unless its transform is here."""
        names = {transform.name for transform in self.transforms}
        for name, value in all_slots(state):
            owner = getattr(value, "owner", name)
            if isinstance(value, ShardingSlot) and owner not in names:
                raise StateError(
                    f"this state is one rank's shard under lm.{owner}, which is not a transform of {self!r}. Gather it,"
                    " on every rank, with the step that prepared it: state = step.export(state)"
                )

    def _lanes(self) -> int:
        """The index of `ensemble`, inside which transforms get the state of one lane at a time; -1 without one."""
        return next((index for index, t in enumerate(self.transforms) if t.level == "ensemble"), -1)

    def with_host_hooks(self, run: StepFn) -> StepFn:
        """`run`, a compiled form of this step, with the host-side work of all its transforms around it."""
        hosted = run
        for transform in reversed(self.transforms):
            hosted = transform.wrap_host(hosted)
        if hosted is run:
            return run
        return lambda state, batch: run(state, batch) if rules.is_tracing() else hosted(state, batch)

    def __repr__(self) -> str:
        text = self.__name__
        for transform in reversed(self.transforms):
            text = f"{transform!r}({text})"
        return text


def _per_lane(change: Callable[[State], State], states: Any) -> Any:
    """`change` for the state of each lane, in any form that `ensemble` takes or gives."""
    if isinstance(states, list | tuple):
        return [change(state) for state in states]
    if isinstance(states, types.FunctionType | types.MethodType | functools.partial):
        return lambda seed: change(states(seed))
    return change(states)


def as_step(step: StepFn) -> Step:
    """`step` as a `Step`; a plain function becomes one without transforms."""
    if isinstance(step, Step):
        return step
    if not callable(step):
        raise StepError(f"a step is a function (state, batch) -> (state, metrics), not {type(step).__name__}.")
    return Step(step, (), None)


@checked
def compose(*transforms: Transform) -> Callable[[StepFn], Step]:
    """Several transforms as one, outermost first: `compose(a, b)(step)` is `a(b(step))`.

    >>> import lumen as lm
    >>> def step(state, batch):
    ...     return state, {}
    >>> lm.compose(lm.accumulate(2), lm.precision("bf16"))(step)
    lm.accumulate(2)(lm.precision('bf16')(step))
    """
    order.check(transforms)

    def apply(step: StepFn) -> Step:
        for transform in reversed(transforms):
            step = transform(step)
        return as_step(step)

    return apply


def slot(state: State, name: str) -> Any:
    """The slot of the transform `name` in `state`; `SlotError` where it is missing.

    >>> import lumen as lm, torch
    >>> step = lm.ema(0.9)(lambda state, batch: (state, {}))
    >>> state = step.init(lm.TrainState.create(torch.nn.Linear(1, 1), lm.optim.sgd(0.1)))
    >>> sorted(lm.extend.slot(state, "ema").params)
    ['bias', 'weight']
    """
    slots = getattr(state, "slots", None)
    if slots is None:
        raise StateError(
            f"{name} keeps its data in state.slots, and {type(state).__name__} has no such field."
            " Derive the state from lm.TrainState, or add a field `slots: dict` to it."
        )
    if name not in slots:
        raise SlotError(
            f"{name} has no slot in this state (it has {', '.join(map(repr, slots)) or 'none'})."
            " Prepare the state once, with the step it is for: state = step.init(state)"
        )
    return slots[name]


def device_of(state: State) -> torch.device:
    """Where the state lives: the device of its first tensor."""
    first = tree.first_tensor(state)
    return torch.device("cpu") if first is None else first.device


def field_of(state: State, name: str, transform: str) -> Any:
    """The field of `state` that `transform` works on; `StateError` where there is none."""
    if not hasattr(state, name):
        raise StateError(
            f"{transform} works on state.{name}, and {type(state).__name__} has no such field."
            f" Derive the state from lm.TrainState, or add the field."
        )
    return getattr(state, name)


def with_slot(state: State, name: str, value: Any) -> State:
    """`state` with `value` as the slot of the transform `name`.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(1, 1), lm.optim.sgd(0.1))
    >>> lm.extend.slot(lm.extend.with_slot(state, "calls", torch.tensor(3)), "calls")
    tensor(3)
    """
    if not hasattr(state, "slots"):
        slot(state, name)
    return state.replace(slots={**state.slots, name: value})


@checked_first
def add_slot(state: State, name: str, make: Callable[[], Any]) -> State:
    """`state` with a slot for the transform `name`, made by `make` unless it has one already.

    A slot is replicated where params are sharded, except for the fields of its class that are declared by
    `lm.extend.param_field()`.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(1, 1), lm.optim.sgd(0.1))
    >>> state = lm.extend.add_slot(state, "calls", lambda: torch.tensor(0))
    >>> lm.extend.add_slot(state, "calls", lambda: torch.tensor(9)).slots
    {'calls': tensor(0)}
    """
    if name in getattr(state, "slots", ()):
        return state
    return extend_specs(with_slot(state, name, make()), name)


def without_slot(state: State, name: str) -> State:
    """`state` without the slot of the transform `name`.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(1, 1), lm.optim.sgd(0.1))
    >>> lm.extend.without_slot(lm.extend.with_slot(state, "calls", 1), "calls").slots
    {}
    """
    return state.replace(slots={key: value for key, value in state.slots.items() if key != name})


class _Checked:
    """The user's function with its result checked, and on its first call also that its input is unchanged."""

    def __init__(self, user: StepFn) -> None:
        check_takes_state_and_batch(user)
        self._user = user
        self._is_checked = False
        self.__name__ = getattr(user, "__name__", type(user).__name__)

    def __call__(self, state: State, batch: Any) -> tuple[State, Metrics]:
        user = viewed(self._user) if STATE_VIEW in rules.stack.axes else self._user
        if self._is_checked:
            out = user(state, batch)
            if type(out) is tuple and len(out) == 2:
                return out
            raise not_a_pair(self.__name__, out)
        pending_weights.check_loaded(state)
        before = [] if _wrapped() else [(p, t, _torch_compat.version_of(t)) for p, t in tree.named_tensors(state)]
        spec, donated = tree.structure(state), set[int]()
        applies = stale_reads.applies_of(state)  # before it may be retired
        changes = None if _wrapped() else BufferChanges(self._user)
        noting: dict[Primitive, Rule] = {} if changes is None else {Primitive.APPLY: changes.rule}
        if before and rules.intercepts_updates():
            noting[Primitive.UPDATE] = noting_donated(donated)
        with rules.rule_context(noting), explained():
            out = user(state, batch)
        if not _wrapped():
            stale_reads.check_reads(self._user, applies)
        for path, tensor, version in before:
            if _torch_compat.version_of(tensor) != version and not (is_retired(state) or storage_of(tensor) in donated):
                raise PurityError(
                    f"the step {self.__name__} changed state.{printable(path)} in place. A step must leave its input as"
                    " it is and return a new state: state.replace(...), state.apply_gradients(grads). For updates in"
                    " place without copies, use lm.donate()(step)."
                )
        if type(out) is not tuple or len(out) != 2:
            raise not_a_pair(self.__name__, out)
        new, metrics = out
        new_spec = tree.structure(new)
        if new_spec != spec:
            raise StepError(
                f"the step {self.__name__} returned a state whose structure differs from its input: "
                + "; ".join(tree.differences(spec.unflatten(range(spec.num_leaves)), new)[:6])
                + ". A state keeps its tree from step to step: add fields and slots before the first step."
            )
        self._is_checked = not rules.is_tracing()
        if changes is not None:
            changes.warn_dropped(self.__name__, new)
        return new, metrics


def _wrapped() -> bool:
    return rules.is_tracing() or _torch_compat.peek_interpreter_stack() is not None
