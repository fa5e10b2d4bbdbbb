"""Models in blocks, which a pipeline splits, and how far it is from one process."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen.core import distributed as world
from lumen.parallel.comm.mesh import mesh
from tests.distributed.models import (
    CLASSES,
    WIDTH,
    bare,
    batches,
    furthest,
    make_state,
    part,
    register,
    step,
    train,
    transforms,
)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Blocks(nn.Module):
    """A small GPT over the columns of x: embeddings, blocks that share a mask, and a head."""

    def __init__(self, count=4, width=4):
        super().__init__()
        self.tokens = nn.Embedding(11, width)
        self.positions = nn.Embedding(WIDTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(count))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril())

    def forward(self, x):
        ids = (x.abs() * 5).long().clamp(max=10)
        h = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        b, t, _ = h.shape
        mask = self.mask[:t, :t]
        for block in self.blocks:
            h = block(h, mask)
        return self.head(self.norm(h)).mean(1)


class Scale(nn.Module):
    """A number, in front of a layer."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.layer(x * self.factor)


def stack(*sizes):
    layers = []
    for a, b in zip((WIDTH, *sizes), (*sizes, CLASSES), strict=True):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


TWO = {"microbatches": 2}

register(
    pipeline_stack=lambda: stack(8, 5, 7),
    pipeline_blocks=Blocks,
    scaled=lambda: nn.Sequential(Scale(WIDTH, 4), Scale(4, CLASSES)),
)


ROWS = {
    "ddp": lm.ddp,
    **{f"fsdp{stage}": functools.partial(lm.fsdp, stage=stage) for stage in (1, 2, 3)},
}


def law(cases, axes=None, steps=3, around=None):
    """For each case how far the step in stages is from one process: the losses, and the furthest leaf.

    `around` is what divides rows over the other axis.
    """
    found = []
    grid = mesh(**(axes or {"pipeline": -1}), device="cpu")
    for model, names, sizes, settings in cases:
        outer = transforms(names)
        rows, cut = [] if around is None else [ROWS[around](grid)], lm.pipeline(grid, **settings)
        wrapped = lm.compose(*rows, *outer, cut)(step)
        whole = batches(steps, sum(sizes), torch.float64)
        data = [part(batch, sizes, world.rows()[0]) for batch in whole]
        losses, state = train(wrapped, make_state(model), data)
        for transform in (*rows, cut):
            state = transform.export(state)
        wanted, other = train(lm.compose(*outer)(step), make_state(model), whole)
        found.append((float((losses - wanted).abs().max()), *furthest(bare(state), bare(other))))
    return found
