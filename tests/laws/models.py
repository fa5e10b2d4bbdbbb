"""What the laws are tried on: small jobs of every kind, and how two outcomes are compared.

A `Job` is a model, a form of batch, a kind of loss and an optimizer, in float64; `jobs()` generates them.

B: rows, D: features, C: classes, T: tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import lumen as lm

D, C, T, WORDS = 4, 3, 4, 7


class Attention(nn.Module):
    """One causal head without biases: a key's bias has no gradient but rounding noise."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / D**0.5
        hidden = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x.device)).logical_not()
        return self.head((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).mean(-2))


class Tied(nn.Module):
    """A bag of words whose input embedding is its output matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, D)
        self.out = nn.Linear(D, WORDS, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).mean(-2).tanh())


def _mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), *middle, nn.Linear(8, C))


def _conv() -> nn.Module:
    # No bias in front of BatchNorm: its gradient is rounding noise.
    return nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, C))


@dataclass(frozen=True)
class Kind:
    """A sort of model: how to make it, one input of B rows for it, and what it needs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor] = lambda rows: torch.randn(rows, D, dtype=torch.float64)
    mixes_rows: bool = False
    draws: bool = False


def _images(rows: int) -> Tensor:
    return torch.randn(rows, 1, 4, 4, dtype=torch.float64)


MODELS = {
    "linear": Kind(lambda: nn.Linear(D, C)),
    "mlp": Kind(_mlp),
    "conv_bn_train": Kind(_conv, _images, mixes_rows=True),
    "conv_bn_eval": Kind(lambda: _conv().eval(), _images),
    "attention": Kind(Attention, lambda rows: torch.randn(rows, T, D, dtype=torch.float64)),
    "tied": Kind(Tied, lambda rows: torch.randint(0, WORDS, (rows, T))),
    "dropout": Kind(lambda: _mlp(nn.Dropout(0.5)), draws=True),
}
# Their answer is a function of params and one row: the law holds for them without further words.
PLAIN = tuple(name for name, kind in MODELS.items() if not kind.mixes_rows and not kind.draws)
STEADY = tuple(name for name, kind in MODELS.items() if not kind.draws)

FORMS: dict[str, tuple[Callable[..., Any], Callable[[Any], tuple[Tensor, Tensor, Tensor]]]] = {
    "tuple": (lambda x, y, mask: (x, y, mask), lambda b: b),
    "dict": (lambda x, y, mask: {"y": y, "x": x, "mask": mask}, lambda b: (b["x"], b["y"], b["mask"])),
    "nested": (
        lambda x, y, mask: {"in": {"x": x}, "rest": [y, (mask,)]},
        lambda b: (b["in"]["x"], b["rest"][0], b["rest"][1][0]),
    ),
}

LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scalar": lambda losses, mask: losses.mean(),
    "mean": lambda losses, mask: lm.Mean.of(losses),
    "masked": lambda losses, mask: lm.Mean.of(losses, mask),
}

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: lm.optim.sgd(0.1, momentum=0.9),
    "adamw": lambda: lm.optim.adamw(1e-2),
}


@dataclass(frozen=True)
class Job:
    """One thing to train, named by its parts so that a failing example can be read."""

    model: str = "mlp"
    form: str = "dict"
    loss: str = "mean"
    optimizer: str = "adamw"
    rows: int = 5
    seed: int = 0

    @property
    def kind(self) -> Kind:
        """The sort of model."""
        return MODELS[self.model]

    def module(self) -> nn.Module:
        """The module, the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.kind.make().double()

    def state(self) -> lm.TrainState:
        """A fresh state, the same each time."""
        return lm.TrainState.create(self.module(), OPTIMIZERS[self.optimizer](), seed=self.seed)

    def batch(self, number: int = 0, rows: int | None = None) -> Any:
        """The batch with this number, the same each time."""
        rows = self.rows if rows is None else rows
        with torch.random.fork_rng():
            torch.manual_seed(1000 * self.seed + number + 1)
            mask = torch.rand(rows) < 0.6
            mask[0] = True
            return FORMS[self.form][0](self.kind.inputs(rows), torch.randint(0, C, (rows,)), mask)

    def batches(self, count: int) -> list[Any]:
        """Batches of equal size."""
        return [self.batch(i) for i in range(count)]

    def loss_fn(self, state: Any) -> Callable[..., Any]:
        """The loss as `value_and_grad(has_aux=True)` takes it."""
        unpack, reduce = FORMS[self.form][1], LOSSES[self.loss]

        def loss_fn(params: Any, batch: Any) -> Any:
            x, y, mask = unpack(batch)
            out, buffers = state.apply(params, x)
            losses = F.cross_entropy(out, y, reduction="none")
            metrics = {"accuracy": lm.Mean.of(out.argmax(-1) == y), "rows": lm.Sum.of(torch.ones_like(y))}
            return reduce(losses, mask), lm.Aux(buffers=buffers, metrics=metrics)

        return loss_fn

    @property
    def step(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The training step, as a user would write it."""

        def step(state: Any, batch: Any) -> tuple[Any, Any]:
            (loss, aux), grads = lm.value_and_grad(self.loss_fn(state), has_aux=True)(state.params, batch)
            return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss, **aux.metrics}

        return step


def jobs(
    models: Sequence[str] = PLAIN,
    losses: Sequence[str] = tuple(LOSSES),
    rows: tuple[int, int] = (1, 7),
) -> st.SearchStrategy[Job]:
    """Jobs with models, losses and row counts from these."""
    return st.builds(
        Job,
        model=st.sampled_from(models),
        form=st.sampled_from(tuple(FORMS)),
        loss=st.sampled_from(losses),
        optimizer=st.sampled_from(tuple(OPTIMIZERS)),
        rows=st.integers(*rows),
        seed=st.integers(0, 99),
    )


def some_jobs(seed: int, count: int, suits: Callable[[Job], bool]) -> list[Job]:
    """As many jobs as asked for, each field drawn at random; another seed gives others."""
    generator = random.Random(seed)
    drawn = (
        Job(
            model=generator.choice(STEADY),
            form=generator.choice(tuple(FORMS)),
            loss=generator.choice(tuple(LOSSES)),
            optimizer=generator.choice(tuple(OPTIMIZERS)),
            rows=generator.randint(1, 7),
            seed=generator.randint(0, 99),
        )
        for _ in itertools.count()
    )
    return list(itertools.islice(filter(suits, drawn), count))


def train(step: Callable[..., Any], state: Any, batches: Sequence[Any]) -> tuple[Any, dict[str, Tensor]]:
    """The state after all batches, and the merged metrics as numbers."""
    metrics = []
    for batch in batches:
        state, metric = step(state, batch)
        metrics.append(metric)
    return state, lm.compute_metrics(lm.merge_metrics(metrics))


def learned(state: lm.TrainState) -> dict[str, Any]:
    """What training has changed."""
    return {
        "step": state.step,
        "params": state.params,
        "buffers": state.buffers,
        "opt_state": state.opt_state,
    }


def differences(found: Any, expected: Any, *, exact: bool, tolerance: float = 1e-10) -> list[str]:
    """Which leaves differ, and by how much: bit for bit, or by more than `tolerance`.

    Two states are compared by what they have learned.
    """
    found, expected = _learned(found), _learned(expected)
    assert lm.tree.structure(found) == lm.tree.structure(expected), lm.tree.differences(expected, found)
    lines = []
    for (path, a), (_, b) in zip(lm.tree.named_tensors(found), lm.tree.named_tensors(expected), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{path}: {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")
        elif exact or not a.is_floating_point():
            if not torch.equal(a, b):
                lines.append(f"{path}: not bitwise equal, off by {(a.double() - b.double()).abs().max():.2e}")
        elif not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
            lines.append(f"{path}: off by {(a - b).abs().max():.2e}")
    return lines


def _learned(values: Any) -> Any:
    def is_state(node: Any) -> bool:
        return isinstance(node, lm.TrainState)

    return lm.tree.map(lambda x: learned(x) if is_state(x) else x, values, is_leaf=is_state)


def assert_same(found: Any, expected: Any, *, exact: bool = False, tolerance: float = 1e-10) -> None:
    """Fail, naming the leaves, unless both trees hold the same numbers."""
    assert not differences(found, expected, exact=exact, tolerance=tolerance)
