"""A short `repr` of states: what a prompt or a notebook shows, without all their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, rules

_MANY = 12  # numbers or entries from which only their count is shown


def brief(value: Any) -> str:
    """The `repr` of a value; of large tensors the dtype and shape, and of large containers the number of tensors.

    >>> import torch
    >>> brief({"x": torch.ones(2)}), brief(torch.zeros(3, 50)), brief({"w": torch.zeros(3, 50)})
    ("{'x': tensor([1., 1.])}", 'float32[3, 50]', '<1 tensor, 150 numbers>')
    """
    if isinstance(value, Tensor):
        return _tensor(value)
    if type(value) in (dict, list, tuple):
        tensors = tree.tensors(value)
        if sum(t.numel() for t in tensors) > _MANY or len(value) > _MANY:
            return f"<{count(tensors)}>" if tensors else f"<{type(value).__name__} of {len(value)}>"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {brief(item)}" for key, item in value.items()) + "}"
        inside = ", ".join(map(brief, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    return str(value.__qualname__) if hasattr(value, "__qualname__") else repr(value)


def brief_fields(value: Any) -> str:
    """The `repr` of a dataclass, with `brief` for its fields."""
    shown = [field.name for field in dataclasses.fields(value) if field.repr]
    return f"{type(value).__name__}({', '.join(f'{name}={brief(getattr(value, name))}' for name in shown)})"


def count(tensors: Iterable[Tensor]) -> str:
    """The number of tensors and of their entries.

    >>> import torch
    >>> count([torch.zeros(2, 3), torch.zeros(1)])
    '2 tensors, 7 numbers'
    """
    sizes = [t.numel() for t in tensors]
    total = sum(sizes)
    return f"{len(sizes)} tensor{'s' * (len(sizes) != 1)}, {total:,} number{'s' * (total != 1)}"


def opt_state_text(opt_state: Any) -> str:
    """The classes of an optimizer's state, without those that only transform gradients, and its learning rates.

    >>> import lumen as lm, torch
    >>> tx = lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.adamw(1e-3))
    >>> opt_state_text(tx.init({"w": torch.ones(2)}))
    'AdamState lr 0.001'
    """
    return " + ".join(dict.fromkeys(_opt_states(opt_state)))


def _opt_states(opt_state: Any) -> Iterator[str]:
    hparams = getattr(opt_state, "hparams", None)
    if isinstance(hparams, Mapping):
        rate = hparams.get("scheduled_lr", hparams.get("lr"))
        yield type(opt_state).__name__ + ("" if rate is None else f" lr {number(rate)}")
        return
    children: Iterable[Any] = ()
    if dataclasses.is_dataclass(opt_state):
        children = [getattr(opt_state, field.name) for field in dataclasses.fields(opt_state)]
    elif isinstance(opt_state, Mapping):
        children = opt_state.values()
    elif isinstance(opt_state, list | tuple):
        children = opt_state
    names = [name for child in children for name in _opt_states(child)]
    is_leaf = not names and dataclasses.is_dataclass(opt_state)
    yield from [type(opt_state).__name__] if is_leaf else names


def number(value: Tensor) -> str:
    """The value of a scalar tensor, or of one for each lane; "?" while it cannot be read.

    >>> import torch
    >>> number(torch.tensor(3)), number(torch.tensor([0.5, 0.25])), number(torch.empty((), device="meta"))
    ('3', '[0.5, 0.25]', '?')
    """
    is_plain = type(value) is Tensor and not _torch_compat.is_functorch_wrapped_tensor(value)
    if not is_plain or value.is_meta or rules.is_tracing():
        return "?"
    if value.numel() > _MANY:
        return _tensor(value)
    values = value.tolist()
    return f"[{', '.join(f'{item:.6g}' for item in values)}]" if value.dim() == 1 else f"{values:.6g}"


def _tensor(value: Tensor) -> str:
    if value.numel() <= _MANY and not value.is_meta:
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
