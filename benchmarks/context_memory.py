"""Peak memory of the activations of one step on long sequences: `lm.context_parallel` on two processes beside one.

The model is a GPT of 4 layers and width 128, on two rows. The figure is the peak of resident memory (see peak.py) less
params and moments, and the maximum over the processes. Torch's profiler would not see the buffers of all-to-alls freed,
by threads of Gloo. Expected: at most 0.60 of one process at 2,048 tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peak, spread, tasks
from benchmarks.apart import apart
from benchmarks.options import Options
from benchmarks.rows import Row

ROWS, LENGTHS, PROCESSES = 2, (2048, 4096), 2
LABELS = {"one process": 1, "Lumen: context_parallel": PROCESSES}


class LongGPT(tasks.GPT):
    """The GPT, which takes sequences of any length up to that of its table."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def trainer(length: int, processes: int) -> Callable[[], Callable[[Any], None]]:
    """What makes a state, and returns a function that runs one step."""
    import lumen as lm

    def step(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any, batch: Any) -> Any:
            logits, _ = state.apply(params, batch["ids"])
            total = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            return lm.Mean(total, (batch["labels"] != -100).sum())

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    inside = [lm.context_parallel(lm.mesh(context=-1, device="cpu"))] if processes > 1 else []
    fast = lm.compose(lm.donate(), *inside)(step)

    def start() -> Callable[[Any], None]:
        torch.manual_seed(0)
        state = fast.init(lm.TrainState.create(LongGPT(tokens=length), lm.optim.adamw(1e-3)))

        def move(batch: Any) -> None:
            nonlocal state
            state, _ = fast(state, batch)

        return move

    return start


def alone(length: int) -> int:
    """The peak in this process, without the state."""
    return _activations(length, 1)


def in_world(length: int) -> int:
    """The same on several processes."""
    most = torch.tensor(_activations(length, dist.get_world_size()))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _activations(length: int, processes: int) -> int:
    import lumen as lm

    ids = torch.randint(0, 128, (ROWS, length), generator=torch.Generator().manual_seed(0))
    params = sum(p.numel() * p.element_size() for p in LongGPT(tokens=length).parameters())
    batch = {"ids": ids, "labels": lm.losses.shift_labels(ids)}
    return peak.grown(trainer(length, processes), batch) - 3 * params


def measure(options: Options) -> list[Row]:
    """Each length, on one process and on several; `--quick` measures the shorter one."""
    os.environ.update(peak.ENVIRONMENT)
    rows = []
    for length in options.pick(LENGTHS, LENGTHS[:1]):
        base = None
        for label, processes in LABELS.items():
            most = apart(alone, length) if processes == 1 else apart(spread.world_of, processes, in_world, length)
            base = base or most
            rows.append(Row("context_memory", f"{length} tokens", label, "activations", "MB", most / 1e6, most / base))
    return rows
