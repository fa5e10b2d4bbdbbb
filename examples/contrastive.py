"""Learn features of digits without labels by SimCLR, and measure them by a linear probe.

    python examples/contrastive.py            # about 30 seconds on 2 cores
    python examples/contrastive.py --epochs 100 --logdir runs/contrastive_long
    python examples/contrastive.py --accumulate 4 --logdir runs/contrastive_microbatches
    torchrun --nproc-per-node=2 examples/contrastive.py --logdir runs/contrastive_ddp

Two views of an image (rotated, sheared, shifted, with a patch masked) should have similar features, two images
different ones. The loss compares the rows of a batch with each other (NT-Xent; Chen et al., 2020). It is a function of
the features of all rows (`lm.grad_cache`), which are all-gathered (`lm.all_gather`). Microbatches and processes
therefore train on the loss of the full batch.

The probe is a logistic regression on few labeled images.

Expected: the probe with 50 labels reaches about 91% on the trained features, 87% on pixels, 84% on untrained features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import lumen as lm


@dataclass
class Config:
    """Settings of the run."""

    epochs: int = 50
    batch_size: int = 256
    temperature: float = 0.2
    labels: int = 50
    """Labeled images for the probe, the same number of each digit."""
    accumulate: int = 1
    """Microbatches of a batch; their rows are still compared with each other."""
    lr: float = 4e-3
    seed: int = 0
    logdir: Path = Path("runs/contrastive")
    progress: Literal["auto", "bar", "lines"] = "auto"


class Encoder(nn.Module):
    """Features of an image, and a head to the space in which views are compared; the head is discarded later."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(8 * width, 128), nn.ReLU(), nn.Linear(128, 32))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, F] and their projections [B, 32] for images [B, 1, 8, 8]."""
        features = self.features(images)
        return features, self.head(features)


def load(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training and a validation set, 80 to 20."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    cut = len(labels) * 4 // 5
    return tuple(  # type: ignore[return-value]
        {"image": images[part], "label": labels[part], "row": part} for part in (order[:cut], order[cut:])
    )


def augment(images: Tensor, rows: Tensor, key: Tensor) -> Tensor:
    """Views of images [B, 1, 8, 8], by draws that depend on the key and the index of each row."""
    draws = torch.vmap(lambda row: lm.random.uniform(lm.random.fold_in(key, row), (8,), low=-1.0, high=1.0))(rows)
    angle, shear, right, down, wide, high, hidden_x, hidden_y = draws.unbind(1)
    angle, wide, high = 0.3 * angle, 1 + 0.2 * wide, 1 + 0.2 * high
    top = torch.stack([wide * angle.cos(), 0.3 * shear - angle.sin(), 0.25 * right], -1)
    bottom = torch.stack([angle.sin(), high * angle.cos(), 0.25 * down], -1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, align_corners=False)
    place = torch.linspace(-1, 1, 8)
    near_x, near_y = ((place - at.unsqueeze(1)).abs() < 0.4 for at in (hidden_x, hidden_y))
    return views * ~(near_y.unsqueeze(2) & near_x.unsqueeze(1)).unsqueeze(1)


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """For each of these 2 B views, the cross-entropy of finding its partner among the views of all processes."""
    own = F.normalize(torch.cat([one, other]), dim=-1)
    # lm.ddp() spreads rows along the axis data, lm.fsdp() along shard; the other axis has one process.
    everyone = torch.cat([lm.all_gather(lm.all_gather(views, "shard"), "data") for views in own.chunk(2)])
    process = lm.axis_index("data") + lm.axis_index("shard")
    rows = process * len(one) + torch.arange(len(one))
    places = torch.cat([rows, rows + len(everyone) // 2])  # of this rank's views among all
    itself = F.one_hot(places, len(everyone)).bool()
    similarity = (own @ everyone.T / temperature).masked_fill(itself, -torch.inf)
    return F.cross_entropy(similarity, places.roll(len(one)), reduction="none")


def make_step(temperature: float):
    """A step that draws two views of each image and brings their features together."""

    def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
        def encode(params, batch):
            views = [augment(batch["image"], batch["row"], key) for key in lm.random.split(state.key)]
            (_, projections), _ = state.apply(params, torch.cat(views))
            return projections.chunk(2)

        def loss(params, embeddings, batch):
            return lm.Mean.of(contrast(*embeddings, temperature))

        value, grads = lm.value_and_grad(lm.grad_cache(encode, loss))(state.params, batch)
        return state.apply_gradients(grads), {"loss": value}

    return step


def features_of(state: lm.TrainState, batch: dict[str, Tensor]) -> Tensor:
    """Features [B, F] of the original images."""
    return state.apply(state.params, batch["image"])[0][0]


def main(config: Config) -> lm.Result:
    """Train without labels, then compare the probe on pixels and on features before and after."""
    torch.manual_seed(config.seed)
    train_set, val_set = load(config.seed)
    loader = lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed, drop_last=True)
    steps = config.epochs * len(loader)
    tx = lm.optim.adamw(lm.optim.warmup_cosine(config.lr, warmup=steps // 10 + 1, steps=steps), weight_decay=0.01)
    state = lm.TrainState.create(Encoder(), tx, seed=config.seed)
    runner = lm.Runner(
        make_step(config.temperature),
        transforms=[lm.donate(), lm.ddp(), lm.accumulate(config.accumulate)],
        checkpoint=lm.Checkpointer(config.logdir, every=lm.Every(epochs=10)),
        sinks=[lm.sinks.TensorBoard(config.logdir), lm.sinks.JSONL(config.logdir / "metrics.jsonl")],
        config=config,
        log_every=10,
        progress=config.progress,
    )
    result = runner.fit(state, loader, until=lm.Epochs(config.epochs), resume="auto")
    final = result.export()  # on every process: under lm.fsdp() it gathers their shards
    if lm.rank() == 0:
        report({"untrained": state, "trained": final}, result, train_set, val_set, config)
    return result


def report(
    states: dict[str, lm.TrainState],
    result: lm.Result,
    train_set: dict[str, Tensor],
    val_set: dict[str, Tensor],
    config: Config,
) -> None:
    """The probe's accuracy on held-out images."""
    labels = train_set["label"]
    few = torch.cat([(labels == digit).nonzero()[: config.labels // 10, 0] for digit in range(10)])
    print(f"contrastive loss {result.metrics['train/loss']:.3f}; a probe with {config.labels} labels finds of")
    ways = {
        "pixels": lambda data: data["image"].flatten(1),
        "untrained features": lambda data: features_of(states["untrained"], data),
        "trained features": lambda data: features_of(states["trained"], data),
    }
    for name, way in ways.items():
        with torch.no_grad():
            found, held_out = (F.normalize(way(data)).numpy() for data in (train_set, val_set))
        probe = LogisticRegression(C=100.0, max_iter=2000).fit(found[few], labels[few].numpy())
        print(f"  {name:18} {probe.score(held_out, val_set['label'].numpy()):.3f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
