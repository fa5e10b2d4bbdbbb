"""Train on scikit-learn's handwritten digits under a DeepSpeed engine, with ZeRO set up by DeepSpeed's configuration.

    python examples/zero.py                                            # alone, about 20 seconds on 2 cores
    torchrun --nproc-per-node=2 examples/zero.py --stage 3
    torchrun --nproc-per-node=2 examples/zero.py --stage 1 --bf16 --accumulate 2

Lumen's transforms become DeepSpeed's keys (see the printed configuration), and the optimizer remains the state's own.
The checkpoints are plain ones: a run under stage 3 on two processes can resume in one process, under stage 1 or
without DeepSpeed. Needs `pip install ".[deepspeed,examples]"`.

Expected: a validation accuracy of 0.97 or more, the same for every stage and number of processes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lumen as lm


@dataclass(frozen=True)
class Config:
    """Options of the command line."""

    stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards over the processes: nothing, optimizer state, also gradients, also params."""
    accumulate: int = 1
    """Microbatches for an update."""
    bf16: bool = False
    """Compute in bfloat16 (from stage 1)."""
    steps: int = 400
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 0
    rundir: Path = Path("runs/zero")
    progress: bool = True


def load(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training and a validation set, 80 to 20."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16.0 - 0.5
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = len(labels) * 4 // 5
    return tuple({"image": images[part], "label": labels[part]} for part in (order[:cut], order[cut:]))


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """One training step, independent of DeepSpeed."""

    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["image"])
        return lm.Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """Accuracy on held-out images."""
    logits, _ = state.apply(state.params, batch["image"])
    return {"accuracy": lm.Mean.of(logits.argmax(-1) == batch["label"])}


def main(config: Config) -> None:
    """Train, and print the validation accuracy."""
    torch.manual_seed(config.seed)
    train_set, val_set = load(config.seed)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
    schedule = lm.optim.warmup_cosine(config.lr, warmup=40, steps=config.steps)
    strategy = lm.deepspeed({"zero_optimization": {"stage": config.stage}})
    transforms: list[lm.Transform] = [strategy, lm.accumulate(config.accumulate), lm.clip(1.0)]
    if config.bf16:
        transforms.append(lm.precision("bf16"))
    runner = lm.Runner(
        step,
        transforms=transforms,
        checkpoint=lm.Checkpointer(config.rundir, every=lm.Every(steps=100)),
        sinks=[lm.sinks.JSONL(config.rundir / "metrics.jsonl")],
        progress=config.progress,
    )
    result = runner.fit(
        lm.TrainState.create(net, lm.optim.adamw(schedule, weight_decay=0.05, decay_mask=lm.optim.matrices)),
        lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed),
        until=lm.Steps(config.steps),
        validate=lm.Validate(eval_step, lm.Loader(val_set, batch_size=256, shuffle=False)),
        resume="auto",
    )
    if lm.rank() == 0:
        print(json.dumps(strategy.engine.config, indent=1))
        print(f"val/accuracy {result.metrics['val/accuracy']:.4f} after {result.clock.step} steps")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
