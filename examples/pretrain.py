"""Pretrain a GPT as large models are: packed documents, chunked loss, selective remat, sharded or 2-D.

    python examples/pretrain.py                                       # two minutes on 2 cores
    python examples/pretrain.py --remat "budget=60MB" --bf16
    torchrun --nproc-per-node=2 examples/pretrain.py --strategy fsdp
    torchrun --nproc-per-node=2 examples/pretrain.py --strategy context     # each process has half of each row
    torchrun --nproc-per-node=4 examples/pretrain.py --strategy fsdp-tensor

The documents are the functions and classes of Python's own standard library, as bytes. `lm.data.Packed` puts several of
them into each row, and attention stays within a document. Every option changes how the step is computed, and none of
them what it computes: the losses are the same, up to rounding (for bf16, its own).

Expected: about 99% of all places are real tokens, and the validation loss decreases from 5.6 (log of the vocabulary)
to about 2.2 nats per byte in 400 steps.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import lumen as lm

# B batch, T time, C width, H heads, V vocabulary.
END = 256  # ends a document; the other tokens are bytes
VOCABULARY = 257
Strategy = Literal["ddp", "fsdp", "tensor", "context", "ddp-tensor", "fsdp-tensor", "fsdp-context"]


@dataclass
class Config:
    """Settings of the run."""

    steps: int = 400
    batch_size: int = 16
    context: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    lr: float = 4e-3
    seed: int = 0
    strategy: Strategy = "fsdp"
    """How several processes share the work; with one process, all are the identity."""
    remat: str = "matmuls"
    """What the blocks keep for the backward pass: all, none, matmuls, attention, or a number of bytes: budget=60MB."""
    chunked: bool = True
    """Compute the loss in chunks of tokens, so that the logits never exist as a whole."""
    bf16: bool = False
    """Compute in bfloat16."""
    accumulate: int = 1
    """Microbatches of a step."""
    documents: int = 4000
    """How many to use at most."""
    logdir: Path = Path("runs/pretrain")
    progress: str = "bar"


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

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, C] and the mask [B, 1, T, T] to [B, T, C]."""
        # The number of heads follows from the shape: under tensor parallelism it is this rank's.
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.project(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """A decoder-only transformer over packed documents."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Logits [B, T, V] for tokens, their positions and the numbers of their documents, each [B, T]."""
        x = self.tokens(tokens) + self.positions(positions)
        mask = lm.data.document_mask(documents)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def loss_of(state: lm.TrainState, params, batch: dict[str, Tensor]) -> lm.Mean:
    """Next-token cross-entropy in nats, over the places that hold a token."""
    logits, _ = state.apply(params, batch["tokens"], batch["positions"], batch["documents"])
    targets = batch["targets"].flatten()
    total = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    return lm.Mean(total, (targets != -100).sum().to(total.dtype))


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """One update."""
    loss, grads = lm.value_and_grad(lambda params, batch: loss_of(state, params, batch))(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """The same loss on held-out documents."""
    return {"loss": loss_of(state, state.params, batch)}


AXES = {
    "ddp": {"data": -1},
    "fsdp": {"shard": -1},
    "tensor": {"tensor": -1},
    "ddp-tensor": {"data": -1, "tensor": 2},
    "context": {"context": -1},
    "fsdp-tensor": {"shard": -1, "tensor": 2},
    "fsdp-context": {"shard": -1, "context": 2},
}


def make_transforms(config: Config) -> list[lm.Transform]:
    """What the configuration asks for, outermost first."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    mesh = lm.mesh(**({} if alone else AXES[config.strategy]))
    transforms: list[lm.Transform] = [lm.donate()]
    if config.strategy.startswith("ddp"):
        transforms.append(lm.ddp(mesh))
    if config.strategy.startswith("fsdp"):
        transforms.append(lm.fsdp(mesh))
    if "context" in config.strategy:
        transforms.append(lm.context_parallel(mesh, documents="documents"))
    if "tensor" in config.strategy:
        transforms.append(lm.tensor_parallel(lm.parallel.plans.gpt(), mesh))
    if config.accumulate > 1:
        transforms.append(lm.accumulate(config.accumulate))
    if config.bf16:
        transforms.append(lm.precision("bf16"))
    transforms += make_remat(config.remat)
    return [*transforms, lm.chunked_logits()] if config.chunked else transforms


def make_remat(remat: str) -> list[lm.Transform]:
    """The transform that recomputes what the blocks do not keep."""
    if remat == "all":
        return []
    if remat == "none":
        return [lm.remat("blocks.*")]
    if remat.startswith("budget="):
        return [lm.remat("blocks.*", budget=remat.removeprefix("budget="))]
    return [lm.remat("blocks.*", save=remat)]


def read_documents(count: int) -> list[np.ndarray]:
    """Functions and classes of the standard library that runs this script, each as tokens [n]."""
    documents: list[np.ndarray] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                source = "".join(lines[node.lineno - 1 : node.end_lineno]).encode()
                documents.append(np.append(np.frombuffer(source, np.uint8), [END]))
        if len(documents) >= count:
            break
    return documents[:count]


def main(config: Config) -> lm.Result:
    """Train, and validate four times."""
    torch.manual_seed(config.seed)
    documents = read_documents(config.documents)
    train_set, val_set = (
        lm.data.Packed(part, config.context, overflow="split", seed=config.seed)
        for part in ([d for i, d in enumerate(documents) if i % 20], documents[::20])
    )
    schedule = lm.optim.warmup_cosine(config.lr, warmup=max(config.steps // 20, 1), steps=config.steps)
    tx = lm.optim.chain(
        lm.optim.clip_by_global_norm(1.0),
        lm.optim.adamw(schedule, betas=(0.9, 0.95), weight_decay=0.1, decay_mask=lm.optim.matrices),
    )
    state = lm.TrainState.create(GPT(config), tx, seed=config.seed)
    quarter = lm.Every(steps=max(config.steps // 4, 1))
    runner = lm.Runner(
        step,
        transforms=make_transforms(config),
        sinks=[lm.sinks.JSONL(config.logdir / "metrics.jsonl")],
        tokens=lambda batch: int((batch["targets"] != -100).sum()),
        progress=config.progress,
    )
    result = runner.fit(
        state,
        lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed),
        until=lm.Steps(config.steps),
        validate=lm.Validate(eval_step, lm.Loader(val_set, batch_size=config.batch_size, shuffle=False), every=quarter),
    )
    if lm.rank() == 0:
        print(f"{len(documents)} documents in {len(train_set)} rows, {train_set.filled:.1%} of whose places are tokens")
        print(f"validation loss {result.metrics['val/loss']:.3f} nats per byte")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
