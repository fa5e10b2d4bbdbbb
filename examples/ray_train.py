"""Train under Ray Train, which starts the processes, and starts them again when one is lost.

    python examples/ray_train.py                 # two workers on this machine
    python examples/ray_train.py --lose-one-at 60

Ray's `TorchTrainer` starts a process for each worker, joins them in a process group and calls `train_loop` in each.
There `lm.ddp()` uses Ray's process group, so the script has no other trace of Ray. When a worker is lost, Ray ends the
others and starts all again, and `resume="auto"` continues from Lumen's newest checkpoint. On several machines --rundir
is a folder that all of them share.

`--lose-one-at 60` kills the second worker once, at that step, to show it.

Expected: a validation accuracy of 0.93 or more, with the same numbers whether a worker was lost or not. --rundir
contains checkpoints and a JSONL file. Needs `pip install ".[examples,ray]"`.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
import torch
import torch.nn.functional as F
import tyro
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lumen as lm


@dataclass
class Config:
    """Settings of the run."""

    epochs: int = 10
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0
    workers: int = 2
    gpus: bool = False
    """Give each worker a GPU, and use NCCL."""
    rundir: Path = Path("runs/ray")
    lose_one_at: int | None = None
    """The step at which the second worker is killed, once."""


def load(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training and a validation set, 80 to 20."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = len(labels) * 4 // 5
    return tuple({"image": images[part], "label": labels[part]} for part in (order[:cut], order[cut:]))


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """One training step."""

    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["image"])
        return lm.Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """Accuracy on held-out images."""
    logits, _ = state.apply(state.params, batch["image"])
    return {"accuracy": lm.Mean.of(logits.argmax(-1) == batch["label"])}


class LoseWorker(lm.Callback):
    """Kills the second worker at a step, unless it has done so in an earlier attempt."""

    def __init__(self, step: int, rundir: Path) -> None:
        self.step, self.marker = step, rundir / "lost"

    def on_step(self, view: lm.CallbackContext) -> None:
        """After each step."""
        if lm.rank() == 1 and view.clock.step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train_loop(settings: dict) -> None:
    """What each worker does."""
    config = Config(**settings)
    torch.manual_seed(config.seed)
    train_set, val_set = load(config.seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    runner = lm.Runner(
        step,
        transforms=[lm.ddp(), lm.donate()],
        checkpoint=lm.Checkpointer(config.rundir, every=lm.Every(steps=20)),
        sinks=[lm.sinks.JSONL(config.rundir / "metrics.jsonl")],
        callbacks=[] if config.lose_one_at is None else [LoseWorker(config.lose_one_at, config.rundir)],
        progress="lines",
    )
    runner.fit(
        lm.TrainState.create(net, lm.optim.adamw(config.lr), seed=config.seed),
        lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed),
        until=lm.Epochs(config.epochs),
        validate=lm.Validate(eval_step, lm.Loader(val_set, batch_size=256, shuffle=False)),
        resume="auto",
    )


def main(config: Config) -> None:
    """Start the workers, and print the result."""
    config.rundir = config.rundir.absolute()  # workers have directories of their own
    ray.init(include_dashboard=False)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=asdict(config),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=config.gpus),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config.gpus else "gloo"),
        run_config=RunConfig(
            name="ray", storage_path=str(config.rundir / "ray"), failure_config=FailureConfig(max_failures=3)
        ),
    )
    trainer.fit()
    rows = [json.loads(line) for line in (config.rundir / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["val/accuracy"] for row in rows if "val/accuracy" in row][-1]
    print(f"val/accuracy {accuracy:.4f} after {rows[-1]['step']} steps on {config.workers} workers")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
