"""Documents of different lengths: real tokens per second of packed rows, beside one document in a row.

A GPT learns documents whose lengths are log-normal, 180 tokens on average, in rows of 1,024. Variants do the same work
for a real token, and differ in how many places of a row hold one. Expected of `lm.data.Packed`: at most 5% of places
are padding, and at least three times the real tokens per second of padded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lumen as lm
from benchmarks import timing
from benchmarks.options import Options
from benchmarks.rows import Row, throughput

CONTEXT, MEAN, DOCUMENTS, ROWS, WIDTH, LAYERS = 1024, 180, 2000, 4, 128, 2
QUICK = (128, 24, 200, 4, 16, 1)
VOCABULARY = 256
BASE = "raw loop, padded rows"
Batch = dict[str, Tensor]


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, C] to [B, T, C]; causal where there is no mask."""
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Logits of tokens at their positions, within their documents."""

    def __init__(self, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor | None) -> Tensor:
        """[B, T] to [B, T, V]."""
        x = self.tokens(tokens) + self.positions(positions)
        mask = None if documents is None else lm.data.document_mask(documents)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def measure(options: Options) -> list[Row]:
    """Padding of each kind of rows, then throughputs."""
    context, mean, count, rows, width, layers = options.pick((CONTEXT, MEAN, DOCUMENTS, ROWS, WIDTH, LAYERS), QUICK)
    case = f"GPT, documents of {mean} tokens, rows of {context}"
    documents = _documents(count, mean, context)
    batches = {name: make(documents, context, rows) for name, make in {"padded": _padded, "packed": _packed}.items()}
    filled = {name: float((batch["targets"] != -100).double().mean()) for name, batch in batches.items()}
    padding = [Row("packing", case, f"{name} rows", "padding", "%", 100 * (1 - x)) for name, x in filled.items()]
    moves = {
        BASE: (_raw(GPT(context, width, layers)), "padded"),
        "Lumen: donate, padded rows": (_lumen(GPT(context, width, layers)), "padded"),
        "Lumen: donate, packed rows": (_lumen(GPT(context, width, layers)), "packed"),
    }
    measures = {
        label: lambda move=move, name=name: (
            timing.seconds(lambda: move(batches[name])) / float((batches[name]["targets"] != -100).sum())
        )
        for label, (move, name) in moves.items()
    }
    taken = timing.take_turns(measures, options.times(9))
    return padding + throughput("packing", case, taken, BASE, unit="tokens/s", amount=1)


def _documents(count: int, mean: int, context: int) -> list[np.ndarray[Any, Any]]:
    """Random tokens; the mean of a log-normal is exp(mu + sigma² / 2)."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(mean) - 0.5, 1.0, count), 2, context + 1).astype(int)
    return [generator.integers(0, VOCABULARY, length) for length in lengths]


def _packed(documents: list[np.ndarray[Any, Any]], context: int, rows: int) -> Batch:
    batch: Batch = next(iter(lm.Loader(lm.data.Packed(documents, context), rows)))
    return batch


def _padded(documents: list[np.ndarray[Any, Any]], context: int, rows: int) -> Batch:
    """As many rows, of one document each, from all over the set."""
    chosen = sorted(documents, key=len)[len(documents) // (2 * rows) :: len(documents) // rows][:rows]
    tokens, targets = torch.zeros(rows, context, dtype=torch.int64), torch.full((rows, context), -100)
    for row, document in enumerate(chosen):
        tokens[row, : len(document) - 1] = torch.from_numpy(document[:-1])
        targets[row, : len(document) - 1] = torch.from_numpy(document[1:])
    return {"tokens": tokens, "targets": targets, "positions": torch.arange(context).expand(rows, -1)}


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def _raw(net: GPT) -> Callable[[Batch], None]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def move(batch: Batch) -> None:
        optimizer.zero_grad()
        _loss(net(batch["tokens"], batch["positions"], batch.get("documents")), batch).backward()
        optimizer.step()

    return move


def _lumen(net: GPT) -> Callable[[Batch], None]:
    def loss_fn(params: Any, batch: Batch, state: Any) -> Tensor:
        logits, _ = state.apply(params, batch["tokens"], batch["positions"], batch.get("documents"))
        return _loss(logits, batch)

    def step(state: Any, batch: Batch) -> Any:
        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch, state)
        return state.apply_gradients(grads), {"loss": loss}

    fast = lm.compose(lm.donate())(step)
    state = fast.init(lm.TrainState.create(net, lm.optim.adamw(1e-3)))

    def move(batch: Batch) -> None:
        nonlocal state
        state, _ = fast(state, batch)

    return move
