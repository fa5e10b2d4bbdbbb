"""Train a small GPT on characters of Python's own standard library.

    python examples/char_lm.py                                        # about a minute on 2 cores
    python examples/char_lm.py --transforms accumulate bf16 compile ema
    torchrun --nproc-per-node=2 examples/char_lm.py --strategy fsdp
    torchrun --nproc-per-node=4 --max-restarts=2 examples/char_lm.py --strategy fsdp-tensor --checkpoint

Strategies: ddp, fsdp, hsdp (replicas of shards), tensor, and two of them combined. With --checkpoint the run resumes
from its last checkpoint, also under another strategy and with another number of processes.

Expected: the validation loss decreases from 4.6 (log of the vocabulary) to about 2.1 nats per character in 800 steps,
and the sample at the end has the shape of Python.
"""

from __future__ import annotations

import math
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import lumen as lm

# B batch, T time, C width, H heads, V vocabulary.
MODULES = (
    "argparse",
    "ast",
    "calendar",
    "dataclasses",
    "functools",
    "inspect",
    "pathlib",
    "random",
    "statistics",
    "typing",
)
ORDER = ("compile", "guard", "ema", "donate", "strategy", "accumulate", "bf16", "remat")


@dataclass
class Config:
    """Settings of the run."""

    steps: int = 800
    batch_size: int = 16
    context: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 128
    lr: float = 4e-3
    seed: int = 0
    transforms: tuple[Literal["accumulate", "bf16", "compile", "donate", "ema", "guard", "remat"], ...] = ("donate",)
    strategy: Literal["ddp", "fsdp", "hsdp", "tensor", "ddp-tensor", "fsdp-tensor"] = "ddp"
    """How several processes share the work; with one process, all are the identity."""
    checkpoint: bool = False
    """Save four times, and resume when started again."""
    logdir: Path = Path("runs/char_lm")
    sample: int = 200
    """Characters to sample at the end."""


class Block(nn.Module):
    """Attention and MLP, each on a residual branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        # The number of heads follows from the shape: under tensor parallelism it is this rank's.
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """A decoder-only transformer whose output layer is its embedding."""

    def __init__(self, vocabulary: int, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_text() -> str:
    """Sources of the standard library that runs this script."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return "".join((root / f"{name}.py").read_text() for name in MODULES if (root / f"{name}.py").exists())


def windows(tokens: Tensor, context: int) -> dict[str, Tensor]:
    """Non-overlapping windows: inputs and targets, each [N, context]."""
    count = (len(tokens) - 1) // context
    return {
        "x": tokens[: count * context].view(count, context),
        "y": tokens[1 : count * context + 1].view(count, context),
    }


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """Next-character cross-entropy, in nats."""

    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["x"])
        return lm.Mean.of(F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """The same loss on held-out text."""
    logits, _ = state.apply(state.params, batch["x"])
    return {"loss": lm.Mean.of(F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), reduction="none"))}


AXES = {
    "ddp": {"data": -1},
    "fsdp": {"shard": -1},
    "hsdp": {"data": 2, "shard": -1},
    "tensor": {"tensor": -1},
    "ddp-tensor": {"data": -1, "tensor": 2},
    "fsdp-tensor": {"shard": -1, "tensor": 2},
}


def make_strategy(name: str) -> list[lm.Transform]:
    """The transforms that distribute the step over processes, outermost first."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    mesh = lm.mesh(**({} if alone else AXES[name]))
    transforms: list[lm.Transform] = []
    if name != "tensor":
        transforms.append(lm.ddp(mesh) if name.startswith("ddp") else lm.fsdp(mesh))
    if "tensor" in name:
        transforms.append(lm.tensor_parallel(lm.parallel.plans.gpt(), mesh))
    return transforms


def make_transforms(names: tuple[str, ...], strategy: str) -> list[lm.Transform]:
    """The named transforms, in canonical order."""
    known = {
        "compile": [lm.compile()],
        "guard": [lm.guard()],
        "ema": [lm.ema(0.99, warmup=True)],
        "donate": [lm.donate()],
        "strategy": make_strategy(strategy),
        "accumulate": [lm.accumulate(2)],
        "bf16": [lm.precision("bf16")],
        "remat": [lm.remat("blocks.*")],
    }
    return [transform for name in ORDER if name in (*names, "strategy") for transform in known[name]]


def generate(state: lm.TrainState, prompt: Tensor, count: int, context: int) -> Iterator[int]:
    """Sample `count` tokens after `prompt` [T]."""
    state, tokens = state.eval(), prompt
    for key in lm.random.split(lm.random.key(0), count):
        logits, _ = state.apply(state.params, tokens[-context:].unsqueeze(0))
        # Gumbel's trick: the argmax of logits plus Gumbel noise is a draw from their softmax.
        noise = -torch.log(-torch.log(lm.random.uniform(key, logits.shape[-1:]).clamp(1e-6, 1 - 1e-6)))
        token = (logits[0, -1].float() / 0.8 + noise).argmax()
        tokens = torch.cat([tokens, token.view(1)])
        yield int(token)


def main(config: Config) -> lm.Result:
    """Train, validate four times, and sample."""
    torch.manual_seed(config.seed)
    text = read_text()
    vocabulary = sorted(set(text))
    index = {char: i for i, char in enumerate(vocabulary)}
    tokens = torch.tensor([index[char] for char in text])
    cut = len(tokens) * 95 // 100
    train_set, val_set = (windows(part, config.context) for part in (tokens[:cut], tokens[cut:]))
    schedule = lm.optim.warmup_cosine(config.lr, warmup=max(config.steps // 20, 1), steps=config.steps)
    tx = lm.optim.chain(
        lm.optim.clip_by_global_norm(1.0),
        lm.optim.adamw(schedule, betas=(0.9, 0.95), weight_decay=0.1, decay_mask=lm.optim.matrices),
    )
    state = lm.TrainState.create(GPT(len(vocabulary), config), tx, seed=config.seed)
    quarter = lm.Every(steps=max(config.steps // 4, 1))
    runner = lm.Runner(
        step,
        transforms=make_transforms(config.transforms, config.strategy),
        checkpoint=lm.Checkpointer(config.logdir, every=quarter) if config.checkpoint else None,
        sinks=[lm.sinks.TensorBoard(config.logdir), lm.sinks.JSONL(config.logdir / "metrics.jsonl")],
    )
    use = "ema" if "ema" in config.transforms else "params"
    result = runner.fit(
        state,
        lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed),
        until=lm.Steps(config.steps),
        validate=lm.Validate(
            eval_step,
            lm.Loader(val_set, batch_size=64, shuffle=False),
            every=quarter,
            use=use,
        ),
        resume="auto" if config.checkpoint else "never",
    )
    last = result.state if use == "params" else result.state.replace(params=lm.ema.params(result.state))
    final = result.step.export(last)  # full tensors, on every process
    if lm.rank() == 0:
        report(result, final, vocabulary, config)
    return result


def report(result: lm.Result, final: lm.TrainState, vocabulary: list[str], config: Config) -> None:
    """Print the loss, and a sample from the model."""
    loss = result.metrics["val/loss"]
    print(f"validation loss {loss:.3f} nats per character ({loss / math.log(2):.3f} bits)")
    prompt = torch.tensor([vocabulary.index(char) for char in "def "])
    print("def " + "".join(vocabulary[i] for i in generate(final, prompt, config.sample, config.context)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
