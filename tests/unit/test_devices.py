"""Devices that are not here: what must hold on them is shown by stand-ins.

The meta device plays one without float64 (MPS); a module of torch's shape plays an accelerator.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lumen as lm
from lumen.checkpoint import rng
from lumen.core import device
from lumen.optim import _numerics
from lumen.train import metric_buffer

WIDE = {torch.float64, torch.complex128}


class Watch(TorchDispatchMode):
    """Notes each operation that makes a wide tensor on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in lm.tree.leaves(out):
            if isinstance(each, Tensor) and each.is_meta:
                self.made += 1
                if each.dtype in WIDE:
                    self.found.append(str(func))
        return out


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, Any]]:
    def loss_fn(params: Any, batch: dict[str, Tensor]) -> Any:
        out, buffers = state.apply(params, batch["x"])
        right = lm.Mean.of(out.argmax(-1) == batch["y"])
        losses = F.cross_entropy(out, batch["y"], reduction="none")
        return lm.Mean.of(losses), lm.Aux(buffers=buffers, metrics={"right": right, "rows": lm.Sum.of(batch["y"] + 1)})

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    noise = lm.Last(lm.random.normal(state.key, (2,)))
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, "noise": noise, **aux.metrics}


def schedule() -> Any:
    return lm.optim.warmup_cosine(1e-3, warmup=5, steps=50)


OPTIMIZERS = {
    "sgd": lambda: lm.optim.sgd(1e-3, momentum=0.9),
    "adamw": lambda: lm.optim.adamw(schedule()),
    "nadam": lambda: lm.optim.nadam(1e-3),
    "radam": lambda: lm.optim.radam(1e-3),
    "lion": lambda: lm.optim.lion(1e-3),
    "lamb": lambda: lm.optim.lamb(1e-3),
    "adafactor": lambda: lm.optim.adafactor(1e-3),
    "rmsprop": lambda: lm.optim.rmsprop(1e-3),
    "adagrad": lambda: lm.optim.adagrad(1e-3),
    "lookahead": lambda: lm.optim.lookahead(lm.optim.adam(1e-3)),
    "clipped": lambda: lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.adam(1e-3)),
}
STACKS = {
    "none": lm.compose(),
    "many": lm.compose(
        lm.guard(), lm.clip(1.0), lm.ema(0.9), lm.accumulate(2), lm.precision("bf16", cast="model"), lm.remat()
    ),
    "fp16": lm.precision("fp16", cast="model"),  # torch has no autocast for what stands in for a device
}


@pytest.mark.parametrize(
    ("optimizer", "stack"), [*((name, "none") for name in OPTIMIZERS), ("adamw", "many"), ("adamw", "fp16")]
)
def test_a_step_makes_nothing_wide_where_there_is_no_float64(
    optimizer: str, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_numerics, "NO_FLOAT64", {"meta"})
    with Watch() as watch:
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3)).to("meta")
        state = lm.TrainState.create(net, OPTIMIZERS[optimizer]())
        # Of a model on the meta device a state keeps its counters elsewhere, as no other device does.
        state = state.replace(step=state.step.to("meta"), seed=state.seed.to("meta"))
        made = STACKS[stack](step)
        state = made.init(state)
        batch = {"x": torch.ones(6, 4, device="meta"), "y": torch.zeros(6, dtype=torch.int64, device="meta")}
        rows = []
        for _ in range(2):
            state, metrics = made(state, batch)
            rows.append(metrics)
        lm.compute_metrics(lm.merge_metrics(rows))
    assert {leaf.device.type for leaf in lm.tree.tensors(state)} == {"meta"}
    assert watch.made > 50
    assert not watch.found


def test_logged_numbers_lose_nothing_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    scalars = [torch.tensor(x) for x in (2**31 + 1, 0.5, True, -3, float("inf"))]
    scalars.append(torch.tensor(0.1, dtype=torch.bfloat16))
    wide = metric_buffer._numbers(scalars)
    monkeypatch.setattr(_numerics, "NO_FLOAT64", {"cpu"})
    with Recorded() as recorded:
        assert metric_buffer._numbers(scalars) == wide
    assert not recorded.dtypes & WIDE


class Recorded(TorchDispatchMode):
    """The dtypes of all that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.dtypes |= {each.dtype for each in lm.tree.leaves(out) if isinstance(each, Tensor)}
        return out


class Accelerator(SimpleNamespace):
    """torch.xpu, say, with generators whose state is a number."""

    def __init__(self, count: int = 2, *, started: bool = True) -> None:
        super().__init__(states=[torch.tensor([i], dtype=torch.uint8) for i in range(count)], freed=0, started=started)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.started

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self, device: Any) -> Tensor:
        assert self.started, "asking has started the device"
        return self.states[torch.device(device).index or 0].clone()

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        self.states[torch.device(device).index or 0] = state.clone()

    def empty_cache(self) -> None:
        self.freed += 1


@pytest.fixture
def xpu(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    found = Accelerator()
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: found)
    monkeypatch.setattr(torch, "xpu", found)  # where torch 2.11 looks
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    return found


def test_generators_of_any_accelerator_are_put_back(xpu: Accelerator) -> None:
    with device.forked_rng(torch.device("xpu", 1)):
        xpu.set_rng_state(torch.tensor([9], dtype=torch.uint8), torch.device("xpu", 1))
    assert [int(state) for state in xpu.states] == [0, 1]


def test_generators_of_any_accelerator_are_in_a_checkpoint(xpu: Accelerator) -> None:
    held = rng.capture()
    xpu.states = [torch.tensor([7], dtype=torch.uint8)] * 2
    rng.restore(held)
    assert [int(state) for state in xpu.states] == [0, 1]
    xpu.states.pop()
    with pytest.warns(lm.InexactWarning, match="XPU devices 1 were not restored: this machine has 1"):
        rng.restore(held)
    del held["other"]  # as before there were any
    rng.restore(held)


def test_nothing_is_started_by_asking(xpu: Accelerator) -> None:
    xpu.started = False
    assert device.running() is None
    assert "other" not in rng.capture()
    device.free_cache()
    assert xpu.freed == 0
    xpu.started = True
    device.free_cache()
    assert xpu.freed == 1


def test_the_cpu_is_no_accelerator() -> None:
    assert device.module_of(torch.device("cpu")) is None
    assert device.module_of(torch.device("meta")) is None
