"""`linear_cross_entropy` equals the cross-entropy of whole logits: values, gradients, under every transform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lumen as lm
from lumen.errors import LossError

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"z_loss": 0.1},
    {"soft_cap": 2.0},
    {"label_smoothing": 0.3, "z_loss": 0.05, "soft_cap": 1.5},
]


def tensors(tokens: int, features: int = 4, vocabulary: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight, bias, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((tokens, features), (vocabulary, features), (vocabulary,), (tokens,))
    )
    return [hidden, weight, bias, weights.abs()]


def classes(tokens: int, vocabulary: int = 7) -> Tensor:
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(1 + tokens))
    return targets.masked_fill(torch.arange(tokens) % 3 == 2, -100)


def torch_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    weights: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if soft_cap:
        logits = soft_cap * (logits / soft_cap).tanh()
    losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1).square() * (targets >= 0)
    return (losses * weights).sum()


def chunked_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, weights: Tensor, targets: Tensor, chunk: int = 2, **options: Any
) -> Tensor:
    mean = lm.losses.linear_cross_entropy(hidden, weight, targets, weights, bias=bias, chunk=chunk, **options)
    return mean.total


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(tokens=st.integers(0, 7), chunk=st.integers(1, 9))
def test_it_is_the_cross_entropy_of_whole_logits(options: dict[str, Any], tokens: int, chunk: int) -> None:
    inputs, targets = tensors(tokens), classes(tokens)
    found, found_grads = torch.func.grad_and_value(chunked_loss, (0, 1, 2, 3))(*inputs, targets, chunk, **options)[::-1]
    wanted, wanted_grads = torch.func.grad_and_value(torch_loss, (0, 1, 2, 3))(*inputs, targets, **options)[::-1]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_grads, wanted_grads)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_higher_derivatives_are_those_of_whole_logits(options: dict[str, Any]) -> None:
    inputs, targets = tensors(4), classes(4)

    def slopes(loss: Any) -> Any:
        def first(hidden: Tensor, weight: Tensor) -> Tensor:
            bias, weights = inputs[2:]
            return loss(hidden, weight, bias, weights, targets, **options)

        def squares(hidden: Tensor, weight: Tensor) -> Tensor:
            return sum(g.square().sum() for g in torch.func.grad(first, (0, 1))(hidden, weight))

        twice = torch.func.jacrev(torch.func.jacrev(first, (0, 1)), (0, 1))(*inputs[:2])
        return twice, torch.func.jacrev(torch.func.grad(squares, 1))(*inputs[:2])

    torch.testing.assert_close(slopes(chunked_loss), slopes(torch_loss))


def test_a_penalty_on_gradients_taken_by_autograd() -> None:
    def penalty(loss: Any) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in tensors(5)]
        grads = torch.autograd.grad(loss(*inputs, classes(5)).square(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    torch.testing.assert_close(penalty(chunked_loss), penalty(torch_loss))


def test_lanes_of_gradients_and_gradients_of_lanes() -> None:
    hidden, weight, bias, weights = tensors(6)
    lanes = torch.stack([weight, weight + 1, weight * 2])
    targets = classes(6)

    def each(loss: Any) -> Any:
        def one(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
            return loss(hidden, weight, bias, weights[: len(hidden)], targets)

        over_weights = torch.vmap(torch.func.grad(one, (0, 1)), (0, None, None))(lanes, hidden, targets)
        over_rows = torch.vmap(torch.func.grad(one), (None, 0, 0))(weight, hidden[:, None], targets[:, None])
        total = torch.func.grad(lambda w: torch.vmap(one, (0, None, None))(w, hidden, targets).square().sum())(lanes)
        seen = lanes.clone().requires_grad_()
        torch.vmap(one, (0, None, None))(seen, hidden, targets).sum().backward()
        return over_weights, over_rows, total, seen.grad

    torch.testing.assert_close(each(chunked_loss), each(torch_loss))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_exact_as_whole_logits(dtype: torch.dtype) -> None:
    exact = torch.func.grad(torch_loss, (0, 1))(*tensors(40, 8, 30), classes(40, 30))
    inputs = tensors(40, 8, 30, dtype)
    inputs[3] = inputs[3].float()
    found = torch.func.grad(chunked_loss, (0, 1))(*inputs, classes(40, 30), 16)
    whole = torch.func.grad(torch_loss, (0, 1))(*inputs, classes(40, 30))
    for one, other, right in zip(found, whole, exact, strict=True):
        assert one.dtype == dtype
        assert (one - right).abs().max() <= 1.5 * (other - right).abs().max() + 2e-3


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
def test_it_is_that_of_torch() -> None:
    hidden, weight, bias, _ = tensors(7)
    found = lm.losses.linear_cross_entropy(hidden, weight, classes(7), bias=bias, label_smoothing=0.1).compute()
    wanted = F.linear_cross_entropy(hidden, weight, classes(7), linear_bias=bias, label_smoothing=0.1)
    torch.testing.assert_close(found, wanted)


class Model(nn.Module):
    """An embedding with a layer and a head that may share the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.embedding(tokens)).tanh()


def step(kind: str) -> Any:
    def loss_fn(params: Any, tokens: Tensor, state: Any) -> lm.Mean:
        (hidden, _), targets = state.apply(params, tokens[:, :-1]), tokens[:, 1:]
        weight = params["embedding.weight" if "head.weight" not in params else "head.weight"]
        targets = targets.masked_fill(targets == 0, -100)
        if kind == "chunked":
            return lm.losses.linear_cross_entropy(hidden, weight, targets, chunk=3)
        losses = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), targets.flatten(), reduction="none")
        return lm.Mean(losses.sum(), (targets >= 0).sum())

    def train(state: Any, tokens: Tensor) -> tuple[Any, Any]:
        loss, grads = lm.value_and_grad(loss_fn)(state.params, tokens, state)
        return state.apply_gradients(grads), {"loss": loss}

    return train


STACKS: dict[str, list[Any]] = {
    "plain": [],
    "accumulate": [lm.accumulate(3)],
    "donate": [lm.donate(), lm.accumulate(2)],
    "compile": [lm.compile(backend="eager"), lm.accumulate(2)],
    "remat": [lm.remat("layer")],
    "clip": [lm.clip(0.1), lm.ema(0.9)],
    "dp_sgd": [lm.dp_sgd(clip=0.5, noise=0.0)],
    "ensemble": [lm.ensemble(2)],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stack", STACKS)
def test_steps_are_those_with_whole_logits(stack: str, tied: bool) -> None:
    tokens = torch.randint(9, (2, 6, 5), generator=torch.Generator().manual_seed(3))

    def trained(kind: str) -> Any:
        torch.manual_seed(0)
        state = lm.TrainState.create(Model(tied), lm.optim.sgd(0.5, momentum=0.9))
        wrapped = lm.compose(*STACKS[stack])(step(kind))
        state, losses = wrapped.init(state), []
        for batch in tokens:
            state, metrics = wrapped(state, batch)
            losses.append(lm.compute_metrics(metrics)["loss"])
        return [x.clone() for x in lm.tree.leaves(wrapped.export(state)) if isinstance(x, Tensor)], losses

    torch.testing.assert_close(trained("chunked"), trained("whole"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": torch.zeros(7, 5)}, r"hidden \[3, 4\] and weight \[7, 5\] do not fit"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, r"targets \[2\] do not fit hidden \[3, 4\]"),
        ({"targets": torch.zeros(3)}, "indices of classes, integers, not torch.float32"),
        ({"weights": torch.ones(2)}, r"weights of shape \[2\] do not broadcast"),
        ({"bias": torch.ones(3)}, r"\[7\], not \[3\]"),
        ({"hidden": [1.0]}, "hidden as a tensor, not a list"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"soft_cap": 0.0}, "soft_cap=0.0"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], said: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(LossError, match=said):
        lm.losses.linear_cross_entropy(**{**arguments, **change})
