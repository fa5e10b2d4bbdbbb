"""`lm.chunked_logits`: a step with lazy logits is the step, whatever a model and its loss do to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lumen as lm
from lumen.errors import HyperparameterError, InexactWarning, LossError, OrderError, PatternError

VOCABULARY = 9


class Model(nn.Module):
    """A language model of one layer; `after` is what it does to the head's output."""

    def __init__(self, after: Any = None, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, VOCABULARY, bias=bias)
        if tied:
            self.lm_head.weight = self.embedding.weight
        self.after = after or (lambda logits: logits)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.after(self.lm_head(self.layer(self.embedding(tokens)).tanh()))


def soft_capped(logits: Tensor) -> Tensor:
    return torch.tanh(logits * 0.7 / 2.0) * 2.0


def flat(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].flatten())


def as_transformers(logits: Tensor, tokens: Tensor) -> Tensor:
    labels = F.pad(tokens, (0, 1), value=-100)[..., 1:].contiguous().view(-1).to(logits.device)
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.view(-1, VOCABULARY), labels, ignore_index=-100, reduction="sum") / 7


def of_tokens(logits: Tensor, tokens: Tensor) -> Any:
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none", label_smoothing=0.1)
    return lm.Mean.of(losses, (tokens[:, 1:] != 2).double())


def masked(logits: Tensor, tokens: Tensor) -> Tensor:
    keep = tokens[:, 1:] != 3
    loss = nn.CrossEntropyLoss(label_smoothing=0.2)(logits[:, :-1][keep], tokens[:, 1:][keep])
    return loss + 0.0 * (logits.argmax(-1) == tokens).sum()


def permuted(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.permute(0, 2, 1), tokens) + F.cross_entropy(logits.mT, tokens, reduction="sum")


def last(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, -1, :], tokens[:, 0]) + F.cross_entropy(logits[..., 0, :], tokens[:, 1])


LOSSES = [flat, as_transformers, of_tokens, masked, permuted, last]


def step_of(loss: Any) -> Any:
    def loss_fn(params: Any, tokens: Tensor, state: Any) -> Any:
        out, _ = state.apply(params, tokens)
        return loss(out, tokens)

    def step(state: Any, tokens: Tensor) -> tuple[Any, Any]:
        loss, grads = lm.value_and_grad(loss_fn)(state.params, tokens, state)
        return state.apply_gradients(grads), {"loss": loss}

    return step


def trained(model: Any, loss: Any, *transforms: Any, rows: int = 6, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    state = lm.TrainState.create(model().to(dtype), lm.optim.sgd(0.5, momentum=0.9))
    wrapped = lm.compose(*transforms)(step_of(loss))
    state, losses = wrapped.init(state), []
    for batch in torch.randint(VOCABULARY, (2, rows, 5), generator=torch.Generator().manual_seed(3)):
        state, metrics = wrapped(state, batch)
        losses.append(lm.compute_metrics(metrics)["loss"])
    exported = wrapped.export(state)
    states = exported if isinstance(exported, list) else [exported]
    return {f"{name}{i}": p for i, each in enumerate(states) for name, p in each.params.items()}, losses


@pytest.mark.parametrize(
    "form",
    [{}, {"bias": True}, {"tied": True}, {"after": soft_capped, "bias": True}],
    ids=["plain", "bias", "tied", "soft-capped"],
)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_losses_of_tokens_are_computed_in_chunks(loss: Any, form: dict[str, Any]) -> None:
    model = lambda: Model(**form)  # noqa: E731
    torch.testing.assert_close(trained(model, loss, lm.chunked_logits(chunk=3)), trained(model, loss))


STACKS: dict[str, list[Any]] = {
    "accumulate": [lm.accumulate(3)],
    "donate": [lm.donate(), lm.accumulate(2)],
    "compile": [lm.compile(backend="eager"), lm.accumulate(2)],
    "remat": [lm.remat("layer")],
    "clip": [lm.guard(), lm.clip(0.1), lm.ema(0.9)],
    "dp_sgd": [lm.dp_sgd(clip=0.5, noise=0.0)],
    "ensemble": [lm.ensemble(2)],
    "sam": [lm.sam(0.1)],
}


@pytest.mark.parametrize("loss", [flat, of_tokens], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stack", STACKS)
def test_under_other_transforms(stack: str, loss: Any) -> None:
    mean = (lambda *args: lm.Mean(loss(*args) * 24, torch.tensor(24.0))) if loss is flat else loss
    wanted = trained(Model, mean, *STACKS[stack])
    torch.testing.assert_close(trained(Model, mean, *STACKS[stack], lm.chunked_logits(chunk=4)), wanted)


@pytest.mark.parametrize("cast", ["autocast", "model"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_in_sixteen_bits_it_is_as_near_to_float32(loss: Any, cast: Any) -> None:
    exact = trained(Model, loss, dtype=torch.float32)[0]
    whole = trained(Model, loss, lm.precision("bf16", cast=cast), dtype=torch.float32)[0]
    found = trained(Model, loss, lm.precision("bf16", cast=cast), lm.chunked_logits(chunk=3), dtype=torch.float32)[0]
    for name, right in exact.items():
        error, other = (found[name] - right).abs().max(), (whole[name] - right).abs().max()
        assert found[name].dtype == whole[name].dtype
        assert error <= 1.5 * other + 0.02, name


WHOLE = {
    "softmax": lambda logits, tokens: -logits[:, :-1].softmax(-1).gather(-1, tokens[:, 1:, None]).log().mean(),
    "other classes": lambda logits, tokens: F.cross_entropy(
        logits[:, :-1, :7].flatten(0, 1), tokens[:, 1:].flatten() % 7
    ),
    "class weights": lambda logits, tokens: F.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), weight=torch.arange(9.0, dtype=logits.dtype)
    ),
    "soft targets": lambda logits, tokens: F.cross_entropy(
        logits.flatten(0, 1), F.one_hot(tokens.flatten(), VOCABULARY).to(logits.dtype)
    ),
    "by a tensor": lambda logits, tokens: flat(logits / torch.tensor(2.0), tokens),
    "in place": lambda logits, tokens: flat(logits.div_(2.0), tokens),
    "an item": lambda logits, tokens: logits.__setitem__((..., 0), -1.0) or flat(logits, tokens),
    "without grad first": lambda logits, tokens: flat(logits, tokens) + torch.no_grad()(logits.softmax)(-1).mean(),
    "no grad, then a loss": lambda logits, tokens: torch.no_grad()(logits.softmax)(-1).mean() + flat(logits, tokens),
}


@pytest.mark.parametrize("loss", WHOLE)
def test_any_other_function_gets_all_logits_with_a_warning(loss: str) -> None:
    with pytest.warns(InexactWarning, match=r"computed all logits at once, \[\d.*9\]"):
        found = trained(Model, WHOLE[loss], lm.chunked_logits())
    torch.testing.assert_close(found, trained(Model, WHOLE[loss]))


def test_logits_that_leave_the_loss_are_real() -> None:
    def loss_fn(params: Any, tokens: Tensor, state: Any) -> Any:
        out, _ = state.apply(params, tokens)
        return flat(out, tokens), {"out": out}

    def step(state: Any, tokens: Tensor) -> tuple[Any, Any]:
        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, tokens, state)
        return state.apply_gradients(grads), {"loss": loss, "top": lm.Mean.of(aux["out"].amax(-1).flatten())}

    tokens = torch.arange(10).view(2, 5) % VOCABULARY
    state = lm.TrainState.create(Model(), lm.optim.sgd(0.5))
    with pytest.warns(InexactWarning, match="all logits"):
        found = lm.compose(lm.donate(), lm.chunked_logits())(step)(state, tokens)[1]["top"].compute()
    state = lm.TrainState.create(Model(), lm.optim.sgd(0.5))
    assert found.shape == step(state, tokens)[1]["top"].compute().shape


def test_no_logits_are_in_memory() -> None:
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                x.numel()
                for x in torch.utils._pytree.tree_leaves(out)
                if isinstance(x, Tensor) and x.device.type != "meta"
            )
            return out

    for transforms, most in (([], 64 * 5 * VOCABULARY), ([lm.chunked_logits(chunk=16)], 64 * 5 * 4)):
        sizes.clear()
        with Sizes():
            trained(Model, as_transformers, *transforms, rows=64)
        assert max(sizes) == most


class Other(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("transform", "head", "said"),
    [
        (lambda: [lm.chunked_logits("hed")], nn.Linear(4, 9), r"chunked_logits\('hed'\) matches no module of Model"),
        (lambda: [lm.chunked_logits()], nn.Sequential(nn.Linear(4, 9)), "an nn.Linear, not Sequential"),
        (lambda: [lm.chunked_logits()], Other(4, 9), "the forward of the head .*, Other, is not that of nn.Linear"),
        (
            lambda: [lm.remat("lm_head"), lm.chunked_logits()],
            nn.Linear(4, 9),
            "another transform or a subclass has replaced it",
        ),
    ],
)
def test_a_head_that_cannot_be_chunked_is_named(transform: Any, head: nn.Module, said: str) -> None:
    def model() -> nn.Module:
        net = Model()
        net.lm_head = head
        return net

    with pytest.raises(PatternError, match=said):
        trained(model, flat, *transform())


def test_what_else_is_refused() -> None:
    with pytest.raises(HyperparameterError, match="chunk=0 is a number of tokens"):
        lm.chunked_logits(chunk=0)
    with pytest.raises(OrderError, match="chunked_logits is outside accumulate"):
        lm.compose(lm.chunked_logits(), lm.accumulate(2))(step_of(flat))
    with pytest.raises(LossError, match="div_ would change logits of which lm.chunked_logits has recorded a slice"):
        trained(Model, lambda logits, tokens: flat(logits, tokens) + logits.div_(2.0).sum(), lm.chunked_logits())
