"""Models and steps for laws of `context_parallel`. B batch, T time, H heads, C width, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm

VOCABULARY, LONGEST = 11, 64


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads, causal):
        super().__init__()
        self.size, self.kv_heads, self.causal = width // heads, kv_heads, causal
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * kv_heads * self.size)
        self.project = nn.Linear(width, width)

    def forward(self, x, mask):
        q = self.q(x).unflatten(-1, (-1, self.size)).transpose(1, 2)  # B, H, T, C/H
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, self.size)).permute(2, 0, 3, 1, 4)
        causal = self.causal and mask is None
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != self.kv_heads)
        return self.project(out.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Two blocks of attention and an MLP; positions by `arange`, a slice of a table, or `position_ids`."""

    def __init__(self, width=8, heads=4, kv_heads=4, positions="arange", causal=True, dropout=0.0):
        super().__init__()
        self.kind = positions
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LONGEST, width)
        self.register_buffer("table", torch.randn(1, LONGEST, width))
        self.blocks = nn.ModuleList([Attention(width, heads, kv_heads, causal) for _ in range(2)])
        self.mlps = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout)) for _ in "ab"]
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids, position_ids=None, mask=None):
        x = self.tokens(ids)
        if position_ids is not None:
            x = x + self.positions(position_ids)
        elif self.kind == "arange":
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        elif self.kind == "slice":
            x = x + self.table[:, : ids.shape[1]]
        elif self.kind == "narrow":
            x = x + self.table.narrow(1, 0, ids.shape[1])
        for attention, mlp in zip(self.blocks, self.mlps, strict=True):
            x = x + attention(x, mask)
            x = x + mlp(x)
        return self.head(x)


def state_of(net=None, tx=None, **settings):
    torch.manual_seed(0)
    return lm.TrainState.create((net or GPT)(**settings).double(), tx or lm.optim.adam(0.02), seed=3)


def batches(steps, rows=3, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        ends = (torch.rand(rows, length, generator=generator) < 0.3).long()
        found.append({"ids": ids, "documents": ends.cumsum(1), "labels": lm.losses.shift_labels(ids)})
    return found


def losses_of(logits, labels):
    """The loss and metrics of next tokens, over the labels that count."""
    counts = labels != -100
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    metrics = {
        "accuracy": lm.Mean.of(logits.argmax(-1) == labels, counts),
        "tokens": lm.Sum.of(counts),
        "largest": lm.Max.of(logits),
    }
    return lm.Mean.of(losses, counts), metrics


def step(state, batch):
    def loss_fn(params, batch):
        keys = [name for name in ("position_ids", "mask") if name in batch]
        logits, buffers = state.apply(params, batch["ids"], **{name: batch[name] for name in keys})
        loss, metrics = losses_of(logits, batch["labels"])
        return loss, lm.Aux(buffers=buffers, metrics=metrics)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, **aux.metrics}


def train(step, state, data):
    """The metrics of each step as numbers, and the last state, exported."""
    numbers = []
    state = step.init(state)
    for batch in data:
        state, metrics = step(state, batch)
        numbers.append({name: float(value) for name, value in lm.compute_metrics(metrics).items()})
    return numbers, step.export(state)


def document_step(state, batch):
    """The step of one process on packed rows: a mask of documents, and positions within each."""
    same = batch["documents"][:, None, :, None] == batch["documents"][:, None, None, :]
    return step(state, {**batch, "mask": same.tril()})


def positions_within(documents):
    """The position of each token in its document."""
    index = torch.arange(documents.shape[1]).expand_as(documents)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - (index * starts).cummax(1).values


class Mixing(GPT):
    """A model that does `what` along the sequence."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids, position_ids=None):
        x = self.tokens(ids)
        x = x + getattr(self, "by_" + self.what)(x, ids, position_ids)
        for attention in self.blocks:
            x = x + attention(x, None)
        return self.head(x)

    def by_convolution(self, x, ids, position_ids):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)

    def by_recurrence(self, x, ids, position_ids):
        return self.lstm(x)[0]

    def by_pooling(self, x, ids, position_ids):
        return x.mean(1, keepdim=True)

    def by_counting(self, x, ids, position_ids):
        return self.positions(torch.ones_like(ids).cumsum(1))

    def by_range_from_one(self, x, ids, position_ids):
        return self.positions(torch.arange(1, ids.shape[1] + 1))

    def by_own_attention(self, x, ids, position_ids):
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return torch.softmax((x @ x.transpose(1, 2)).masked_fill(~allowed, -torch.inf), -1) @ x

    def by_module(self, x, ids, position_ids):
        return self.attention(x, x, x, need_weights=False)[0]

    def by_noise(self, x, ids, position_ids):
        return torch.randn_like(x)

    def by_local_mask(self, x, ids, position_ids):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(x, x, x, mask)

    def by_mask_of_some(self, x, ids, position_ids):
        """As transformers do: a mask only where position_ids start anew."""
        starts = (position_ids.diff(dim=1) != 1).any()
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if starts else None
        return F.scaled_dot_product_attention(x, x, x, mask, is_causal=mask is None)

    def by_attention_dropout(self, x, ids, position_ids):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)

    def by_other_keys(self, x, ids, position_ids):
        return F.scaled_dot_product_attention(x, x[:, :2], x[:, :2])

    def by_fixed_length(self, x, ids, position_ids):
        return self.table[:, :12]
