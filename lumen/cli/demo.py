"""`lumen demo`: a complete training job on real images, with logs and checkpoints."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumen import optim
from lumen.cli import command, locations, tables
from lumen.core import distributed
from lumen.core.gradient import value_and_grad
from lumen.core.metrics import Mean
from lumen.core.primitives import Aux
from lumen.core.state import TrainState
from lumen.core.versions import install_extra
from lumen.data import Loader
from lumen.errors import HyperparameterError, LumenError
from lumen.parallel.ddp.ddp import ddp
from lumen.sinks import JSONL, TensorBoard
from lumen.train.checkpointer import Checkpointer
from lumen.train.clock import Epochs, Every
from lumen.train.result import Result
from lumen.train.runner import Runner
from lumen.train.validate import Validate
from lumen.transforms._donate import donate
from lumen.transforms._seeded import seeded

Batch = dict[str, Tensor]
_LR = 3e-3
_EXAMPLES = """\
  lumen demo                                     a few seconds on a laptop
  lumen demo --epochs 40 --rundir runs/longer
  torchrun --nproc-per-node=2 --no-python lumen demo --rundir runs/two
                                                 on two processes, each with half of every batch
  lumen inspect runs/demo                        afterwards: its checkpoints"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = command.add(
        commands,
        "demo",
        help="train a small network on real images, in a few seconds",
        description="Train a small convolutional net on the 1,797 handwritten digits that scikit-learn ships, with"
        "\nprogress, validation, TensorBoard logs, a JSONL file and checkpoints. Expected: a validation accuracy of"
        "\n0.97 or more. Started again in the same directory, it resumes from the last checkpoint.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--epochs", type=int, default=12, metavar="N", help="passes over the data (default: 12)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the params, the data order and dropout"
    )
    parser.add_argument(
        "--rundir", type=locations.local, default=Path("runs/demo"), help="directory of the run (default: runs/demo)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    if options.epochs < 1:
        raise HyperparameterError(f"--epochs must be at least 1, got {options.epochs}: --epochs 12.")
    result, best = train(options.epochs, options.seed, options.rundir)
    if distributed.rank() == 0:
        print(f"\n{result.clock.step} steps, {result.clock.seconds:.1f} s of training")
        tables.print_fields({name: f"{result.metrics[name]:.4f}" for name in ("val/loss", "val/accuracy")})
        print(tables.escape(f"best checkpoint: {best}"))
        print(tables.escape(f"inspect it:      lumen inspect {best}"))
        print(tables.escape(f"curves:          lumen plot {options.rundir}"))
    return 0


def train(epochs: int, seed: int, rundir: Path) -> tuple[Result, Path | str | None]:
    """Train as a user's script would; returns the result and the best checkpoint."""
    torch.manual_seed(seed)
    train_set, val_set = load_images(seed)
    loader = Loader(train_set, batch_size=64, seed=seed)
    schedule = optim.warmup_cosine(_LR, warmup=len(loader), steps=epochs * len(loader))
    tx = optim.chain(
        optim.clip_by_global_norm(1.0), optim.adamw(schedule, weight_decay=0.05, decay_mask=optim.matrices)
    )
    checkpoint = Checkpointer(rundir, every=Every(epochs=4), monitor="val/accuracy", mode="max")
    runner = Runner(
        step,
        transforms=[donate(), seeded(), ddp()],
        checkpoint=checkpoint,
        sinks=[TensorBoard(rundir), JSONL(rundir / "metrics.jsonl")],
        config={"epochs": epochs, "seed": seed, "lr": _LR},
    )
    result = runner.fit(
        TrainState.create(net(), tx, seed=seed),
        loader,
        until=Epochs(epochs),
        validate=Validate(eval_step, Loader(val_set, batch_size=256, shuffle=False)),
        resume="auto",
    )
    return result, checkpoint.best()


def load_images(seed: int) -> tuple[Batch, Batch]:
    """Training and validation sets, split 80/20: images [N, 1, 8, 8] from −0.5 to 0.5, labels [N].

    Raises `LumenError` if scikit-learn, which ships the images, is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise LumenError(f"the images ship with scikit-learn, which is not installed: {install_extra('examples')}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0 - 0.5
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train_size = len(labels) * 4 // 5
    splits = (order[:train_size], order[train_size:])
    train_set, val_set = ({"image": pixels[rows], "label": labels[rows]} for rows in splits)
    return train_set, val_set


def net() -> nn.Module:
    """Logits [B, 10] for images [B, 1, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(48 * 4, 10),
    )


def step(state: Any, batch: Batch) -> tuple[Any, dict[str, Mean]]:
    """One training step: cross-entropy, its gradient, an update."""

    def loss_fn(params: Any, batch: Batch) -> tuple[Mean, Aux]:
        logits, _ = state.apply(params, batch["image"])
        loss = Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))
        return loss, Aux(metrics={"accuracy": Mean.of(logits.argmax(-1) == batch["label"])})

    (loss, aux), grads = value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss, **aux.metrics}


def eval_step(state: Any, batch: Batch) -> dict[str, Mean]:
    """Loss and accuracy on held-out images."""
    logits, _ = state.apply(state.params, batch["image"])
    loss = Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))
    return {"loss": loss, "accuracy": Mean.of(logits.argmax(-1) == batch["label"])}
