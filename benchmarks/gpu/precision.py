"""Precisions: TF32, 16 bits with and without loss scaling, bf16 params, and the eight-bit products of torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lumen as lm
from benchmarks.gpu.check import Checks, Setting, agree
from benchmarks.gpu.jobs import compared, gpt, state_of, step, texts, trained

checks = Checks()


def losses_near(setting: Setting, tolerance: float, *transforms: lm.Transform, **sizes: int) -> dict[str, Any]:
    """The losses of four steps are those of float32 within `tolerance`, relative; the largest difference."""
    (state, losses), (_, expected) = compared(setting, *transforms, **sizes)
    if not all(bool(p.isfinite().all()) for p in lm.tree.tensors(state.params)):
        raise AssertionError("a param is not finite")
    return {"largest difference of a loss": agree(losses.float(), expected, tolerance)}


@checks("tf32")
def tf32(setting: Setting) -> dict[str, Any]:
    """TF32 products during the step, and torch's setting as before after it."""
    before = torch.get_float32_matmul_precision()
    figures = losses_near(setting, 1e-2, lm.precision("tf32"), width=64)
    assert torch.get_float32_matmul_precision() == before
    x = torch.randn(512, 512, device=setting.device)
    from lumen.transforms._support.matmul_precision import float32_products

    exact = x @ x
    with float32_products("tf32"):
        rounded = x @ x
    figures["difference of a product"] = float((exact - rounded).abs().max())
    if setting.on_gpu and torch.cuda.get_device_capability(setting.device) >= (8, 0):
        assert figures["difference of a product"] > 0, "products in TF32 are those in float32"
    return figures


@checks("bf16")
def bf16(setting: Setting) -> dict[str, Any]:
    """Autocast to bfloat16."""
    return losses_near(setting, 5e-2, lm.precision("bf16"))


@checks("bf16, cast='model'")
def bf16_model(setting: Setting) -> dict[str, Any]:
    """The whole model in bfloat16."""
    return losses_near(setting, 5e-2, lm.precision("bf16", cast="model"))


@checks("bf16 params, stochastic rounding")
def bf16_params(setting: Setting) -> dict[str, Any]:
    """bfloat16 params, rounded up or down at random, with moments in float32."""
    net = gpt(setting).to(torch.bfloat16)
    tx = lm.optim.adamw(1e-3, stochastic_rounding=True)
    state, losses = trained(lm.donate()(step), state_of(net, tx), texts(setting, 4))
    assert {p.dtype for p in lm.tree.tensors(state.params)} == {torch.bfloat16}
    _, expected = trained(step, state_of(gpt(setting)), texts(setting, 4))
    return {"largest difference of a loss": agree(losses.float(), expected, 5e-2)}


@checks("fp16")
def fp16(setting: Setting) -> dict[str, Any]:
    """float16 with the scale of the policy."""
    return losses_near(setting, 5e-2, lm.precision("fp16"))


@checks("fp16, a scale that overflows")
def fp16_overflow(setting: Setting) -> dict[str, Any]:
    """A scale of 2^100 overflows: the updates are skipped, and it is halved each time."""
    policy = lm.Policy(torch.float32, torch.float16, torch.float32, loss_scale=2.0**100)
    fast = lm.precision(policy)(step)
    state = fast.init(state_of(gpt(setting)))
    before = {name: p.clone() for name, p in state.params.items()}
    for batch in texts(setting, 3):
        state, _ = fast(state, batch)
    agree(dict(state.params), before)
    scale = float(state.slots["precision"].scale)
    assert scale == 2.0**97, f"the scale is {scale}"
    return {"scale": scale}


@checks("guard skips a step that is not finite")
def guard(setting: Setting) -> dict[str, Any]:
    """A batch with NaN changes nothing under guard, and the next one trains."""

    def loss_fn(params: Any, x: torch.Tensor) -> torch.Tensor:
        return state.apply(params, x)[0].square().mean()

    def guarded_step(state: Any, x: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        loss, grads = lm.value_and_grad(loss_fn)(state.params, x)
        return state.apply_gradients(grads), {"loss": loss}

    torch.manual_seed(0)
    state = state_of(nn.Linear(4, 4).to(setting.device))
    fast = lm.compose(lm.guard(), lm.clip(1.0), lm.donate())(guarded_step)
    current = fast.init(state)
    before = {name: p.clone() for name, p in current.params.items()}
    current, _ = fast(current, torch.full((2, 4), float("nan"), device=setting.device))
    agree(dict(current.params), before)
    current, _ = fast(current, torch.ones(2, 4, device=setting.device))
    assert not torch.equal(current.params["weight"], before["weight"])
    return {}


@checks("int8 products", seconds=120, packages=("torchao",), may_refuse=True)
def int8(setting: Setting) -> dict[str, Any]:
    """torchao's int8 products, which Triton computes on a GPU."""
    return losses_near(setting, 0.1, lm.quantized_matmul("int8"))


@checks("fp8 products", seconds=120, packages=("torchao",), may_refuse=True)
def fp8(setting: Setting) -> dict[str, Any]:
    """torchao's fp8 products; a dry run emulates them."""
    return losses_near(setting, 0.1, lm.quantized_matmul("fp8", emulate=not setting.on_gpu))


@checks("qat", packages=("torchao",))
def qat(setting: Setting) -> dict[str, Any]:
    """Weights as lm.quantize would store them."""
    return losses_near(setting, 0.1, lm.quantized_matmul("qat"))


@checks("int8 weights for inference", packages=("torchao",), may_refuse=True)
def quantized(setting: Setting) -> dict[str, Any]:
    """A state whose weights are int8."""
    state, (x, _) = state_of(gpt(setting)), texts(setting, 1)[0]
    small = lm.quantize(state, "int8")
    with torch.no_grad():
        found, expected = small.apply(small.params, x)[0], state.apply(state.params, x)[0]
    return {"largest difference of a logit": agree(found, expected, 0.1)}
