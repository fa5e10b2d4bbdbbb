"""Copies between host and device: batches beside a step, and checkpoints beside training."""

from __future__ import annotations

import time
from typing import Any

import torch

import lumen as lm
from benchmarks.gpu.check import Checks, Setting, agree
from benchmarks.gpu.jobs import gpt, state_of, step, texts, trained
from lumen.data.to_device import Move

checks = Checks()


@checks("copies arrive before they are used")
def arrive(setting: Setting) -> dict[str, Any]:
    """Sums of batches that are copied while the device is busy."""
    move, total, size = Move(setting.device), torch.zeros((), device=setting.device), setting.pick(1 << 20, 1 << 10)
    rounds = setting.pick(100, 5)
    for number in range(rounds):
        if setting.on_gpu:
            torch.cuda._sleep(200_000)  # the copies run ahead of the device
        total = total + move(torch.full((size,), float(number))).double().sum()
    assert float(total) == size * sum(range(rounds)), float(total)
    return {}


@checks("copies overlap with a step", seconds=90)
def overlap(setting: Setting) -> dict[str, Any]:
    """Seconds of steps on resident batches, of the copies alone, and of both; 1 is a copy that costs nothing."""
    rows, width = setting.pick((1 << 14, 4096), (8, 16))
    count = setting.pick(20, 2)
    net = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(4)]).to(setting.device)
    batches = [torch.ones(rows, width) for _ in range(2)]
    if setting.on_gpu:
        batches = [batch.pin_memory() for batch in batches]
    resident, move = batches[0].to(setting.device), Move(setting.device)

    def train(x: torch.Tensor) -> None:
        net(x).square().mean().backward()

    def seconds(copies: bool, computes: bool) -> float:
        setting.synchronize()
        began = time.perf_counter()
        for i in range(count):
            x = move(batches[i % 2]) if copies else resident
            if computes:
                train(x)
        setting.synchronize()
        return time.perf_counter() - began

    seconds(copies=True, computes=True)
    compute, copy = seconds(copies=False, computes=True), seconds(copies=True, computes=False)
    both = seconds(copies=True, computes=True)
    gigabytes = count * rows * width * 4 / 1e9
    return {
        "step ms": 1e3 * compute / count,
        "copy ms": 1e3 * copy / count,
        "both ms": 1e3 * both / count,
        "GB/s": gigabytes / copy,
        "overlap": (compute + copy - both) / min(compute, copy),
    }


@checks("a Loader that moves its batches")
def loader(setting: Setting) -> dict[str, Any]:
    """The rows of a Loader on the device are those of one on the host, with workers too."""
    rows = torch.arange(64 * 4, dtype=torch.float32).view(64, 4)
    expected = list(lm.Loader((rows,), 8, seed=1))
    for workers in setting.pick((0, 2), (0,)):
        found = list(lm.Loader((rows,), 8, seed=1, device=setting.device, workers=workers))
        assert all(batch[0].device == setting.device for batch in found), found[0][0].device
        agree(setting.moved(found), setting.moved(expected))
    return {}


@checks("a Runner that feeds the device, and logs")
def runner(setting: Setting) -> dict[str, Any]:
    """Batches from the host; metrics that are tensors on the device, and numbers of Python."""

    def logged_step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = step(state, batch)
        return state, {**metrics, "rate": 0.5, "rows": lm.Sum.of(torch.ones(len(batch[0]), device=setting.device))}

    batches = [lm.tree.map(torch.Tensor.cpu, batch) for batch in texts(setting, 6)]
    run = lm.Runner(logged_step, transforms=[lm.donate()], log_every=2, progress=False)
    result = run.fit(state_of(gpt(setting)), batches, until=lm.Steps(6))
    expected, losses = trained(step, state_of(gpt(setting)), texts(setting, 6))
    assert result.history["train/rate"][1] == [0.5] * 3
    assert result.history["train/rows"][1] == [16.0] * 3
    logged = torch.tensor(result.history["train/loss"][1])
    agree(logged, losses.cpu().view(3, 2).mean(1), 1e-5)
    return {"largest difference of a param": agree(dict(result.export().params), dict(expected.params), 1e-4)}


@checks("checkpoints to and from the device", seconds=90)
def checkpoints(setting: Setting) -> dict[str, Any]:
    """What is loaded has the saved bits and is on the device, also after the state has changed in place."""
    width = setting.pick(768, 32)
    fast = lm.donate()(step)
    state = fast.init(state_of(gpt(setting, width=width)))
    batches = texts(setting, 4)
    state, _ = fast(state, batches[0])
    saved = lm.tree.map(lambda x: x.clone(), state)
    setting.synchronize()
    began = time.perf_counter()
    lm.checkpoint.save(setting.directory / "one", state, step=fast)
    seconds = time.perf_counter() - began
    for batch in batches[1:]:
        state, _ = fast(state, batch)
    restored = lm.checkpoint.restore(setting.directory / "one", saved)
    agree(restored, saved)
    assert {t.device for t in lm.tree.tensors(restored)} == {setting.device}
    nbytes = sum(t.nbytes for t in lm.tree.tensors(saved))
    return {"MB": nbytes / 1e6, "seconds": seconds}


@checks("checkpoints in the background of a run", seconds=120)
def background(setting: Setting) -> dict[str, Any]:
    """A Checkpointer copies the state to pinned memory between two steps that write into it."""
    batches = texts(setting, 6)

    def fit(steps: int, resume: str) -> Any:
        keeper = lm.Checkpointer(setting.directory / "run", every=lm.Every(steps=setting.pick(1, 3)), keep=None)
        run = lm.Runner(step, transforms=[lm.donate()], checkpoint=keeper, log_every=1, progress=False)
        return run.fit(state_of(gpt(setting)), batches, until=lm.Steps(steps), resume=resume)

    fit(3, "never")
    found = fit(6, "auto")
    plain = lm.Runner(step, transforms=[lm.donate()], log_every=1, progress=False)
    expected = plain.fit(state_of(gpt(setting)), batches, until=lm.Steps(6))
    agree(dict(found.export().params), dict(expected.export().params), 1e-6)
    return {}
