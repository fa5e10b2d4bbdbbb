"""A GPT with a vocabulary of 50,257: peak memory and time of a step whose logits are never whole.

Beside a raw loop with fused AdamW and `cross_entropy` of all logits: torch's own `linear_cross_entropy`, chunks of
tokens that a raw loop recomputes in its backward pass, and Lumen with the model and the loss unchanged. Memory is the
maximum that torch's allocator handed out, in a fresh process for each variant; times are of interleaved steps. Expected
of `chunked_logits`: at most 0.35 of the raw loop's memory at 1.10 of its time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lumen as lm
from benchmarks import peak, tasks, timing
from benchmarks.apart import ApartError, apart
from benchmarks.options import Options
from benchmarks.rows import Row, timed

VOCAB, WIDTH, LAYERS, TOKENS, TEXTS = 50_257, 256, 4, 512, 4
QUICK = (5_000, 32, 1, 32, 2)
CASE, BASE, CHUNK = "GPT, 50,257 classes", "raw loop", 256
Move = Callable[[Any], None]
Sizes = tuple[int, int, int, int, int]


class Headless(tasks.GPT):
    """The same GPT whose forward may stop before the head."""

    def hidden(self, x: Tensor) -> Tensor:
        """What the head reads, `[texts, tokens, width]`."""
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def measure(options: Options) -> list[Row]:
    """Memory of each variant, then times."""
    os.environ.update(peak.ENVIRONMENT)
    sizes = options.pick((VOCAB, WIDTH, LAYERS, TOKENS, TEXTS), QUICK)
    labels = [*options.chosen(STARTS, BASE)]
    rows, base = [], None
    for label in labels:
        try:
            value = apart(held, label, sizes, options.threads) / 1e6
        except ApartError as error:
            rows.append(Row("vocabulary", CASE, label, "allocated", "MB", note=str(error)))
            continue
        base = base or value
        rows.append(Row("vocabulary", CASE, label, "allocated", "MB", value, value / base))
    batch = _batch(sizes)
    moves = {row.variant: STARTS[row.variant](sizes) for row in rows if row.value is not None}
    measures = {label: lambda move=move: timing.seconds(lambda: move(batch)) for label, move in moves.items()}
    return rows + timed("vocabulary", CASE, timing.take_turns(measures, options.times(9)), BASE, unit="ms")


def held(label: str, sizes: Sizes, threads: int) -> int:
    """The peak of one variant, in this process."""
    timing.prepare(threads)
    return peak.allocated(lambda: STARTS[label](sizes), _batch(sizes))


def _batch(sizes: Sizes) -> tuple[Tensor, Tensor]:
    texts = torch.randint(0, sizes[0], (sizes[4], sizes[3] + 1), generator=torch.Generator().manual_seed(0))
    return texts[:, :-1].contiguous(), texts[:, 1:].contiguous()


def _net(sizes: Sizes) -> Headless:
    torch.manual_seed(0)
    vocab, width, layers, tokens, _ = sizes
    return Headless(vocab, tokens, width, layers=layers)


def _raw(loss_of: Callable[[Headless, Tensor, Tensor], Tensor]) -> Callable[[Sizes], Move]:
    def start(sizes: Sizes) -> Move:
        net = _net(sizes)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

        def move(batch: Any) -> None:
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            optimizer.step()

        return move

    return start


def _whole(net: Headless, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())


def _of_torch(net: Headless, x: Tensor, y: Tensor) -> Tensor:
    hidden = net.hidden(x).flatten(0, 1)
    loss: Tensor = F.linear_cross_entropy(hidden, net.head.weight, y.flatten(), linear_bias=net.head.bias)  # type: ignore[attr-defined]
    return loss


def _recomputed(net: Headless, x: Tensor, y: Tensor) -> Tensor:
    def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(net.head(hidden), targets, reduction="sum")

    hidden, targets = net.hidden(x).flatten(0, 1), y.flatten()
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return sum(checkpoint(of_chunk, *part, use_reentrant=False) for part in parts) / len(targets)  # type: ignore[return-value]


def _lumen(*transforms: lm.Transform) -> Callable[[Sizes], Move]:
    def loss_fn(params: Any, batch: Any, state: Any) -> Tensor:
        out, _ = state.apply(params, batch[0])
        return F.cross_entropy(out.flatten(0, 1), batch[1].flatten())

    def step(state: Any, batch: Any) -> Any:
        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch, state)
        return state.apply_gradients(grads), {"loss": loss}

    def start(sizes: Sizes) -> Move:
        fast = lm.compose(*transforms)(step)
        state = fast.init(lm.TrainState.create(_net(sizes), lm.optim.adamw(1e-3)))

        def move(batch: Any) -> None:
            nonlocal state
            state, _ = fast(state, batch)

        return move

    return start


STARTS: dict[str, Callable[[Sizes], Move]] = {
    BASE: _raw(_whole),
    "raw loop, torch's linear_cross_entropy": _raw(_of_torch),
    "raw loop, recomputed chunks": _raw(_recomputed),
    "Lumen: donate": _lumen(lm.donate()),
    "Lumen: donate, chunked_logits": _lumen(lm.donate(), lm.chunked_logits()),
}
