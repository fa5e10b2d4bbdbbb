"""`lm.quantize`: quantize the linear layers of a state to eight or four bits with torchao."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from lumen.bridges import nf4
from lumen.bridges.lora_layer import Lora, lora_class, plain_class
from lumen.bridges.quantized_layer import Form, quantized_class
from lumen.core import _torch_compat
from lumen.core.module import param_slots
from lumen.core.step import field_of
from lumen.errors import HyperparameterError, ParamsError, StateError
from lumen.transforms._support.torchao import Layers, check_kind, quantizable_layers, row_scales, torchao

KINDS = ("int8", "fp8", "nf4")
_FORWARDS = (nn.Linear.forward, Lora.forward)
_CONFIGS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}

S = TypeVar("S")


def quantize(state: S, kind: str = "int8", *, layers: Layers | None = None) -> S:
    """`state` with linear weights quantized to eight bits, about a quarter of float32's memory, or to four, an eighth.

    The result is a normal state: `state.apply(state.params, x)`, `Runner.validate`, `Runner.predict`, `lm.compile`,
    `lm.precision("bf16")` and checkpoints accept it. Instead of `layer.weight` among its params, it has
    `layer.weight_qdata` (int8 or float8, [outputs, inputs]) and `layer.weight_scale` (float32, [outputs, 1]) among its
    buffers (for int8 also a `layer.weight_zero_point` of 0), which torchao multiplies with as in its own modules;
    inputs, outputs and all other tensors are unchanged. The codes and scales of "nf4" are below; each use rebuilds the
    layer's weight from them. The argument is not changed; tensors that are not quantized share its memory, which
    further training under `lm.donate` overwrites.

    Quantized weights are frozen, and gradients go through them. Where all of them were frozen before, such as those of
    a model with adapters (`lm.bridges.lora.adapt`), the state can be trained further: that is QLoRA. `lm.fsdp()` shards
    codes and scales. Where params are quantized, the state is for inference: optimizer state and slots are dropped.

    Args:
        state: a plain state, such as the result of `step.export(state)`, that `donate` has not consumed.
        kind: "int8" scales each row to its largest entry: the error of a weight is at most 1/254 of that. "fp8" is
            float8_e4m3 with the same scaling, on devices that support it: the error is at most 1/16 of the weight, or
            1/450,000 of the row's largest entry if that is more. Rows of zeros stay zeros. "nf4" rounds blocks of 64
            consecutive entries to 16 levels, relative to the block's largest entry: the error is at most 0.16 of that,
            plus the rounding of the scales, which are quantized to int8 themselves. The tensors are those of torchao's
            `NF4Tensor` of the weight in float32: `layer.weight_quantized_data` (uint8, [N / 2] for N entries),
            `weight_quantized_scalers` (int8, [N / 64]), `weight_quantization_factor`, `weight_scaler_mean` and
            `weight_nf4` (the levels). Blocks of zeros stay zeros.
        layers: the `nn.Linear` layers: globs or regular expressions for their names, one or several, or a predicate
            `(name, module) -> bool`. Default: all whose weight is not shared, for example with an embedding.

    Raises:
        HyperparameterError: the kind is unknown, or the device of the weights does not support it.
        ParamsError: a layer cannot be quantized, no layer matches, or a weight is sharded or not finite.
        PatternError: a pattern matches no linear layer.
        ImportError: torchao is missing.

    Law: `quantize(state)` equals the model with each selected weight rounded as above. Algorithm of "nf4": Dettmers et
    al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", with its double quantization.

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
    tensors = {**params, **buffers}
    names = {id(table): name for table, key, name in param_slots(apply.module) if key == "weight"}
    packed: dict[str, _Packed] = {}  # by the name of the layer
    replaced = set()
    for layer, module in quantizable_layers(apply.module, layers, untied=True, forwards=_FORWARDS).items():
        name = names[id(_torch_compat.own_params(module))]
        weight = _full_weight(name, module, tensors)
        packed[layer] = _Packed.nf4(name, weight) if kind == "nf4" else _Packed.of(weight, kind)
        replaced.add(name)
    new_buffers = {f"{layer}.{key}".lstrip("."): x for layer, p in packed.items() for key, x in p.tensors.items()}
    forms = {layer: p.form for layer, p in packed.items()}

    def change(module: nn.Module) -> None:
        for layer, p in packed.items():
            p.install(module.get_submodule(layer))

    changes: dict[str, Any] = {
        "params": {name: p for name, p in params.items() if name not in replaced},
        "buffers": {name: b for name, b in buffers.items() if name not in replaced} | new_buffers,
        "apply_fn": apply.variant(("quantize", repr(forms)), change, (apply.frozen - replaced) | new_buffers.keys()),
    }
    if not replaced.isdisjoint(params):
        changes |= {"tx": _Untrained(), "opt_state": (), "slots": {}}
    result: Any = state
    return result.replace(**{name: value for name, value in changes.items() if hasattr(state, name)})  # type: ignore[no-any-return]


class _Packed:
    """A quantized weight as plain tensors, with the attributes to rebuild torchao's tensor from them."""

    def __init__(self, kind: Any, tensors: dict[str, Tensor], attributes: Any) -> None:
        self.tensors = tensors
        self.form = Form(kind, tuple(tensors), attributes)

    @classmethod
    def of(cls, weight: Tensor, kind: str) -> _Packed:
        """`weight` [outputs, inputs], packed."""
        ao = torchao("quantization")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        scales = row_scales(weight)
        values = weight.float()
        nonzero = (values != 0).any(1, keepdim=True)
        layer.weight = nn.Parameter(torch.where(nonzero, values / scales, 1.0), requires_grad=False)
        try:
            ao.quantize_(layer, getattr(ao, _CONFIGS[kind])())
        except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            fix = "lm.quantize(state, 'int8')" if kind == "fp8" else "layers=... for the other layers"
            raise HyperparameterError(
                f"torchao cannot quantize {weight.dtype} weights of shape {tuple(weight.shape)} on {weight.device} to"
                f" {kind}: {error}. Write {fix}, or move the weights to another device first."
            ) from error
        packed: Any = layer.weight.detach()
        inner, attributes = packed.__tensor_flatten__()
        tensors = {f"weight_{name}": getattr(packed, name) for name in inner}
        codes = tensors["weight_qdata"]
        tensors["weight_qdata"] = (codes.view(torch.uint8) * nonzero).view(codes.dtype)
        tensors["weight_scale"] = tensors["weight_scale"] * scales
        dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype  # torchao has no float64
        return cls(type(packed), tensors, attributes | {"dtype": dtype})

    @classmethod
    def nf4(cls, name: str, weight: Tensor) -> _Packed:
        """`weight` [outputs, inputs] in NF4."""
        tensors = {f"weight_{key}": x for key, x in nf4.pack(name, weight).items()}
        return cls(None, tensors, {"shape": tuple(weight.shape), "dtype": weight.dtype})

    def install(self, layer: nn.Module) -> None:
        """Replace the weight of a skeleton's layer with these tensors."""
        del _torch_compat.own_params(layer)["weight"]
        for name, tensor in self.tensors.items():
            layer.register_buffer(name, torch.empty_like(tensor, device="meta"))
        kind: Any = type(layer)
        adapted = issubclass(kind, Lora)
        quantized: Any = quantized_class(plain_class(kind))
        layer.__class__ = lora_class(quantized) if adapted else quantized
        layer._form = self.form  # type: ignore[assignment]


class _Untrained:
    """Replaces the optimizer of a quantized state, which cannot be trained."""

    def init(self, _params: Any) -> NoReturn:
        """Raise `StateError`."""
        raise StateError(_NO_TRAINING)

    def apply(
        self, _grads: Any, _state: Any, _params: Any, *, skip: Tensor | None = None, donate: bool = False
    ) -> NoReturn:
        """Raise `StateError`."""
        raise StateError(_NO_TRAINING)


_NO_TRAINING = (
    "this state was quantized for inference: its weights are rounded, and its optimizer state was dropped. Train the"
    " original state; or, to train the remaining params, such as adapters, give it a new optimizer:"
    " state = state.replace(tx=tx, opt_state=tx.init(state.params))"
)


def _full_weight(name: str, layer: nn.Linear, tensors: Mapping[str, Any]) -> Tensor:
    """The weight of `layer` in the state, which must be full rather than sharded."""
    weight = tensors.get(name)
    expected = (layer.out_features, layer.in_features)
    if type(weight) is Tensor and weight.is_meta:
        raise ParamsError(
            f"{name!r} is on the meta device: its values have not been read yet. Quantize what a plain step has read:"
            " state = lm.quantize(lm.compose()(step).init(state), 'nf4')"
        )
    if type(weight) is Tensor and weight.shape == expected and weight.is_floating_point():
        if not weight.float().isfinite().all():
            raise ParamsError(f"{name!r} has NaN or infinite entries, so its rows have no scale.")
        return weight
    actual = "nothing" if weight is None else f"a {type(weight).__name__} of shape {tuple(weight.shape)}"
    raise ParamsError(
        f"{name!r} has the shape {expected}, and the state has {actual} for it. If the transforms of its step shard"
        " or stack params, export it first: lm.quantize(step.export(state))"
    )
