"""Train a small convolutional net on scikit-learn's handwritten digits (1,797 images of 8x8 pixels).

    python examples/digits.py                 # about 20 seconds on 2 cores
    python examples/digits.py --epochs 40 --transforms compile ema --logdir runs/digits_ema
    torchrun --nproc-per-node=2 examples/digits.py --logdir runs/digits_ddp

Under torchrun the rows of each batch are sharded over the processes; BatchNorm sees the rows of all.

Expected: a validation accuracy of 0.98 or more. TensorBoard logs, a JSONL file, and the newest and the best checkpoint
are written to --logdir. Started again with the same --logdir, the run resumes; with another one it starts from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lumen as lm

TransformName = Literal["accumulate", "compile", "ema", "bf16", "guard", "donate"]


@dataclass
class Config:
    """Settings of the run."""

    epochs: int = 30
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 0
    transforms: tuple[TransformName, ...] = ("donate",)
    logdir: Path = Path("runs/digits")
    progress: Literal["auto", "bar", "lines"] = "auto"


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm, dropout, and a linear head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * 4, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] for images [B, 1, 8, 8]."""
        return self.head(self.features(images))


def load(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training and a validation set, 80 to 20."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0 - 0.5
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = len(labels) * 4 // 5
    return tuple({"image": images[part], "label": labels[part]} for part in (order[:cut], order[cut:]))  # type: ignore[return-value]


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """One training step."""

    def loss_fn(params, batch):
        logits, buffers = state.apply(params, batch["image"])
        loss = lm.Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))
        accuracy = lm.Mean.of(logits.argmax(-1) == batch["label"])
        return loss, lm.Aux(buffers=buffers, metrics={"accuracy": accuracy})

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, **aux.metrics}


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """Loss and accuracy on held-out images."""
    logits, _ = state.apply(state.params, batch["image"])
    loss = lm.Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))
    return {"loss": loss, "accuracy": lm.Mean.of(logits.argmax(-1) == batch["label"])}


def make_transforms(names: tuple[str, ...]) -> list[lm.Transform]:
    """The named transforms in their canonical order."""
    known = {
        "compile": lm.compile(),
        # With one process it is the identity; torchrun starts several.
        "ddp": lm.ddp(buffers="merge" if {"compile", "accumulate"} & {*names} else "sync"),
        "guard": lm.guard(),
        "ema": lm.ema(0.99),
        "donate": lm.donate(),
        "accumulate": lm.accumulate(2),
        "bf16": lm.precision("bf16"),
    }
    # Dropout draws from torch's generators: seeded() makes the run a function of its seed.
    order = ["compile", "guard", "ema", "donate", "seeded", "ddp", "accumulate", "bf16"]
    known["seeded"] = lm.seeded()
    return [known[name] for name in order if name in (*names, "seeded", "ddp")]


def main(config: Config) -> lm.Result:
    """Train, validate after each epoch, and print the results."""
    torch.manual_seed(config.seed)
    train_set, val_set = load(config.seed)
    loader = lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed)
    steps = config.epochs * len(loader)
    schedule = lm.optim.warmup_cosine(config.lr, warmup=steps // 20 + 1, steps=steps)
    tx = lm.optim.chain(
        lm.optim.clip_by_global_norm(1.0),
        lm.optim.adamw(schedule, weight_decay=0.05, decay_mask=lm.optim.matrices),
    )
    state = lm.TrainState.create(ConvNet(), tx, seed=config.seed)
    runner = lm.Runner(
        step,
        transforms=make_transforms(config.transforms),
        checkpoint=lm.Checkpointer(config.logdir, every=lm.Every(epochs=1), monitor="val/accuracy", mode="max"),
        sinks=[lm.sinks.TensorBoard(config.logdir), lm.sinks.JSONL(config.logdir / "metrics.jsonl")],
        config=config,
        progress=config.progress,
    )
    validate = lm.Validate(
        eval_step,
        lm.Loader(val_set, batch_size=256, shuffle=False),
        use="ema" if "ema" in config.transforms else "params",
    )
    result = runner.fit(state, loader, until=lm.Epochs(config.epochs), validate=validate, resume="auto")
    if lm.rank() == 0:
        report(result, config, runner.checkpoint.best())
    return result


def report(result: lm.Result, config: Config, best: Path) -> None:
    """Print a table of the final numbers, and where the files are."""
    table = Table(title=f"digits after {result.clock.step} steps in {result.clock.seconds:.1f} s")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):
        table.add_row(name, f"{result.metrics[name]:.4f}")
    Console().print(table)
    print(f"curves: lumen plot {config.logdir}, or tensorboard --logdir {config.logdir} where TensorBoard is installed")
    print(f"best checkpoint, accuracy {lm.checkpoint.metadata(best)['metrics']['val/accuracy']:.4f}: {best}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
