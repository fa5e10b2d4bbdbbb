"""Pretraining GPT-2 small: tokens per second and model FLOPs utilization of a step, beside the raw loop.

Both train on the same batches with fused AdamW, and their losses are compared. Seconds are the medians of interleaved
rounds, after the steps that compile. The FLOPs are those of `lm.flops_of`, which counts no recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import lumen as lm
from benchmarks.gpu.check import Checks, Setting
from benchmarks.gpu.jobs import gpt, step, texts
from benchmarks.gpu.optimizers import time_of
from benchmarks.tasks import Batch, loss_of

checks = Checks()
RATE = 1e-4
STEPS = 3  # whose losses are compared
Train = Callable[[], Any]  # one step on the next batch; returns the loss


def sizes(setting: Setting) -> dict[str, int]:
    """GPT-2 small, with a vocabulary that is a multiple of 64; a tiny one in a dry run."""
    small = {"vocab": 50304, "tokens": 1024, "width": 768, "heads": 12, "layers": 12}
    return setting.pick(small, {"vocab": 64, "tokens": 16, "width": 32, "heads": 2, "layers": 1})


def batches_of(setting: Setting) -> list[Batch]:
    """16 rows on a GPU with 60 GB and more, else 4."""
    size = sizes(setting)
    rows = 2
    if setting.on_gpu:
        rows = 16 if torch.cuda.get_device_properties(setting.device).total_memory > 60e9 else 4
    return texts(setting, STEPS, rows, size["vocab"], size["tokens"])


def cycled(batches: list[Batch], train: Callable[[Batch], Any]) -> Train:
    """A call that trains on one batch after the other, again from the first after the last."""
    position = 0

    def call() -> Any:
        nonlocal position
        position += 1
        return train(batches[(position - 1) % len(batches)])

    return call


def raw(
    setting: Setting, batches: list[Batch], change: Callable[[nn.Module], Any] | None = None, autocast: bool = True
) -> Train:
    """The loop that one writes by hand; `change` compiles or casts the model."""
    net = gpt(setting, **sizes(setting))
    model = net if change is None else change(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-2, fused=True)

    def train(batch: Batch) -> Any:
        optimizer.zero_grad()
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(model(batch[0]).float(), batch[1])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return cycled(batches, train)


def lumen(
    setting: Setting, batches: list[Batch], transforms: Iterable[lm.Transform], dtype: Any = torch.float32
) -> Train:
    """The same under `transforms`."""
    net = gpt(setting, **sizes(setting)).to(dtype)
    fast = lm.compose(*transforms, lm.donate())(step)
    state = fast.init(lm.TrainState.create(net, lm.optim.adamw(RATE, weight_decay=1e-2)))
    del net

    def train(batch: Batch) -> Any:
        nonlocal state
        state, metrics = fast(state, batch)
        return metrics["loss"].detach()

    return cycled(batches, train)


def beside(
    setting: Setting, theirs: Train, ours: Train, batches: list[Batch], tolerance: float = 2e-2
) -> dict[str, Any]:
    """The figures of both; fails if their losses differ by more than `tolerance`, relative."""
    expected = [float(theirs()) for _ in range(STEPS)]
    found = [float(ours()) for _ in range(STEPS)]
    for a, b in zip(found, expected, strict=True):
        assert abs(a - b) <= tolerance * abs(b), f"losses {found}, and {expected} in the raw loop"
    times = time_of(setting, {"raw": theirs, "Lumen": ours}, *setting.pick((5, 10), (1, 1)))
    tokens = batches[0][0].numel()
    figures = {
        "raw tokens/s": tokens / times["raw"],
        "Lumen tokens/s": tokens / times["Lumen"],
        "ratio of times": times["Lumen"] / times["raw"],
        "loss": found[-1],
    }
    peak = lm.peak_flops(setting.device, torch.bfloat16)
    flops = lm.flops_of(step, *counted(setting, batches[0]))
    assert flops, "the operations of the step could not be counted"
    figures["GFLOP"] = flops / 1e9
    if peak:
        figures |= {f"{name} MFU": flops / times[name] / peak for name in times}
    if setting.on_gpu:
        figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def counted(setting: Setting, batch: Batch) -> tuple[Any, Batch]:
    """A state and a batch without values, whose operations are counted."""
    with torch.device("meta"):
        net = gpt(Setting(torch.device("meta"), setting.directory), **sizes(setting))
    state = lm.TrainState.create(net, lm.optim.adamw(RATE))
    return state, lm.tree.map(lambda x: x.to("meta"), batch)


def each_block(setting: Setting) -> Callable[[nn.Module], nn.Module]:
    """torch.compile for each block, as torchtitan does; a dry run leaves them as they are."""

    def change(net: nn.Module) -> nn.Module:
        if setting.on_gpu:
            for block in net.blocks:  # type: ignore[union-attr]
                block.compile()
        return net

    return change


@checks("eager, bf16 autocast, fused AdamW", seconds=90)
def eager(setting: Setting) -> dict[str, Any]:
    """Nothing compiled."""
    batches = batches_of(setting)
    return beside(setting, raw(setting, batches), lumen(setting, batches, [lm.precision("bf16")]), batches)


@checks("compiled block by block", seconds=120)
def blocks(setting: Setting) -> dict[str, Any]:
    """`torch.compile` of each block, beside `lm.compile(blocks=True)`."""
    batches = batches_of(setting)
    ours = lumen(setting, batches, [setting.compile(blocks=True), lm.precision("bf16")])
    return beside(setting, raw(setting, batches, each_block(setting)), ours, batches)


@checks("torchtitan's settings: bf16 params, fused AdamW, compiled block by block", seconds=120)
def bf16_params(setting: Setting) -> dict[str, Any]:
    """Params and moments in bfloat16 in the raw loop; Lumen keeps the moments in float32."""
    batches = batches_of(setting)

    def change(net: nn.Module) -> nn.Module:
        return each_block(setting)(net.to(torch.bfloat16))

    theirs = raw(setting, batches, change, autocast=False)
    ours = lumen(setting, batches, [setting.compile(blocks=True)], torch.bfloat16)
    return beside(setting, theirs, ours, batches, tolerance=5e-2)


@checks("compiled: the model, beside the whole step", seconds=180)
def compiled(setting: Setting) -> dict[str, Any]:
    """`torch.compile(model)`, beside `lm.compile()`, which compiles the loss and the optimizer too."""
    batches = batches_of(setting)
    theirs = raw(setting, batches, torch.compile if setting.on_gpu else None)
    return beside(setting, theirs, lumen(setting, batches, [setting.compile(), lm.precision("bf16")]), batches)
