"""No transform mixes devices: all tensors of a step stay on the accelerator where its state and its batch are.

The accelerator is that of `lm.plan`. Its tensors have no values, and torch refuses an operation on tensors of two
devices, as it does on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lumen as lm
from lumen.planner.dry_run import _FakeMode
from lumen.planner.fake_world import fake_world, move_to_fake_device
from lumen.train import metric_buffer, rank_state

from .models import Job
from .table import STEPS

# Those that read a number of the state on the host are missing: these tensors have none.
TRANSFORMS = {
    "unroll": lambda: lm.unroll(STEPS),
    "ensemble": lambda: lm.ensemble(2),
    "accumulate": lambda: lm.accumulate(3),
    "dp_sgd": lambda: lm.dp_sgd(clip=1.0, noise=1.0),
    "sam": lambda: lm.sam(0.05),
    "precision(bf16)": lambda: lm.precision("bf16"),
    "precision(fp16)": lambda: lm.precision("fp16"),
    "remat": lambda: lm.remat(lambda name, module: not list(module.children()), save="matmuls"),
    "guard": lambda: lm.guard(spike=3.0),
    "clip": lambda: lm.clip(0.1),
    "ema": lambda: lm.ema(0.9),
    "donate": lm.donate,
}


@pytest.fixture
def accelerator() -> Iterator[torch.device]:
    with fake_world(1):
        device, _ = move_to_fake_device(lm.compose()(lambda state, batch: (state, batch)))
        with _FakeMode(), torch.autograd.set_multithreading_enabled(False):
            yield device


def moved(values: Any, device: torch.device) -> Any:
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty(leaf.shape, dtype=torch.float32 if leaf.is_floating_point() else leaf.dtype, device=device)

    return lm.tree.map(move, values)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_step_stays_on_its_device(name: str, accelerator: torch.device) -> None:
    job = Job(model="attention", loss="mean" if name == "dp_sgd" else "masked")
    step = lm.compose(TRANSFORMS[name]())(job.step)
    batches = [moved(batch, accelerator) for batch in job.batches(STEPS)]
    state = step.init(moved(job.state(), accelerator))
    for batch in [lm.stack(batches)] if name == "unroll" else batches:
        state, metrics = step(state, batch)
    values = lm.tree.tensors((step.export(state), lm.compute_metrics(metrics)))
    assert {value.device for value in values} == {accelerator}


def test_logged_numbers_of_two_devices_are_transferred_apart(accelerator: torch.device) -> None:
    scalars = [torch.empty((), device=device) for device in (accelerator, "cpu", accelerator)]
    assert [indices for _, indices in metric_buffer._transfers(scalars)] == [[0, 2], [1]]


def test_what_a_rank_sends_for_a_checkpoint_is_on_the_host(accelerator: torch.device) -> None:
    own = {"metrics": {"loss": torch.empty(3, device=accelerator)}, "feed": {"epoch": 1, "position": None}}
    sent = rank_state._on_host(own)
    assert sent["metrics"]["loss"].device.type == "cpu"
    assert sent["feed"] == own["feed"]
