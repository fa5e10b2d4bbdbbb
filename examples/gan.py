"""Train a GAN on eight Gaussians on a ring: two models and two optimizers in one step.

    python examples/gan.py                    # about 25 seconds on 2 cores
    python examples/gan.py --steps 6000 --logdir runs/gan_long
    torchrun --nproc-per-node=2 examples/gan.py --logdir runs/gan_ddp

The state is a dataclass of two `TrainState`s. The step updates the discriminator, then the generator against the new
discriminator. Runner, checkpoints, `donate` and `ddp` treat this state like any other. The losses are non-saturating,
with a penalty on the discriminator's slope at real points (R1; Mescheder et al., 2018), which is differentiated a
second time.

Expected: all 8 Gaussians are reached, and 85% of the points lie within four standard deviations of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import lumen as lm

# B batch.
MODES, SPREAD, NOISE = 8, 0.05, 8


@dataclass
class Config:
    """Settings of the run."""

    steps: int = 1200
    batch_size: int = 256
    width: int = 64
    lr: float = 4e-3
    penalty: float = 0.05
    seed: int = 0
    logdir: Path = Path("runs/gan")
    progress: Literal["auto", "bar", "lines"] = "auto"


@lm.dataclass
class Game:
    """Two players, each with params, optimizer state and a step count."""

    generator: lm.TrainState
    discriminator: lm.TrainState


def mlp(inside: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def centers() -> Tensor:
    """The centers [8, 2] of the Gaussians."""
    angles = torch.arange(MODES) * (2 * torch.pi / MODES)
    return 2 * torch.stack([angles.cos(), angles.sin()], -1)


def load(seed: int, size: int = 25_600) -> Tensor:
    """Points [N, 2], the same number from each Gaussian."""
    spread = SPREAD * lm.random.normal(lm.random.key(seed), (size, 2))
    return centers()[torch.arange(size) % MODES] + spread


def draw(key: Tensor, rows: Tensor) -> Tensor:
    """Noise [B, 8], a function of the key and the index of each row."""
    return torch.vmap(lambda row: lm.random.normal(lm.random.fold_in(key, row), (NOISE,)))(rows)


def make_step(penalty: float):
    """A step of both players."""

    def step(state: Game, batch: dict[str, Tensor]) -> tuple[Game, dict[str, lm.Mean]]:
        generator, discriminator = state.generator, state.discriminator

        batch = {**batch, "noise": draw(generator.key, batch["row"])}

        def discriminator_loss(params, batch):
            real, (made, _) = batch["point"], generator.apply(generator.params, batch["noise"])
            slope = torch.func.grad(lambda x: discriminator.apply(params, x)[0].sum())(real)
            on_real, on_made = (discriminator.apply(params, points)[0].squeeze(-1) for points in (real, made))
            return lm.Mean.of(F.softplus(-on_real) + F.softplus(on_made) + penalty * slope.square().sum(-1))

        found_out, grads = lm.value_and_grad(discriminator_loss)(discriminator.params, batch)
        discriminator = discriminator.apply_gradients(grads)

        def generator_loss(params, batch):
            made, _ = generator.apply(params, batch["noise"])
            logits, _ = discriminator.apply(discriminator.params, made)
            return lm.Mean.of(F.softplus(-logits.squeeze(-1)))

        fooled, grads = lm.value_and_grad(generator_loss)(generator.params, batch)
        new = state.replace(generator=generator.apply_gradients(grads), discriminator=discriminator)
        return new, {"discriminator": found_out, "generator": fooled}

    return step


def eval_step(state: Game, rows: Tensor) -> dict[str, Tensor | lm.Mean]:
    """How many of the Gaussians are reached, and the share of points within four standard deviations of one."""
    points, _ = state.generator.apply(state.generator.params, draw(lm.random.key(0), rows))
    distance, nearest = torch.cdist(points, centers()).min(-1)
    near = distance < 4 * SPREAD
    share = F.one_hot(nearest, MODES)[near].float().sum(0) / len(points)
    # Each Gaussian is an eighth of the data; one that gets less than a quarter of that counts as lost.
    return {"modes": (share > 0.25 / MODES).sum(), "near": lm.Mean.of(near)}


def main(config: Config) -> lm.Result:
    """Train, and count the Gaussians that the generator reaches."""
    torch.manual_seed(config.seed)
    tx = lm.optim.adam(config.lr, betas=(0.5, 0.9))
    state = Game(
        generator=lm.TrainState.create(mlp(NOISE, config.width, 2), tx, seed=config.seed),
        discriminator=lm.TrainState.create(mlp(2, config.width, 1), tx, seed=config.seed),
    )
    points = load(config.seed)
    runner = lm.Runner(
        make_step(config.penalty),
        transforms=[lm.donate(), lm.ddp()],
        checkpoint=lm.Checkpointer(config.logdir, every=lm.Every(steps=500)),
        sinks=[lm.sinks.TensorBoard(config.logdir), lm.sinks.JSONL(config.logdir / "metrics.jsonl")],
        config=config,
        log_every=250,
        progress=config.progress,
    )
    probe = lm.Loader(torch.arange(2000), batch_size=2000, shuffle=False)
    before = runner.evaluate(eval_step, runner.step.init(state), probe)
    result = runner.fit(
        state,
        lm.Loader({"point": points, "row": torch.arange(len(points))}, batch_size=config.batch_size, seed=config.seed),
        until=lm.Steps(config.steps),
        validate=lm.Validate(eval_step, probe, every=lm.Every(steps=min(500, config.steps))),
        resume="auto",
    )
    if lm.rank() == 0:
        print(f"before: {before['modes']:.0f} of {MODES} reached, {before['near']:.1%} of the points near one")
        found = {name: result.metrics[f"val/{name}"] for name in ("modes", "near")}
        print(f"after:  {found['modes']:.0f} of {MODES} reached, {found['near']:.1%} of the points near one")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
