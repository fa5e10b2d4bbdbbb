"""The model, the step and the raw loop of the checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lumen as lm
from benchmarks.gpu.check import Setting
from benchmarks.tasks import GPT, Batch, loss_of

VOCABULARY, TOKENS, WIDTH = 64, 16, 32


class Dropped(nn.Sequential):
    """An MLP with dropout, over [rows, 16]."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, VOCABULARY))


def gpt(setting: Setting, **sizes: int) -> nn.Module:
    """A GPT on the device, the same each time; a tiny one by default."""
    torch.manual_seed(0)
    sizes = {"vocab": VOCABULARY, "tokens": TOKENS, "width": WIDTH, "heads": 2, "layers": setting.pick(2, 1), **sizes}
    return GPT(**sizes).to(setting.device)


def texts(setting: Setting, count: int, rows: int = 8, vocab: int = VOCABULARY, tokens: int = TOKENS) -> list[Batch]:
    """Batches of random tokens and the tokens that follow them: each [rows, tokens]."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, vocab, (rows, tokens + 1), generator=generator) for _ in range(count)]
    return [
        (text[:, :-1].contiguous().to(setting.device), text[:, 1:].contiguous().to(setting.device)) for text in drawn
    ]


def step(state: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
    """The training step of a model that gives logits."""

    def loss_fn(params: Any, batch: Batch) -> Tensor:
        logits, _ = state.apply(params, batch[0])
        return loss_of(logits.float(), batch[1])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def state_of(net: nn.Module, tx: Any = None) -> lm.TrainState:
    """A fresh state; an `eps` that keeps gradients which are rounding noise from moving a param by the rate."""
    return lm.TrainState.create(net, tx or lm.optim.adamw(1e-3, eps=1e-4))


def trained(fast: Callable[..., Any], state: Any, batches: Sequence[Any]) -> tuple[Any, Tensor]:
    """The exported state after all batches, and their losses [steps]."""
    state, losses = fast.init(state) if hasattr(fast, "init") else state, []
    for batch in batches:
        state, metrics = fast(state, batch)
        losses.append(metrics["loss"].detach().clone())
    return fast.export(state) if hasattr(fast, "export") else state, torch.stack(losses)


def compared(
    setting: Setting, *transforms: lm.Transform, steps: int = 4, **sizes: int
) -> tuple[tuple[Any, Tensor], tuple[Any, Tensor]]:
    """The state and the losses of the tiny GPT under `transforms`, and without them."""
    batches = texts(setting, steps)
    found = trained(lm.compose(*transforms)(step), state_of(gpt(setting, **sizes)), batches)
    return found, trained(step, state_of(gpt(setting, **sizes)), batches)


def deterministic() -> None:
    """Have torch choose kernels that give the same bits each time, which laws of equal bits are about."""
    torch.use_deterministic_algorithms(True, warn_only=True)
