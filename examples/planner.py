"""Choose how to distribute a GPT over 1,024 devices, without any of them.

    python examples/planner.py                # about a minute
    python examples/planner.py --layers 32 --width 4096 --rows 4 --device h200
    lumen plan examples/planner.py:make --mesh shard=64,data=16 --device h100

`lm.plan` plans each strategy. The step, with its transforms, runs on tensors without values in a world of which only
this process exists, and everything that it would allocate, send and compute is counted. The last command shows one
plan.

Expected: for a GPT of 7.9 billion params on H100s, ddp would take 119 GiB and does not fit; nor does sharding only the
optimizer state. With sharded params and gradients it is 6 GiB. Shards over 64 devices, replicated 16 times, are the
fastest that fit: 1.3 to 1.5 seconds a step, 2.8 million tokens a second. These figures are about steps. A job must
also initialize its state in shards, from a module on the meta device or a checkpoint, because the full state would not
fit either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lumen as lm

# B batch, T time, C width, H heads, V vocabulary.


@dataclass
class Config:
    """The model, the devices, and the rows of each."""

    layers: int = 16
    width: int = 6144
    heads: int = 48
    context: int = 2048
    vocabulary: int = 50_304
    rows: int = 2
    """Rows of the batch on each device."""
    world: int = 1024
    device: str = "h100"


class Block(nn.Module):
    """Causal attention and an MLP, each on a residual branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """Next-token cross-entropy."""

    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["x"])
        return lm.Mean.of(F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def spread(strategy: lm.Transform) -> lm.Step:
    """The step as each process runs it."""
    return lm.compose(strategy, lm.precision("bf16", cast="model"), lm.remat("blocks.*"), lm.donate())(step)


def make_state(config: Config) -> lm.TrainState:
    """A fresh state."""
    return lm.TrainState.create(GPT(config), lm.optim.adamw(3e-4))


def make_batch(config: Config) -> dict[str, Tensor]:
    """One process's batch."""
    tokens = torch.zeros(config.rows, config.context, dtype=torch.int64)
    return {"x": tokens, "y": tokens}


def make() -> tuple[lm.Step, lm.TrainState, dict[str, Tensor]]:
    """The function that `lumen plan` calls."""
    config = Config()
    return spread(lm.fsdp()), make_state(config), make_batch(config)


def strategies(world: int) -> dict[str, tuple[lm.Transform, dict[str, int]]]:
    """Transforms, and the meshes to plan them on, by name."""
    found: dict[str, tuple[lm.Transform, dict[str, int]]] = {
        "ddp": (lm.ddp(), {"data": world}),
        "fsdp, optimizer only": (lm.fsdp(stage=1), {"shard": world}),
        "fsdp": (lm.fsdp(), {"shard": world}),
    }
    for parts in (64, 8):
        if parts < world:
            found[f"fsdp in {parts} parts"] = (lm.fsdp(), {"shard": parts, "data": world // parts})
    return found


def plan(config: Config, strategy: lm.Transform, mesh: dict[str, int]) -> Any:
    """The plan of one strategy."""
    return lm.plan(
        spread(strategy),
        lambda: make_state(config),
        lambda: make_batch(config),
        mesh=mesh,
        device=config.device,
    )


def fits(found: Any) -> bool:
    """Whether the device holds a step. `found.fits` asks the same of the moment when each process makes the state."""
    return found.peak.nbytes <= found.device.memory


def main(config: Config) -> None:
    """Plan them all, and name the fastest that fits."""
    plans = {name: plan(config, *how) for name, how in strategies(config.world).items()}
    table = Table(title=f"{config.world:,} devices: {config.device}")
    table.add_column("strategy", no_wrap=True)
    for column in ("peak", "sends", "seconds", "MFU", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in plans.items():
        table.add_row(
            name,
            f"{found.peak.nbytes / 2**30:.1f} GiB",
            f"{sum(each.sent for each in found.traffic) / 2**30:.1f} GiB",
            "{:.2f} – {:.2f}".format(*found.seconds),
            "{:.0%} – {:.0%}".format(*found.mfu),
            "yes" if fits(found) else "no",
        )
    Console(width=110).print(table)
    fitting = {name: found for name, found in plans.items() if fits(found)}
    if not fitting:
        print("none fits: take fewer rows, or more devices")
        return
    best = min(fitting, key=lambda name: fitting[name].seconds[1])
    tokens = config.world * config.rows * config.context / fitting[best].seconds[1]
    print(f"fastest that fits, if no communication is hidden: {best}, {tokens / 1e6:.1f} million tokens a second")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
