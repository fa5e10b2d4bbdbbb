"""Memory: recomputation, offloading, donation, an allocator that runs out, and snapshots of it."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import nn

import lumen as lm
from benchmarks.gpu.check import Checks, Setting, agree
from benchmarks.gpu.jobs import deterministic, gpt, state_of, step, texts, trained

checks = Checks()


def peak_of(setting: Setting, *transforms: lm.Transform, **sizes: int) -> tuple[float | None, Any, torch.Tensor]:
    """The peak of the allocator during two steps beyond the state, in MB (None on the CPU); the state and losses."""
    fast = lm.compose(*transforms)(step)
    state = fast.init(state_of(gpt(setting, **sizes)))
    tokens = sizes.get("tokens", 16)
    batches = texts(setting, 2, rows=setting.pick(16, 4), tokens=tokens)
    before = 0
    if setting.on_gpu:
        setting.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    state, losses = trained(lambda state, batch: fast(state, batch), state, batches)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if setting.on_gpu else None
    return peak, fast.export(state), losses


def beside_plain(setting: Setting, *transforms: lm.Transform, exact: bool = True) -> dict[str, Any]:
    """Peaks with and without `transforms`, which must change nothing."""
    deterministic()
    sizes = setting.pick({"tokens": 512, "width": 512, "layers": 8}, {})
    plain, expected_state, expected = peak_of(setting, **sizes)
    peak, state, losses = peak_of(setting, *transforms, **sizes)
    agree(losses, expected, 0.0 if exact else 1e-5)
    agree(dict(state.params), dict(expected_state.params), 0.0 if exact else 1e-4)
    if plain is None or peak is None:
        return {}
    assert peak < plain, f"a peak of {peak:.0f} MB, and {plain:.0f} MB without"
    return {"MB": peak, "MB without": plain}


@checks("remat")
def remat(setting: Setting) -> dict[str, Any]:
    """Blocks are recomputed: the same bits, and a lower peak."""
    return beside_plain(setting, lm.remat())


@checks("remat(save='matmuls')")
def remat_save(setting: Setting) -> dict[str, Any]:
    """Products are kept."""
    return beside_plain(setting, lm.remat(save="matmuls"))


@checks("remat(offload=True)")
def remat_offload(setting: Setting) -> dict[str, Any]:
    """What waits for the backward pass is copied to pinned memory beside the computation."""
    return beside_plain(setting, lm.remat(save="matmuls", offload=True))


@checks("donate")
def donate(setting: Setting) -> dict[str, Any]:
    """No second state at the peak."""
    return beside_plain(setting, lm.donate(), exact=False)


@checks("accumulate")
def accumulate(setting: Setting) -> dict[str, Any]:
    """Activations of a quarter of the rows."""
    return beside_plain(setting, lm.accumulate(4), exact=False)


WIDE = 4096


class Wide(nn.Sequential):
    """Few params and large activations: 16 kB for each row and layer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, WIDE), nn.Tanh(), nn.Linear(WIDE, 1))


def wide_step(state: Any, batch: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """A regression to zero."""

    def loss_fn(params: Any, batch: torch.Tensor) -> Any:
        return lm.Mean.of(state.apply(params, batch)[0].square())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


@checks("accumulate('auto') after running out of memory", needs_gpu=True, seconds=90)
def out_of_memory(setting: Setting) -> dict[str, Any]:
    """The allocator may use 1 GiB more than it does; 2 GiB of activations are then split until they fit."""
    torch.manual_seed(0)
    state = lm.TrainState.create(Wide().to(setting.device), lm.optim.sgd(0.1))
    batch = torch.linspace(-1, 1, 2**17, device=setting.device)[:, None]
    expected, _ = lm.accumulate(64)(wide_step)(state, batch)
    fast = lm.compose(lm.accumulate("auto"), lm.donate())(wide_step)
    current = fast.init(state)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total, setting.device)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            current, _ = fast(current, batch)
            current, _ = fast(current, batch)  # it begins with that number
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    microbatches = int(current.slots["accumulate"].microbatches)
    assert microbatches > 1, "it did not run out of memory"
    assert any("out of memory" in str(w.message) for w in said)
    expected, _ = lm.accumulate(64)(wide_step)(expected, batch)
    agree(dict(fast.export(current).params), dict(expected.params), 1e-4)
    return {"microbatches": microbatches}


@checks("MemorySnapshot", seconds=90)
def snapshot(setting: Setting) -> dict[str, Any]:
    """The report of a step, and the allocator's history where there is one."""
    directory = setting.directory / "memory"
    callbacks = [lm.MemorySnapshot(directory, steps=[2], signal=None)]
    run = lm.Runner(step, transforms=[lm.donate()], callbacks=callbacks, log_every=1, progress=False)
    run.fit(state_of(gpt(setting)), texts(setting, 3), until=lm.Steps(3))
    report = json.loads((directory / "step-2-rank-0.json").read_text())
    assert report["step"] == 2
    if setting.on_gpu:
        assert report["cuda"]["allocated_bytes.all.current"] > 0
        history = (directory / "step-2-rank-0.pickle").stat().st_size
        assert history > 1000, f"the snapshot has {history} bytes"
    return {"files": len(list(directory.iterdir()))}


@checks("MemorySnapshot when memory runs out", needs_gpu=True, seconds=90)
def snapshot_of_failure(setting: Setting) -> dict[str, Any]:
    """A step that asks for a petabyte: the error is raised with a note of the files."""
    directory = setting.directory / "memory"

    def huge_step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        torch.empty(2**50, dtype=torch.uint8, device=setting.device)
        return step(state, batch)

    run = lm.Runner(huge_step, callbacks=[lm.MemorySnapshot(directory, signal=None)], progress=False)
    notes: list[str] = []
    try:
        run.fit(state_of(gpt(setting)), texts(setting, 1), until=lm.Steps(1))
    except torch.OutOfMemoryError as error:
        notes = error.__notes__
    if not any(str(directory) in note for note in notes):
        raise AssertionError(f"no error, or one without a note of the files: {notes}")
    return {"files": len(list(directory.iterdir()))}


@checks("lm.plan, beside the allocator", seconds=90)
def planned(setting: Setting) -> dict[str, Any]:
    """The peak that a plan predicts, beside the allocator's."""
    sizes = setting.pick({"tokens": 512, "width": 512, "layers": 8}, {})
    fast = lm.donate()(step)
    state, batch = state_of(gpt(setting, **sizes)), texts(setting, 1, rows=16, tokens=sizes.get("tokens", 16))[0]
    on_host = lm.tree.map(torch.Tensor.cpu, (state, batch))
    plan = lm.plan(fast, *on_host, world_size=1, device="h200")
    current = fast.init(state)
    del state
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        current, _ = fast(current, batch)
    setting.synchronize()
    figures = {"planned MB": plan.peak.nbytes / 1e6}
    return figures | ({"measured MB": torch.cuda.max_memory_allocated() / 1e6} if setting.on_gpu else {})
