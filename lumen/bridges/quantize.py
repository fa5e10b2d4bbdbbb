"""`lm.quantize`: a trained state with the weights of its linear layers in eight bits, through torchao."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen.core.module import param_slots
from lumen.core.step import field_of
from lumen.errors import HyperparameterError, ParamsError, StateError
from lumen.transforms._support.torchao import Layers, check_kind, chosen, row_scales, torchao

KINDS = ("int8", "fp8")
_CONFIGS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}

S = TypeVar("S")


def quantize(state: S, kind: str = "int8", *, layers: Layers | None = None) -> S:
    """`state` for inference, the weights of its linear layers kept in eight bits: about a quarter of float32's memory.

    The answer is a state like any other: `state.apply(state.params, x)`, `Runner.validate`, `Runner.predict`,
    `lm.compile`, `lm.precision("bf16")` and checkpoints take it. In place of `layer.weight`, among its params, it has
    `layer.weight_qdata` (int8 or float8, [outputs, inputs]) and `layer.weight_scale` (float32, [outputs, 1]) among its
    buffers (for int8 a `layer.weight_zero_point` of 0, too), which torchao multiplies with as it would in a module of
    its own; inputs, outputs and all other tensors stay as they are. Optimizer state and slots are left out. The given
    state is left alone; what is not quantized shares its memory, which further training under `lm.donate` writes to.

    Args:
        state: a plain state: what `step.export(state)` gives, and not one that `donate` has used up.
        kind: "int8", each row scaled to its largest entry: each weight within 1/254 of that. "fp8" is float8_e4m3,
            scaled likewise, on devices that have the type: each weight within 1/16 of its own size, or within
            1/450,000 of the row's largest entry where that is more. Rows of zeros stay zeros.
        layers: which `nn.Linear`: globs or regular expressions over their names, one or several, or a predicate
            `(name, module) -> bool`. By default all whose weight is not shared with another layer, an embedding say.

    Raises:
        HyperparameterError: another kind, or one that the device of the weights does not have.
        ParamsError: a layer that cannot be quantized was named, there is none, or a weight is not whole or not finite.
        PatternError: a pattern that matches no linear layer.
        ImportError: torchao is missing.

    Law: `quantize(state)` computes what the model computes with each chosen weight rounded as above.

    >>> import lumen as lm, torch
    >>> state = lm.TrainState.create(torch.nn.Linear(64, 32), lm.optim.adam(1e-3))
    >>> small = lm.quantize(state, "int8")
    >>> small.buffers["weight_qdata"].dtype, sorted(small.params)
    (torch.int8, ['bias'])
    >>> x = torch.ones(1, 64)
    >>> bool((small.apply(small.params, x)[0] - state.apply(state.params, x)[0]).abs().max() < 0.05)
    True
    """
    check_kind("quantize", kind, KINDS)
    apply, params, buffers = (field_of(state, name, "quantize") for name in ("apply_fn", "params", "buffers"))
    held = {**params, **buffers}
    names = {id(table): name for table, key, name in param_slots(apply.module) if key == "weight"}
    packed: dict[str, _Packed] = {}  # by the name of the layer
    replaced = set()
    for layer, module in chosen(apply.module, layers, untied=True).items():
        name = names[id(module._parameters)]
        packed[layer] = _Packed.of(_whole(name, module, held), kind)
        replaced.add(name)
    parts = {f"{layer}.{key}".lstrip("."): x for layer, each in packed.items() for key, x in each.parts.items()}
    forms = {layer: each.form for layer, each in packed.items()}

    def change(module: nn.Module) -> None:
        for layer, each in packed.items():
            each.put_into(module.get_submodule(layer))

    changes: dict[str, Any] = {
        "params": {name: p for name, p in params.items() if name not in replaced},
        "buffers": {name: b for name, b in buffers.items() if name not in replaced} | parts,
        "apply_fn": apply.variant(("quantize", repr(forms)), change, (apply.frozen - replaced) | parts.keys()),
        "tx": _Untrained(),
        "opt_state": (),
        "slots": {},
    }
    given: Any = state
    return given.replace(**{name: value for name, value in changes.items() if hasattr(state, name)})  # type: ignore[no-any-return]


class _Packed:
    """A weight as torchao keeps it: plain tensors, and how they are put together again."""

    def __init__(self, kind: Any, parts: dict[str, Tensor], attributes: Any) -> None:
        self.parts = parts
        self.form = (kind, tuple(parts), attributes)

    @classmethod
    def of(cls, weight: Tensor, kind: str) -> _Packed:
        """`weight` [outputs, inputs], packed."""
        ao = torchao("quantization")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        scales = row_scales(weight)
        held = weight.float()
        has_entries = (held != 0).any(1, keepdim=True)
        layer.weight = nn.Parameter(torch.where(has_entries, held / scales, 1.0), requires_grad=False)
        try:
            ao.quantize_(layer, getattr(ao, _CONFIGS[kind])())
        except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            instead = "lm.quantize(state, 'int8')" if kind == "fp8" else "layers=... for the other layers"
            raise HyperparameterError(
                f"torchao cannot keep {weight.dtype} weights of shape {tuple(weight.shape)} on {weight.device} as"
                f" {kind}: {error}. Write {instead}, or take the weights elsewhere before."
            ) from error
        packed: Any = layer.weight.detach()
        inner, attributes = packed.__tensor_flatten__()
        parts = {f"weight_{name}": getattr(packed, name) for name in inner}
        codes = parts["weight_qdata"]
        parts["weight_qdata"] = (codes.view(torch.uint8) * has_entries).view(codes.dtype)
        parts["weight_scale"] = parts["weight_scale"] * scales
        dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype  # torchao has no float64
        return cls(type(packed), parts, attributes | {"dtype": dtype})

    def put_into(self, layer: nn.Module) -> None:
        """Let a layer of a skeleton hold these parts in place of its weight."""
        del layer._parameters["weight"]
        for name, tensor in self.parts.items():
            layer.register_buffer(name, torch.empty_like(tensor, device="meta"))
        kind: Any = type(layer)
        layer.__class__ = _quantized(kind)
        layer._form = self.form  # type: ignore[assignment]


class Quantized(nn.Module):
    """What a layer with a quantized weight does in place of its own: it puts the weight together when it is read."""

    _form: tuple[Any, tuple[str, ...], dict[str, Any]]
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], a tensor of torchao's."""
        return self._made({})

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        weight: Any = self._made({"dtype": x.dtype})
        if x.dtype == torch.float16:  # in which torchao's int8 product would overflow, and its scales underflow
            weight = weight.dequantize(torch.float32).to(x.dtype)
        return F.linear(x, weight, self.bias)

    def _made(self, other: dict[str, Any]) -> Tensor:
        kind, names, attributes = self._form
        parts = {name.removeprefix("weight_"): self._buffers[name] for name in names}
        made: Tensor = kind.__tensor_unflatten__(parts, attributes | other, None, None)
        return made


@functools.cache
def _quantized(kind: Any) -> type[nn.Module]:
    return type(f"Quantized{kind.__name__}", (Quantized, kind), {"__doc__": f"A quantized {kind.__name__}."})


class _Untrained:
    """In place of the optimizer of a state whose weights cannot be moved any more."""

    def init(self, _params: Any) -> NoReturn:
        """Refused."""
        raise StateError(_NO_TRAINING)

    def apply(
        self, _grads: Any, _state: Any, _params: Any, *, skip: Tensor | None = None, donate: bool = False
    ) -> NoReturn:
        """Refused."""
        raise StateError(_NO_TRAINING)


_NO_TRAINING = (
    "this state was quantized for inference: its weights are rounded, and its optimizer's state was left out. Train the"
    " state that it was made from; or, to train the params that are left (adapters, say), give it an optimizer anew:"
    " state = state.replace(tx=tx, opt_state=tx.init(state.params))"
)


def _whole(name: str, layer: nn.Linear, held: Mapping[str, Any]) -> Tensor:
    """The weight of `layer` in the state, which may be none but the whole of it."""
    weight = held.get(name)
    wanted = (layer.out_features, layer.in_features)
    if type(weight) is Tensor and weight.shape == wanted and weight.is_floating_point():
        if not weight.float().isfinite().all():
            raise ParamsError(f"{name!r} has entries that are NaN or infinite, for which there is no scale of a row.")
        return weight
    found = "nothing" if weight is None else f"a {type(weight).__name__} of shape {tuple(weight.shape)}"
    raise ParamsError(
        f"{name!r} has the shape {wanted}, and the state holds {found} for it. A state under transforms that cut or"
        " stack params is made plain by the step it is for: lm.quantize(step.export(state))"
    )
