"""A state's model as a torch module again: the inverse of `lm.pure`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lumen.core.module import param_slots, skeleton_of
from lumen.errors import ParamsError


def module(state: Any) -> nn.Module:
    """The model of `state` as a module of its own class, in evaluation mode, with the state's params and buffers.

    No tensor is copied: what changes the module in place changes the state, so its parameters have
    `requires_grad=False`; they are for reading, for `generate()` and for saving. Tied weights are tied.

    Raises `ParamsError` where the state holds parts of params, as under `lm.fsdp`: export it first.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    >>> net = lm.bridges.module(state)
    >>> net(torch.ones(3, 2)).shape, net.weight.data_ptr() == state.params["weight"].data_ptr()
    (torch.Size([3, 1]), True)
    """
    made = skeleton_of(state.apply_fn.module).eval()
    held = {**state.params, **state.buffers}
    parameters: dict[str, nn.Parameter] = {}
    found: list[tuple[dict[str, Any], str, Any]] = []
    for table, key, name in param_slots(made):
        tensor = held.get(name)
        if tensor is None or tensor.shape != table[key].shape:
            raise _not_whole(name, table[key], tensor)
        if isinstance(table[key], nn.Parameter):
            tensor = parameters.setdefault(name, nn.Parameter(tensor.detach(), requires_grad=False))
        found.append((table, key, tensor))
    for table, key, tensor in found:
        table[key] = tensor
    return made


def _not_whole(name: str, wanted: Tensor, found: Tensor | None) -> ParamsError:
    have = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
    return ParamsError(
        f"the model's {name!r} has the shape {tuple(wanted.shape)}, and the state holds {have} for it. A state under"
        " transforms that cut or stack params is made plain by the step it is for: state = step.export(state)"
    )
