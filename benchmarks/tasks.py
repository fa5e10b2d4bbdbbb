"""The two models that are timed, and their data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
NO_BOUND = 1e3  # of a norm: the norm is computed, but nothing is clipped
# With few batches the loss would reach zero, and denormal numbers would slow every variant down.
DISTINCT = 64


@dataclass(frozen=True)
class Task:
    """A model, its loss and its batches; `steps` is how many steps one timed section takes by default."""

    name: str
    title: str
    net: Callable[[], nn.Module]
    batches: list[Batch]
    steps: int

    def fresh(self) -> nn.Module:
        """The model before training, with the same numbers each time."""
        torch.manual_seed(0)
        return self.net()

    def data(self, count: int) -> list[Batch]:
        """`count` batches, repeated cyclically."""
        return [self.batches[i % DISTINCT] for i in range(count)]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all but the last dim of `logits`."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


class Block(nn.Module):
    """A transformer block, normalized first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT."""

    def __init__(self, vocab: int = 128, tokens: int = 64, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make(name: str) -> Task:
    """The task "mlp", "gpt", or "gpt-small", which has the layers of "gpt" and little to compute in each."""
    generator = torch.Generator().manual_seed(1)
    if name == "mlp":
        images = [torch.randn(32, 784, generator=generator) for _ in range(DISTINCT)]
        labels = [torch.randint(0, 10, (32,), generator=generator) for _ in range(DISTINCT)]
        title = "MLP 784-128-128-10, batch 32"
        return Task(name, title, lambda: mlp(784, 128, 128, 10), list(zip(images, labels, strict=True)), steps=200)
    rows, tokens, width = (8, 64, 128) if name == "gpt" else (4, 16, 32)
    texts = [torch.randint(0, 128, (rows, tokens + 1), generator=generator) for _ in range(DISTINCT)]
    title = f"GPT 4 layers, width {width}, {tokens} tokens, batch {rows}"
    batches = [(text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in texts]
    return Task(name, title, lambda: GPT(tokens=tokens, width=width), batches, steps=32)
