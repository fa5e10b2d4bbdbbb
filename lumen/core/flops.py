"""Floating point operations: how many a step needs, and how many an accelerator can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen import tree
from lumen.core import _torch_compat, rules
from lumen.core.arguments import checked, checked_first
from lumen.core.flop_formulas import formulas
from lumen.core.primitives import UpdateCall
from lumen.core.rules import Next, Primitive
from lumen.core.step import StepFn, as_step
from lumen.errors import PurityError

_LONGEST = 200  # of a reason


@checked_first
def flops_of(step: StepFn, state: Any, batch: Any) -> int | None:
    """The floating point operations of one step, forward, backward and update; None where it cannot be traced.

    Counted are products of matrices and vectors, convolutions, attention and recurrent layers: a product of `[B, D]`
    and `[D, F]` is `2·B·D·F`. The formulas are those of torch's own counter, and of this module for what that lacks
    (products in place and with vectors, grouped products, fused recurrent layers); products of sparse tensors,
    `nn.Bilinear` and `torch.cdist` count nothing. Attention counts in full under a causal mask too. The step runs on
    fake tensors: nothing is computed, kept in memory or drawn from a random generator; what a step does beside its
    arguments, it does.

    Of a step with transforms it is the plain function that is counted, so recomputation (`lm.remat`) adds nothing.
    Give the state and the batch of that function.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     def loss_fn(params, batch):
    ...         out, _ = state.apply(params, batch)
    ...         return out.square().mean()
    ...     loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    ...     return state.apply_gradients(grads), {"loss": loss}
    >>> state = lm.TrainState.create(torch.nn.Linear(8, 4), lm.optim.sgd(0.1))
    >>> lm.flops_of(step, state, torch.ones(16, 8))  # forward and the weight's gradient: 2 products of 2·16·8·4
    2048
    """
    return count(step, state, batch)[0]


def count(step: StepFn, state: Any, batch: Any) -> tuple[int | None, str]:
    """What `flops_of` gives, and the reason where that is None."""
    user = as_step(step).user
    try:
        return _counted(user, state, batch), ""
    except PurityError:  # an optimizer that cannot be traced, `from_torch`: count the step without its update
        try:
            with rules.rule_context({Primitive.UPDATE: _standing_still}):
                return _counted(user, state, batch), ""
        except Exception as error:
            return None, _reason(error)
    except Exception as error:  # whatever the user's function raises on tensors without values
        return None, _reason(error)


def _counted(user: StepFn, state: Any, batch: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    # Constants that a step closes over are real tensors.
    with _torch_compat.FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(leaf: Any) -> Any:
            if isinstance(leaf, Tensor | np.ndarray):
                return mode.from_tensor(torch.as_tensor(leaf))
            return leaf

        arguments = tree.map(fake, (state, batch))
        with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
            user(*arguments)
    total: int = counter.get_total_flops()
    return total


def _standing_still(next: Next, call: UpdateCall) -> tuple[Any, Any]:
    return call.params, call.opt_state


def _reason(error: Exception) -> str:
    if type(error).__name__ in ("DataDependentOutputException", "GuardOnDataDependentSymNode"):
        return "the step reads a tensor's value (.item(), int(x), if x), which tracing without values cannot follow"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST]}{'…' * (len(text) > _LONGEST)}"


@checked
def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float | None:
    """The floating point operations per second that the vendor states for `device` at `dtype`, without sparsity.

    They are those of its matrix units where it has some for `dtype`, with accumulation in float32. float32 means
    TF32 where `torch.set_float32_matmul_precision("high")` was called and the device has it. None for a CPU, and for
    what the table does not know.

    >>> import lumen as lm, torch
    >>> lm.peak_flops("cpu", torch.bfloat16) is None
    True
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype)


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """`peak_flops` of the accelerator that calls itself `name`."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    if not _OTHERS.isdisjoint(words):
        return None
    for pattern, figures in _PEAKS.items():
        if all(word in words for word in pattern.split()):
            return _figure(figures, dtype)
    return None


def _figure(figures: Mapping[str, float], dtype: torch.dtype) -> float | None:
    key = _KEYS.get(dtype)
    if key == "fp32" and "tf32" in figures and torch.get_float32_matmul_precision() != "highest":
        key = "tf32"
    tera = figures.get(key) if key else None
    return None if tera is None else tera * 1e12


_KEYS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}

# Parts of a card (MIG), and slower ones that share a name.
_OTHERS = frozenset({"mig", "laptop", "d"})

_H100_SXM = {"fp64": 66.9, "fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9}
_H100_NVL = {"fp64": 60.0, "fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5, "fp8": 1670.5}

# TFLOP/s by the words of a device's name, the more special names first. Where a data sheet gives figures with 2:4
# sparsity, these are half of them.
_PEAKS: dict[str, dict[str, float]] = {
    # NVIDIA HGX B200 (Blackwell data sheet, one GPU of the board)
    "b200": {"fp64": 37.0, "fp32": 75.0, "tf32": 1100.0, "bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0},
    # NVIDIA H200 data sheet: the SXM's figures are the H100's, the NVL's those of the H100 NVL
    "h200 nvl": _H100_NVL,
    "h200": _H100_SXM,
    # NVIDIA H100 data sheet and Hopper architecture white paper; the SXM calls itself "H100 80GB HBM3"
    "h100 nvl": _H100_NVL,
    "h100 pcie": {"fp64": 51.2, "fp32": 51.2, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0, "fp8": 1513.0},
    "h100": _H100_SXM,
    # NVIDIA A100 data sheet: SXM and PCIe alike
    "a100": {"fp64": 19.5, "fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0},
    # NVIDIA L4 and L40S data sheets
    "l4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0, "fp8": 242.5},
    "l40s": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.05, "fp16": 362.05, "fp8": 733.0},
    # NVIDIA A10G data sheet: a card of AWS, whose matrix units are slower than the A10's
    "a10g": {"fp32": 35.0, "tf32": 35.0, "bf16": 70.0, "fp16": 70.0},
    # NVIDIA T4 data sheet
    "t4": {"fp32": 8.1, "fp16": 65.0},
    # NVIDIA V100 data sheet
    "v100s": {"fp64": 8.2, "fp32": 16.4, "fp16": 130.0},
    "v100 pcie": {"fp64": 7.0, "fp32": 14.0, "fp16": 112.0},
    "v100": {"fp64": 7.8, "fp32": 15.7, "fp16": 125.0},
    # NVIDIA Ada (AD102) and Ampere (GA102) architecture white papers, accumulating in FP32: FP16 is twice as fast
    # where it accumulates in FP16, which torch does not ask for
    "rtx 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3},
    "rtx 3090 ti": {"fp32": 40.0, "tf32": 40.0, "bf16": 80.0, "fp16": 80.0},
    "rtx 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0},
    # AMD CDNA 3 data sheet, matrix figures
    "mi300x": {"fp64": 163.4, "fp32": 163.4, "tf32": 653.7, "bf16": 1307.4, "fp16": 1307.4, "fp8": 2614.9},
    # AMD MI250X data sheet, matrix figures, halved: torch counts each of its two dies as a device
    "mi250x": {"fp64": 47.85, "fp32": 47.85, "bf16": 191.5, "fp16": 191.5},
}
