"""NF4: torchao's own codes and scales as plain tensors, and adapters on a base that is rounded to them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lumen as lm
from lumen.bridges import huggingface, lora, nf4

pytest.importorskip("torchao")


def network(dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32, bias=bias), nn.Tanh(), nn.Linear(32, 16, bias=bias), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(dtype)


def adapted(net: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1)
    return lora.adapt(net or network(), targets=["0", "2"], rank=2)


def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    def loss_fn(params: Any, batch: Any) -> Any:
        return F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def data() -> dict[str, Tensor]:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    return {"x": x, "y": x[:, :4].argmax(-1)}


def make_state(net: nn.Module) -> lm.TrainState:
    return lm.TrainState.create(net, lm.optim.adam(1e-2))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.sampled_from([64, 128, 320]), scale=st.sampled_from([1e-4, 1.0, 300.0]))
def test_codes_and_scales_are_torchaos(rows: int, columns: int, scale: float) -> None:
    from torchao.quantization import NF4Tensor

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * scale
    packed = nf4.pack("weight", weight)
    blocks = weight.numel() // 64
    if blocks > 1:  # of one, torchao divides 0 by 0
        wanted = NF4Tensor.from_tensor(weight, 64, math.gcd(blocks, 256))
        for name, tensor in packed.items():
            assert torch.equal(tensor, getattr(wanted, name)), name
        assert torch.equal(nf4.unpack(packed, weight.shape, torch.float32), wanted.get_original_weight())
    found = nf4.unpack(packed, weight.shape, torch.float32)
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    spread = (largest - largest.mean()).abs().max() / 128  # of which a scale is rounded to a half, or clamped to one
    assert ((found - weight).view(-1, 64).abs() <= 0.1525 * largest + 1.01 * spread + 1e-6 * scale).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_blocks_that_are_equal_or_zero(value: float) -> None:
    weight = torch.full((4, 64), value)
    assert torch.equal(nf4.unpack(nf4.pack("weight", weight), (4, 64), torch.float32), weight)
    weight[1] = torch.linspace(-1, 1, 64)
    weight[2] = 0.0
    found = nf4.unpack(nf4.pack("weight", weight), (4, 64), torch.float32)
    assert found.isfinite().all()
    assert not found[2].any()


def rounded(state: lm.TrainState, quantized: lm.TrainState, kind: str) -> lm.TrainState:
    """The state with each quantized weight as its codes have it."""
    module = lm.bridges.module(quantized)
    weights = {}
    for name in ("0", "2"):
        weight: Any = module.get_submodule(name).weight
        weights[f"{name}.weight"] = weight if kind == "nf4" else weight.dequantize()
    return state.replace(buffers={**state.buffers, **weights})


@pytest.mark.parametrize(("kind", "around"), [*itertools.product(["nf4", "int8"], ["", "accumulate", "compile"])])
def test_adapters_train_as_on_a_rounded_base(kind: str, around: str) -> None:
    state = make_state(adapted())
    small = lm.quantize(state, kind, layers=["0", "2"])
    assert small.tx is state.tx
    assert small.params.keys() == state.params.keys()
    transforms = {"accumulate": [lm.accumulate(2)], "compile": [lm.compile(backend="eager")], "": []}[around]
    found, wanted = small, rounded(state, small, kind)
    with torch.no_grad():
        assert torch.equal(found.apply(found.params, data()["x"])[0], found.apply(found.params, data()["x"])[0])
    for _ in range(3):
        found, _ = lm.compose(*transforms)(step)(found, data())
        wanted, _ = lm.compose(*transforms)(step)(wanted, data())
    for name, p in wanted.params.items():
        torch.testing.assert_close(found.params[name], p, rtol=1e-4, atol=1e-6)
        if kind == "nf4":
            assert torch.equal(found.params[name], p), name
    merged = lora.merged(found)
    assert type(merged.get_submodule("0")) is nn.Linear
    torch.testing.assert_close(merged(data()["x"]), found.apply(found.params, data()["x"])[0])


@pytest.mark.parametrize("policy", ["bf16", "model"])
def test_in_sixteen_bits(policy: str) -> None:
    precise = lm.precision("bf16", cast="model") if policy == "model" else lm.precision("bf16")
    small = lm.quantize(make_state(adapted(network(bias=True))), "nf4", layers=["0", "2"])
    wrapped = lm.compose(lm.donate(), precise, lm.remat())(step)
    state, before = wrapped.init(small), None
    for _ in range(40):
        state, metrics = wrapped(state, data())
        before = metrics["loss"] if before is None else before
    assert metrics["loss"] < 0.8 * before
    assert state.buffers["0.weight_quantized_data"].dtype == torch.uint8


def test_what_is_trained_or_does_not_fit_is_named() -> None:
    plain = lm.quantize(make_state(network()), "nf4", layers="0")
    with pytest.raises(lm.LumenError, match=r"quantized for inference"):
        step(plain, data())
    with pytest.raises(lm.LumenError, match=r"'3.weight' has \(4, 15\) = 60 entries, and NF4 packs blocks of 64"):
        lm.quantize(make_state(nn.Sequential(*network()[:3], nn.Linear(15, 4))), "nf4")
    with pytest.raises(lm.LumenError, match=r"'0' is quantized already. Adapt the model first"):
        lora.adapt(lm.bridges.module(plain), targets="0")


def test_peft_reads_the_adapters(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    state = lm.quantize(make_state(adapted()), "nf4", layers="0")
    for _ in range(3):
        state, _ = step(state, data())
    path = huggingface.save_adapters(state, tmp_path / "adapters", base="somewhere")
    base = lora.merged(state.replace(params={**state.params, **zeros(state)}))
    found = peft.PeftModel.from_pretrained(base, path)
    torch.testing.assert_close(found(data()["x"]), state.apply(state.params, data()["x"])[0])
    assert found.peft_config["default"].base_model_name_or_path == "somewhere"
    with pytest.raises(lm.LumenError, match="already exists"):
        huggingface.save_adapters(state, path)
    with pytest.raises(lm.LumenError, match=r"'0.lora_b' has the shape \(32, 2\).*step\.export"):
        cut = {**state.params, "0.lora_b": state.params["0.lora_b"][:3]}
        huggingface.save_adapters(state.replace(params=cut), tmp_path / "cut")
    with pytest.raises(lm.LumenError, match="this state has none"):
        huggingface.save_adapters(make_state(network()), tmp_path / "none")
    also = make_state(lora.adapt(network(), targets="0", also="3.*"))
    with pytest.raises(lm.LumenError, match=r"trains 3.weight, 3.bias beside them"):
        huggingface.save_adapters(also, tmp_path / "also")


def zeros(state: lm.TrainState) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) for name, p in state.params.items() if name.endswith("lora_b")}
