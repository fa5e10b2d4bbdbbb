"""The optimizers' fused kernels, beside torch's: the same numbers, and the time of an update."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lumen as lm
from benchmarks.gpu.check import Checks, Setting, agree
from benchmarks.tasks import GPT

checks = Checks()
Tensors = dict[str, Tensor]
SHAPES = {"w": (33, 17), "b": (5,), "s": (), "big": (4097,)}


def tensors(setting: Setting, seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Tensors:
    """Random tensors of these shapes on the device."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(setting.device) for name, shape in shapes.items()}


def updater(tx: Any, params: Tensors) -> tuple[Callable[[Tensors], Tensors], Any]:
    """A function that makes one donated update, and the state before it."""

    def step(state: Any, grads: Tensors) -> tuple[Any, dict[str, Any]]:
        params, opt_state = lm.apply_gradients(tx, grads, state["opt"], state["params"])
        return {"params": params, "opt": opt_state}, {}

    donated = lm.donate()(step)
    state = donated.init({"params": params, "opt": tx.init(params)})

    def update(grads: Tensors) -> Tensors:
        nonlocal state
        state, _ = donated(state, grads)
        params: Tensors = state["params"]
        return params

    return update, state


OPTIMIZERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "adamw": (
        lambda: lm.optim.adamw(1e-2),
        lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=1e-2, fused=True),
        "aten::_fused_adamw_",
    ),
    "adam": (
        lambda: lm.optim.adam(1e-2),
        lambda params: torch.optim.Adam(params, lr=1e-2, fused=True),
        "aten::_fused_adam_",
    ),
    "sgd": (
        lambda: lm.optim.sgd(1e-2, momentum=0.9),
        lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, fused=True),
        "aten::_fused_sgd_",
    ),
    "adagrad": (lambda: lm.optim.adagrad(1e-2), lambda params: torch.optim.Adagrad(params, lr=1e-2), ""),
}


def _add(name: str) -> None:
    ours, theirs, kernel = OPTIMIZERS[name]

    @checks(f"{name}, beside torch's")
    def parity(setting: Setting) -> dict[str, Any]:
        update, _ = updater(ours(), tensors(setting, 0))
        leaves = {key: torch.nn.Parameter(value) for key, value in tensors(setting, 0).items()}
        optimizer = theirs(list(leaves.values()))
        for seed in range(1, 11):
            grads = tensors(setting, seed)
            found = update(grads)
            for key, leaf in leaves.items():
                leaf.grad = grads[key]
            optimizer.step()
        expected = {key: leaf.detach() for key, leaf in leaves.items()}
        figures: dict[str, Any] = {"largest difference of a param": agree(found, expected, 1e-5)}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            update(tensors(setting, 11))
        figures["fused"] = kernel in {event.key for event in profile.key_averages()}
        if kernel:
            assert figures["fused"], f"{kernel} did not run"
        return figures


for _name in OPTIMIZERS:
    _add(_name)


@checks("the others, beside their float64 on the CPU", seconds=90)
def others(setting: Setting) -> dict[str, Any]:
    """Five updates of the optimizers without a kernel of their own."""
    made = {
        "lion": lm.optim.lion(1e-3),
        "rmsprop": lm.optim.rmsprop(1e-3),
        "nadam": lm.optim.nadam(1e-3),
        "lamb": lm.optim.lamb(1e-3),
        "adafactor": lm.optim.adafactor(1e-3),
    }
    worst = {}
    for name, tx in made.items():
        wide = {key: value.double().cpu() for key, value in tensors(setting, 0).items()}
        update, _ = updater(tx, tensors(setting, 0))
        exact, _ = updater(tx, wide)
        for seed in range(1, 6):
            grads = tensors(setting, seed)
            found, expected = update(grads), exact({key: g.double().cpu() for key, g in grads.items()})
        worst[name] = agree({key: p.double().cpu() for key, p in found.items()}, expected, 1e-3)
    return worst


@checks("moments of eight bits, and of bf16")
def low_bit(setting: Setting) -> dict[str, Any]:
    """AdamW with low-bit state stays near AdamW; the rounding draws from keys, on the device."""
    shapes = {"w": (128, 64), "b": (7,)}
    figures = {}
    for dtype in ("int8", "bf16"):
        update, _ = updater(lm.optim.adamw(1e-3, state_dtype=dtype), tensors(setting, 0, shapes))
        exact, _ = updater(lm.optim.adamw(1e-3), tensors(setting, 0, shapes))
        for seed in range(1, 6):
            grads = tensors(setting, seed, shapes)
            found, expected = update(grads), exact(grads)
        figures[dtype] = agree(found, expected, 2e-2)
    return figures


@checks("muon, on matrices", seconds=90)
def muon(setting: Setting) -> dict[str, Any]:
    """Muon's orthogonal updates are finite."""
    shapes = {"a": (64, 32), "b": (32, 64)}
    update, _ = updater(lm.optim.muon(0.02), tensors(setting, 0, shapes))
    found = update(tensors(setting, 1, shapes))
    assert all(bool(p.isfinite().all()) for p in found.values())
    return {}


def time_of(setting: Setting, calls: dict[str, Callable[[], Any]], rounds: int, repeats: int) -> dict[str, float]:
    """The median seconds of each call, in interleaved rounds, after a few to warm up."""
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            setting.synchronize()
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            setting.synchronize()
            times[name].append((time.perf_counter() - began) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


@checks("the time of AdamW for GPT-2 small, beside torch's", seconds=90)
def timed(setting: Setting) -> dict[str, Any]:
    """Milliseconds of an update, and the ratio to `torch.optim.AdamW(fused=True)`."""
    with torch.device("meta"):
        net = GPT(*setting.pick((50304, 1024, 768, 12, 12), (64, 16, 32, 2, 2)))
    shapes = {name.replace(".", "/"): tuple(p.shape) for name, p in net.named_parameters()}
    grads = {name: torch.full(shape, 1e-3, device=setting.device) for name, shape in shapes.items()}
    leaves = [torch.nn.Parameter(torch.ones_like(grad)) for grad in grads.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad
    optimizer = torch.optim.AdamW(leaves, lr=1e-4, fused=True)
    update, _ = updater(lm.optim.adamw(1e-4), {name: torch.ones_like(grad) for name, grad in grads.items()})
    calls = {"torch": optimizer.step, "Lumen": lambda: update(grads)}
    times = time_of(setting, calls, *setting.pick((5, 20), (1, 1)))
    return {
        "torch ms": 1e3 * times["torch"],
        "Lumen ms": 1e3 * times["Lumen"],
        "ratio": times["Lumen"] / times["torch"],
    }
