"""Runs: random numbers on the device across a resume, profiles, exported models, ensembles."""

from __future__ import annotations

from typing import Any

import torch

import lumen as lm
from benchmarks.gpu.check import Checks, Setting, agree
from benchmarks.gpu.jobs import VOCABULARY, Dropped, deterministic, gpt, state_of, step, texts

checks = Checks()


def rows(setting: Setting, count: int) -> list[Any]:
    """Batches for `Dropped`."""
    generator = torch.Generator().manual_seed(2)
    drawn = [
        (torch.randn(8, 16, generator=generator), torch.randint(0, VOCABULARY, (8,), generator=generator))
        for _ in range(count)
    ]
    return [setting.moved(batch) for batch in drawn]


def dropped(setting: Setting) -> Any:
    """A state of an MLP with dropout, the same each time."""
    torch.manual_seed(3)
    return state_of(Dropped().to(setting.device))


def resumed(setting: Setting, *transforms: lm.Transform) -> dict[str, Any]:
    """Six steps with dropout, and three steps and three after a resume that others have drawn numbers before."""
    deterministic()
    batches = rows(setting, 6)

    def fit(steps: int, resume: str, name: str) -> Any:
        keeper = lm.Checkpointer(setting.directory / name, every=lm.Every(steps=3))
        run = lm.Runner(step, transforms=transforms, checkpoint=keeper, log_every=1, progress=False)
        return run.fit(dropped(setting), batches, until=lm.Steps(steps), resume=resume)

    expected = fit(6, "never", "whole")
    fit(3, "never", "parts")
    torch.rand(1000, device=setting.device)
    torch.manual_seed(12345)
    found = fit(6, "auto", "parts")
    agree(dict(found.export().params), dict(expected.export().params))
    whole, parts = expected.history["train/loss"][1], found.history["train/loss"][1]
    assert whole[3:] == parts[-3:], (whole, parts)
    return {}


@checks("dropout across a resume, bit for bit", seconds=90)
def dropout(setting: Setting) -> dict[str, Any]:
    """The device's generator continues."""
    return resumed(setting, lm.donate())


@checks("dropout across a resume under seeded", seconds=90)
def seeded(setting: Setting) -> dict[str, Any]:
    """Seeds of each step."""
    return resumed(setting, lm.seeded(), lm.donate())


@checks("dropout across a resume under compile", seconds=150)
def compiled(setting: Setting) -> dict[str, Any]:
    """A compiled step draws from the device's generator too."""
    return resumed(setting, setting.compile(), lm.donate())


@checks("the generator's state is restored")
def generator(setting: Setting) -> dict[str, Any]:
    """`lm.checkpoint.rng` on the device."""
    torch.rand(1, device=setting.device)
    before = lm.checkpoint.rng.capture()
    first = torch.rand(8, device=setting.device)
    lm.checkpoint.rng.restore(before)
    agree(torch.rand(8, device=setting.device), first)
    return {"devices": len(before["cuda"])}


@checks("lm.random draws the same on the device")
def keys(setting: Setting) -> dict[str, Any]:
    """Numbers of a key are those of the CPU."""
    key = lm.random.key(5)
    on_device = lm.random.uniform(key.to(setting.device), (1000,))
    agree(on_device.cpu(), lm.random.uniform(key, (1000,)))
    normal = lm.random.normal(key.to(setting.device), (1000,))
    return {"normal": agree(normal.cpu(), lm.random.normal(key, (1000,)), 1e-5)}


@checks("ensemble of four", seconds=90)
def ensemble(setting: Setting) -> dict[str, Any]:
    """Lanes train as they would alone, each from params of its own."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, VOCABULARY))
    batches, fast = rows(setting, 3), lm.compose(lm.ensemble(4), lm.donate())(step)
    state = fast.init(state_of(net.to(setting.device)))
    alone = [lm.tree.map(torch.clone, lane) for lane in fast.export(state)]
    for batch in batches:
        state, metrics = fast(state, batch)
        alone = [step(lane, batch)[0] for lane in alone]
    assert metrics["loss"].shape == (4,)
    pairs = zip(fast.export(state), alone, strict=True)
    return {"largest difference": max(agree(dict(a.params), dict(b.params), 1e-4) for a, b in pairs)}


@checks("a profile", seconds=90)
def profile(setting: Setting) -> dict[str, Any]:
    """The table of `lm.Profile` has the device's kernels."""
    directory = setting.directory / "profile"
    run = lm.Runner(step, callbacks=[lm.Profile(directory, wait=1, warmup=1)], progress=False)
    run.fit(state_of(gpt(setting)), texts(setting, 8), until=lm.Steps(8))
    table = "".join(path.read_text() for path in directory.glob("*.txt"))
    assert "aten::" in table
    if setting.on_gpu:
        assert "CUDA" in table, table[:500]
    return {"bytes": len(table)}


@checks("an exported model", seconds=120)
def exported(setting: Setting) -> dict[str, Any]:
    """The numbers of torch.export's program are those of the state."""
    state, (x, _) = state_of(gpt(setting)).eval(), texts(setting, 1)[0]
    net = gpt(setting).eval()
    net.load_state_dict(dict(state.params))
    program = torch.export.export(net, (x,))
    with torch.no_grad():
        return {"largest difference": agree(program.module()(x), state.apply(state.params, x)[0], 1e-4)}
