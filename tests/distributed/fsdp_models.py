"""Models with repeated blocks, for laws of `fsdp`."""

from __future__ import annotations

import torch
from torch import nn

from tests.distributed import models
from tests.distributed.models import CLASSES, WIDTH


class Block(nn.Module):
    """Pre-norm attention and a small perceptron; no bias for keys, which has no gradient in exact arithmetic."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h):
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        h = h + self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
        return h + self.down(torch.tanh(self.up(h)))


class DeepGPT(nn.Module):
    """Three blocks; embedding and head tied; a scalar gain and params with fewer rows than processes."""

    def __init__(self, vocab=11, width=6, depth=3):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.place = nn.Parameter(torch.randn(1, WIDTH, width) * 0.1)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.mix = nn.Linear(width, CLASSES)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed((x.abs() * 5).long().clamp(max=10)) + self.place
        for block in self.blocks:
            h = block(h)
        h = h * self.gain
        return self.mix(h).mean(1) + self.head(h).mean((1, 2)).unsqueeze(-1) * torch.arange(
            1.0, 4, dtype=h.dtype, device=x.device
        )


class Reaching(nn.Module):
    """A parent that uses a param of its blocks without calling them, calls one twice, and the last never."""

    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.outward = nn.Linear(5, CLASSES)

    def forward(self, x):
        h = self.blocks[0](torch.tanh(self.inward(x)))
        h = torch.tanh(h) + self.blocks[1].bias
        return self.outward(self.blocks[0](h) @ self.blocks[1].weight)


class ConvStack(nn.Module):
    """Two units with a BatchNorm each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*[self._stage(*sizes) for sizes in ((1, 4), (4, 3))])
        self.head = nn.Linear(3, CLASSES)

    @staticmethod
    def _stage(before, after):
        conv = nn.Conv1d(before, after, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm1d(after), nn.Tanh())

    def forward(self, x):
        return self.head(self.body(x.unsqueeze(1)).mean(-1))


models.register(deep=DeepGPT, reaching=Reaching, stack=ConvStack)
