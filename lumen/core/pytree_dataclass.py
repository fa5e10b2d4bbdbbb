"""`lm.dataclass`: frozen dataclasses that are pytrees, for optree and torch alike.

Both registrations are generated from the dataclass fields, so that a field cannot be forgotten in one of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

import optree

from lumen import tree
from lumen.core import _torch_compat
from lumen.core.brief_repr import brief_fields
from lumen.errors import StateError

C = TypeVar("C", bound=type)
_STATIC, _ROWS, _PARAMS, _PARAM_ROWS = "lumen_static", "lumen_rows", "lumen_params", "lumen_param_rows"
SIGNATURE = "_signature"  # what `lm.compile` notes on a state that it made; it does not outlive a change


def static(**kwargs: Any) -> Any:
    """A field of an `lm.dataclass` class that stays out of the tree: configuration, functions, names.

    Takes the arguments of `dataclasses.field`. Two states whose static fields differ have different
    structures, so a static value must be hashable and comparable.

    >>> import lumen as lm
    >>> @lm.dataclass
    ... class Scaled:
    ...     value: float
    ...     unit: str = lm.static(default="m")
    >>> lm.tree.leaves(Scaled(1.0, "km"))
    [1.0]
    """
    metadata = {**kwargs.pop("metadata", {}), _STATIC: True}
    return dataclasses.field(metadata=metadata, **kwargs)


def row_field(*, kw_only: bool = True, **kwargs: Any) -> Any:
    """A field of an `lm.dataclass` class with one entry for each row of the batch, such as a hidden state.

    It holds a tensor, or a pytree of tensors, all with rows first. A state is created with the rows of the global
    batch. Under `lm.ddp`, `lm.fsdp` and `lm.deepspeed` `init` keeps this rank's rows, which are those that `lm.Loader`
    gives it of a batch of as many; every rank writes its own to a checkpoint, which restores them on any number of
    ranks; `export` all-gathers them. In one process it is a field like any other. `lm.tensor_parallel` ranks that
    compute the same rows hold the same ones.

    In the step, pass the field to the loss function in the batch, where transforms split it like the rest, and take its
    new value from the aux. Takes the arguments of `dataclasses.field`; the field is keyword-only unless said otherwise.

    >>> import lumen as lm, torch
    >>> @lm.dataclass
    ... class Recurrent(lm.TrainState):
    ...     hidden: torch.Tensor = lm.row_field()
    >>> def step(state, x):
    ...     def loss_fn(params, batch):
    ...         hidden, _ = state.apply(params, batch["x"], batch["hidden"])
    ...         return hidden.square().mean(), {"hidden": hidden}
    ...     batch = {"x": x, "hidden": state.hidden}
    ...     (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    ...     return state.apply_gradients(grads, hidden=aux["hidden"]), {"loss": loss}
    >>> state = Recurrent.create(torch.nn.RNNCell(3, 4), lm.optim.sgd(0.1), hidden=torch.zeros(6, 4))
    >>> state, _ = lm.compose(lm.ddp(), lm.accumulate(2))(step)(state, torch.ones(6, 3))
    >>> state.hidden.shape
    torch.Size([6, 4])
    """
    metadata = {**kwargs.pop("metadata", {}), _ROWS: True}
    return dataclasses.field(kw_only=kw_only, metadata=metadata, **kwargs)


def param_field(**kwargs: Any) -> Any:
    """A field of an `lm.dataclass` class that holds a dict like the params: by their names, in their shapes.

    Transforms that shard params (`lm.fsdp`, `lm.tensor_parallel`) shard the field alike. Without this declaration a
    field or a slot is the same on every rank, whatever its names and shapes. Takes the arguments of
    `dataclasses.field`.

    >>> import lumen as lm, torch
    >>> @lm.dataclass
    ... class WithTeacher(lm.TrainState):
    ...     teacher: dict[str, torch.Tensor] = lm.extend.param_field(kw_only=True)
    """
    metadata = {**kwargs.pop("metadata", {}), _PARAMS: True}
    return dataclasses.field(metadata=metadata, **kwargs)


def row_of_param_field(**kwargs: Any) -> Any:
    """A field with one row for each row of the param that its node belongs to, such as the scales of quantized rows.

    For nodes in an optimizer's state. Transforms that shard the rows of params shard the field's rows alike.

    >>> import lumen as lm, torch
    >>> @lm.dataclass
    ... class Scaled:
    ...     codes: torch.Tensor
    ...     scales: torch.Tensor = row_of_param_field()
    """
    metadata = {**kwargs.pop("metadata", {}), _PARAM_ROWS: True}
    return dataclasses.field(metadata=metadata, **kwargs)


@dataclass_transform(
    frozen_default=True,
    eq_default=False,
    field_specifiers=(static, row_field, param_field, row_of_param_field, dataclasses.field),
)
def dataclass(cls: C) -> C:
    """Make `cls` a frozen dataclass whose fields are the children of a pytree node.

    The class gains `replace(**changes)`, and works in `torch.func` transforms and `lumen.tree`. Fields marked
    `lm.static()` stay out of the tree; those marked `lm.row_field()` have an entry for each row of the batch. A
    subclass must be decorated too: an undecorated one would silently be one opaque leaf, so making an instance of it
    raises `StateError`, and so does a field without a default after one with a default.

    >>> import lumen as lm
    >>> @lm.dataclass
    ... class Pair:
    ...     left: int
    ...     right: int
    >>> lm.tree.map(lambda x: x + 1, Pair(1, 2)).replace(left=0)
    Pair(left=0, right=3)
    """
    try:
        new: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    except TypeError as error:
        raise _explained(cls, error) from error
    if new.__repr__ is object.__repr__:  # a class or a base of it may have its own
        new.__repr__ = brief_fields
    fields = dataclasses.fields(new)
    dynamic = tuple(f.name for f in fields if not f.metadata.get(_STATIC))
    fixed = tuple(f.name for f in fields if f.metadata.get(_STATIC))
    new._fields_ = frozenset(f.name for f in fields)
    new._dynamic_fields_ = dynamic
    new._row_fields_ = frozenset(f.name for f in fields if f.metadata.get(_ROWS))
    new._param_fields_ = frozenset(f.name for f in fields if f.metadata.get(_PARAMS))
    new._param_row_fields_ = frozenset(f.name for f in fields if f.metadata.get(_PARAM_ROWS))
    new.replace = _replace
    new.__setattr__ = _refuse_assignment
    new.__new__ = _new
    _register(new, dynamic, fixed)
    return new  # type: ignore[no-any-return]


def _explained(cls: type, error: TypeError) -> Exception:
    """The error with the line to write, where a field without a default comes after one that has one."""
    field = re.search(r"non-default argument '(\w+)' follows default", str(error))
    if field is None:
        return error
    kind = getattr(cls, "__annotations__", {}).get(field[1], "Any")
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "Any")
    return StateError(
        f"{cls.__name__}.{field[1]} has no default and follows a field that has one. Make it keyword-only:"
        f" {field[1]}: {kind} = dataclasses.field(kw_only=True)"
    )


def _new(cls: type, *_args: Any, **_kwargs: Any) -> Any:
    if "_fields_" not in cls.__dict__:
        base = next(base for base in cls.__mro__ if "_fields_" in base.__dict__)
        raise StateError(
            f"{cls.__name__} subclasses {base.__name__} without the decorator, so its fields would not be part of"
            f" the tree. Write:\n\n    @lm.dataclass\n    class {cls.__name__}({base.__name__}): ..."
        )
    return object.__new__(cls)


def _replace(self: Any, **changes: Any) -> Any:
    if not changes.keys() <= self._fields_:
        unknown = sorted(changes.keys() - self._fields_)
        raise StateError(
            f"{type(self).__name__} has no field {', '.join(map(repr, unknown))};"
            f" its fields are {', '.join(sorted(self._fields_))}."
        )
    new = copy_of(self)
    new.__dict__.update(changes)
    new.__dict__.pop(SIGNATURE, None)
    return new


def copy_of(node: Any) -> Any:
    """Another object with the same fields."""
    new: Any = object.__new__(type(node))
    new.__dict__.update(node.__dict__)
    return new


def _refuse_assignment(self: Any, name: str, _value: Any) -> None:
    raise StateError(
        f"{type(self).__name__}.{name} cannot be assigned: states are immutable."
        f" Make a changed copy: state = state.replace({name}=...)"
    )


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """All named attributes of an object as a tuple, by one call into C: this is most of what a flatten costs."""
    if len(names) > 1:
        return attrgetter(*names)
    if names:
        only = attrgetter(names[0])
        return lambda node: (only(node),)
    return lambda _node: ()


def _register(cls: type, dynamic: tuple[str, ...], fixed: tuple[str, ...]) -> None:
    children, context = _getter(dynamic), _getter(fixed)

    def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return list(children(node)), context(node)

    def unflatten(context: tuple[Any, ...], children: Any) -> Any:
        new: Any = object.__new__(cls)
        new.__dict__.update(zip(dynamic, children, strict=True))
        new.__dict__.update(zip(fixed, context, strict=True))
        return new

    tree.CHILDREN[cls] = children
    optree.register_pytree_node(
        cls,
        lambda node: (children(node), context(node), dynamic),
        unflatten,  # type: ignore[arg-type]
        path_entry_type=optree.GetAttrEntry,
        namespace=tree.NAMESPACE,
    )
    _torch_compat.torch_pytree.register_pytree_node(
        cls,
        flatten,
        lambda children, context: unflatten(context, children),
        flatten_with_keys_fn=lambda node: (
            [(_torch_compat.torch_pytree.GetAttrKey(name), getattr(node, name)) for name in dynamic],
            flatten(node)[1],
        ),
    )
