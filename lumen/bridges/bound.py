"""Convert a state's model to a torch module: the inverse of `lm.pure`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lumen.core.arguments import describe
from lumen.core.module import Apply, param_slots, skeleton_of
from lumen.errors import ArgumentError, ParamsError


def module(state: Any) -> nn.Module:
    """The model of `state` as a module of its original class, in evaluation mode, with the state's params and buffers.

    The module shares its tensors with the state, so in-place changes affect both. Its parameters have
    `requires_grad=False` and are for reading, for `generate()` and for saving. Tied weights stay tied.

    Raises `ParamsError` if the state's params are sharded, as under `lm.fsdp`: export it first; and `ArgumentError` for
    what is no state of a model.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    >>> net = lm.bridges.module(state)
    >>> net(torch.ones(3, 2)).shape, net.weight.data_ptr() == state.params["weight"].data_ptr()
    (torch.Size([3, 1]), True)
    """
    model = skeleton_of(model_of(state)).eval()
    tensors = {**state.params, **state.buffers}
    parameters: dict[str, nn.Parameter] = {}
    slots: list[tuple[dict[str, Any], str, Any]] = []
    for table, key, name in param_slots(model):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != table[key].shape:
            raise _shape_error(name, table[key], tensor)
        if isinstance(table[key], nn.Parameter):
            tensor = parameters.setdefault(name, nn.Parameter(tensor.detach(), requires_grad=False))
        slots.append((table, key, tensor))
    for table, key, tensor in slots:
        table[key] = tensor
    return model


def model_of(state: Any) -> nn.Module:
    """The module that `state` was made of; `ArgumentError` for what is no state of a model."""
    apply = getattr(state, "apply_fn", None)
    if isinstance(apply, Apply):
        return apply.module
    line = "state=result.export()" if hasattr(state, "export") else "state=lm.TrainState.create(net, tx)"
    raise ArgumentError(f"state is {describe(state)}; it takes an lm.TrainState. Write: {line}")


def _shape_error(name: str, expected: Tensor, actual: Tensor | None) -> ParamsError:
    description = "nothing" if actual is None else f"a tensor of shape {tuple(actual.shape)}"
    return ParamsError(
        f"the model's {name!r} has the shape {tuple(expected.shape)}, and the state has {description} for it. If the"
        " transforms of its step shard or stack params, export it first: state = step.export(state)"
    )
