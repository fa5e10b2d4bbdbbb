"""Learn to balance a pole by REINFORCE, on 64 carts at once, in an environment written in torch.

    python examples/policy_gradient.py        # about 25 seconds on 2 cores
    python examples/policy_gradient.py --carts 256 --updates 200 --logdir runs/policy_gradient_256
    torchrun --nproc-per-node=2 examples/policy_gradient.py --logdir runs/policy_gradient_ddp

A batch is only a seed for each cart. The step plays the episodes itself, with explicit keys, so it stays a pure
function, and a batch split into microbatches plays the same episodes. An episode ends when the pole leans by 12 degrees
or the cart is 2.4 m off, at the latest after 200 moves, which is the best possible return. The baseline is a second
net.

Expected: a return of 200, the best possible, for the likelier push at each move, and 15 before training; 25 updates
are usually enough. Episodes in training, where pushes are drawn at random, reach about 190.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import lumen as lm

# B carts, T moves.
MOVES = 200


@dataclass
class Config:
    """Settings of the run."""

    updates: int = 100
    carts: int = 64
    discount: float = 0.98
    lr: float = 1e-2
    seed: int = 0
    logdir: Path = Path("runs/policy_gradient")
    progress: Literal["auto", "bar", "lines"] = "auto"


class ActorCritic(nn.Module):
    """The logit of pushing to the right, and the expected return, each from a small net."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.value = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and values [...] for observations [..., 4]."""
        return self.policy(seen).squeeze(-1), self.value(seen).squeeze(-1)


def move(cart: Tensor, right: Tensor) -> Tensor:
    """Carts [B, 4] 20 ms after a push of 10 N to the right or left [B]: Barto, Sutton and Anderson's equations (1983).

    The columns are the cart's position and speed, and the pole's angle and angular speed.
    """
    gravity, pole_mass, mass, half_length, time = 9.8, 0.1, 1.1, 0.5, 0.02
    _, speed, angle, turning = cart.unbind(-1)
    push = torch.where(right, 10.0, -10.0)
    pulled = (push + pole_mass * half_length * turning.square() * angle.sin()) / mass
    inertia = half_length * (4 / 3 - pole_mass * angle.cos().square() / mass)
    turning_up = (gravity * angle.sin() - angle.cos() * pulled) / inertia
    speeding_up = pulled - pole_mass * half_length * turning_up * angle.cos() / mass
    rates = torch.stack([speed, speeding_up, turning, turning_up], -1)
    return cart + time * rates


def is_up(cart: Tensor) -> Tensor:
    """Which of the carts [B, 4] have not failed."""
    return (cart[:, 0].abs() < 2.4) & (cart[:, 2].abs() < math.radians(12))


@torch.no_grad()
def play(state: lm.TrainState, seeds: Tensor, key: Tensor, greedy: bool = False) -> dict[str, Tensor]:
    """Episodes of all carts: observations `seen` [B, T, 4], pushes to the `right`, and valid moves, `alive` [B, T]."""

    def draw(seed: Tensor) -> tuple[Tensor, Tensor]:
        place_key, push_key = lm.random.split(lm.random.fold_in(key, seed)).unbind(0)
        return lm.random.uniform(place_key, (4,), low=-0.05, high=0.05), lm.random.uniform(push_key, (MOVES,))

    cart, chance = torch.vmap(draw)(seeds)
    up = torch.ones(len(seeds), dtype=torch.bool)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for time in range(MOVES):
        logit, _ = state.apply(state.params, cart)[0]
        right = logit > 0 if greedy else chance[:, time] < logit.sigmoid()
        rows.append((cart, right, up))
        cart = torch.where(up.unsqueeze(-1), move(cart, right), cart)
        up = up & is_up(cart)
        if not up.any():
            break
    seen, right, alive = (torch.stack(column, 1) for column in zip(*rows, strict=True))
    return {"seen": seen, "right": right, "alive": alive}


def to_go(rewards: Tensor, discount: float) -> Tensor:
    """Discounted sums [B, T] of the rewards [B, T] from each move on."""
    total, sums = torch.zeros(len(rewards)), []
    for reward in rewards.flip(1).unbind(1):
        total = reward + discount * total
        sums.append(total)
    return torch.stack(sums[::-1], 1)


def make_step(discount: float):
    """A step that plays, and makes moves with better than expected returns more likely."""

    def step(state: lm.TrainState, batch: Tensor) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
        def loss_fn(params, seeds):
            games = play(state, seeds, state.key)
            alive = games["alive"].float()
            returns = to_go(alive, discount)
            (logits, values), _ = state.apply(params, games["seen"])
            advantage = (returns - values).detach() * (1 - discount)
            surprise = F.binary_cross_entropy_with_logits(logits, games["right"].float(), reduction="none")
            wrong = ((returns - values) * (1 - discount)).square()
            metrics = {"return": lm.Mean.of(alive.sum(1)), "value_error": lm.Mean.of(wrong, alive)}
            return lm.Mean.of(advantage * surprise + wrong, alive), lm.Aux(metrics=metrics)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss, **aux.metrics}

    return step


def eval_step(state: lm.TrainState, seeds: Tensor) -> dict[str, lm.Mean]:
    """The return of the likelier push at each move, on separate carts."""
    return {"return": lm.Mean.of(play(state, seeds, lm.random.key(0), greedy=True)["alive"].float().sum(1))}


def main(config: Config) -> lm.Result:
    """Train, and measure how long the poles stay up."""
    torch.manual_seed(config.seed)
    steps = config.updates
    tx = lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.adam(lm.optim.linear(config.lr, steps, 0.0)))
    state = lm.TrainState.create(ActorCritic(), tx, seed=config.seed)
    # Each epoch is one batch with the same seeds. Only the key of the state differs from step to step.
    loader = lm.Loader(torch.arange(config.carts), batch_size=config.carts, shuffle=False)
    carts = lm.Loader(torch.arange(100), batch_size=100, shuffle=False)
    runner = lm.Runner(
        make_step(config.discount),
        transforms=[lm.donate(), lm.ddp()],
        checkpoint=lm.Checkpointer(config.logdir, every=lm.Every(steps=50)),
        sinks=[lm.sinks.TensorBoard(config.logdir), lm.sinks.JSONL(config.logdir / "metrics.jsonl")],
        config=config,
        log_every=10,
        progress=config.progress,
    )
    before = runner.evaluate(eval_step, runner.step.init(state), carts)["return"]
    result = runner.fit(
        state,
        loader,
        until=lm.Steps(steps),
        validate=lm.Validate(eval_step, carts, every=lm.Every(steps=min(10, steps))),
        resume="auto",
    )
    if lm.rank() == 0:
        print(f"return of 100 episodes: {before:.1f} before, {result.metrics['val/return']:.1f} after; best {MOVES}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
