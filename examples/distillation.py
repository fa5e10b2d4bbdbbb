"""Learn digits from 20 labels: a student follows its own averaged teacher on 1,400 images without labels.

    python examples/distillation.py           # about 30 seconds on 2 cores
    python examples/distillation.py --labels 50 --logdir runs/distillation_50
    torchrun --nproc-per-node=2 examples/distillation.py --logdir runs/distillation_ddp

The teacher's params are the moving average of the student's that `lm.ema` keeps (Tarvainen and Valpola, 2017), and the
step reads them from the state. The teacher sees an image slightly rotated and shifted. If it is confident, its answer
is the student's target for the same image after stronger rotation and noise (Sohn et al., 2020). For comparison the
same net is first trained on the labels alone.

Expected: 84% of held-out digits are recognized, against 75% by the net trained on the labels alone. With so few labels
the result depends on which they are: --seed 1 gains only one point, 77% against 76%.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lumen as lm

WEAK, STRONG = 0.1, 0.3
CONFIDENT = 0.8


@dataclass
class Config:
    """Settings of the run."""

    epochs: int = 20
    batch_size: int = 128
    labels: int = 20
    """Images with a label, the same number of each digit."""
    consistency: float = 1.0
    """Weight of the teacher's loss, relative to that of the labels."""
    decay: float = 0.98
    lr: float = 2e-3
    seed: int = 0
    logdir: Path = Path("runs/distillation")
    progress: Literal["auto", "bar", "lines"] = "auto"


class ConvNet(nn.Module):
    """Two convolutions and a linear head; GroupNorm, so that rows with and without a label do not mix."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] for images [B, 1, 8, 8]."""
        return self.layers(images)


def load(labels: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training and a validation set, 80 to 20. Each training image is paired with a labeled one."""
    digits = load_digits()
    images, target = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0, torch.tensor(digits.target)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    known = torch.cat([train[target[train] == digit][: labels // 10] for digit in range(10)])
    paired = known[torch.arange(len(train)) % len(known)]
    train_set = {"image": images[train], "known_image": images[paired], "known_label": target[paired], "row": train}
    return train_set, {"image": images[val], "label": target[val]}


def augment(images: Tensor, keys: Tensor, strength: float) -> Tensor:
    """Images [B, 1, 8, 8] rotated, sheared, scaled, shifted and with noise, by keys [B, 2], at most by `strength`."""
    draws = torch.vmap(lambda key: lm.random.uniform(key, (6,), low=-strength, high=strength))(keys)
    angle, shear, right, down, wide, high = draws.unbind(1)
    top = torch.stack([(1 + wide / 2) * angle.cos(), shear - angle.sin(), right], -1)
    bottom = torch.stack([angle.sin(), (1 + high / 2) * angle.cos(), down], -1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    noise = torch.vmap(lambda key: lm.random.normal(lm.random.fold_in(key, 1), (1, 8, 8)))(keys)
    return F.grid_sample(images, grid, align_corners=False) + 0.3 * strength * noise


def make_step(consistency: float):
    """A step that learns from the known labels, and from the teacher on all images."""

    def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
        weight = consistency * (state.step / 100).clamp(max=1.0)  # the teacher must learn something first

        def loss_fn(params, batch):
            keys = torch.vmap(lambda row: lm.random.split(lm.random.fold_in(state.key, row), 3))(batch["row"])
            known, _ = state.apply(params, augment(batch["known_image"], keys[:, 0], WEAK))
            loss = lm.Mean.of(F.cross_entropy(known, batch["known_label"], reduction="none"))
            if not consistency:
                return loss, lm.Aux()
            student, _ = state.apply(params, augment(batch["image"], keys[:, 1], STRONG))
            teacher, _ = state.apply(lm.ema.params(state), augment(batch["image"], keys[:, 2], WEAK))
            sure, guess = teacher.softmax(-1).max(-1)
            apart = lm.Mean.of(F.cross_entropy(student, guess, reduction="none") * (sure > CONFIDENT))
            total = lm.Mean(loss.total + weight * apart.total, loss.weight)
            metrics = {"labeled": loss, "apart": apart, "sure": lm.Mean.of(sure > CONFIDENT)}
            return total, lm.Aux(metrics=metrics)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss, **aux.metrics}

    return step


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """Accuracy on held-out images."""
    logits, _ = state.apply(state.params, batch["image"])
    return {"accuracy": lm.Mean.of(logits.argmax(-1) == batch["label"])}


def train(name: str, consistency: float, config: Config) -> lm.Result:
    """One run, in its own directory."""
    torch.manual_seed(config.seed)
    train_set, val_set = load(config.labels, config.seed)
    loader = lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed)
    tx = lm.optim.adamw(lm.optim.warmup_cosine(config.lr, warmup=10, steps=config.epochs * len(loader)))
    logdir = config.logdir / name
    runner = lm.Runner(
        make_step(consistency),
        transforms=[lm.ema(config.decay, warmup=True), lm.donate(), lm.ddp()],
        checkpoint=lm.Checkpointer(logdir, every=lm.Every(epochs=10)),
        sinks=[lm.sinks.TensorBoard(logdir), lm.sinks.JSONL(logdir / "metrics.jsonl")],
        config=config,
        progress=config.progress,
    )
    return runner.fit(
        lm.TrainState.create(ConvNet(), tx, seed=config.seed),
        loader,
        until=lm.Epochs(config.epochs),
        validate=lm.Validate(
            eval_step,
            lm.Loader(val_set, batch_size=512, shuffle=False),
            every=lm.Every(epochs=min(5, config.epochs)),
            use="ema",
        ),
        resume="auto",
    )


def main(config: Config) -> None:
    """Train without and with the teacher, and compare."""
    alone = train("labels", 0.0, config)
    taught = train("teacher", config.consistency, config)
    if lm.rank() == 0:
        print(f"{config.labels} labels, held-out accuracy of the averaged params:")
        print(f"  labels alone {alone.metrics['val/accuracy']:.3f}")
        print(f"  with teacher {taught.metrics['val/accuracy']:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
