"""`lm.remat` with `save=`: the law for every policy, and that what is kept is not computed again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lumen as lm
from lumen import errors
from lumen.core.flop_formulas import formulas

from .models import MODELS, Job, assert_same, jobs, train
from .table import STEPS

aten = torch.ops.aten
WIDTH, TOKENS, ROWS = 8, 6, 3


class Block(nn.Module):
    """Attention and two layers, with dropout in between, and operations that write to what others have returned."""

    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + F.dropout(self.out(attended), self.dropout)
        hidden = F.dropout(F.relu(self.up(x).mul_(2.0), inplace=True), self.dropout)
        return x + self.down(hidden) * (1.0 if scale is None else scale)


class Net(nn.Module):
    """Some blocks between two layers."""

    def __init__(self, dropout: float = 0.25, depth: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=x.detach().mean())
        return self.head(x)


def step(state: lm.TrainState, batch: Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
    def loss_fn(params: Any, batch: Tensor) -> Any:
        return lm.Mean.of(state.apply(params, batch)[0].square().sum((-1, -2)))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def state_of(net: nn.Module | None = None) -> lm.TrainState:
    torch.manual_seed(0)
    return lm.TrainState.create((net or Net()).double(), lm.optim.adamw(1e-2))


def batch_of(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, TOKENS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(*stack: lm.Transform, state: lm.TrainState | None = None) -> tuple[Any, Any]:
    wrapped = lm.compose(*stack)(step)
    state = state or state_of()
    if any(transform.name == "precision" for transform in stack):
        state = lm.tree.map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, state)
    batch = batch_of().to(lm.tree.leaves(state.params)[0].dtype)
    state = wrapped.init(state)
    torch.manual_seed(5)
    new, metrics = train(wrapped, state, [batch] * STEPS)
    return wrapped.export(new), metrics


POLICIES: dict[str, Any] = {
    "matmuls": "matmuls",
    "attention": "attention",
    "packets": [aten.addmm, aten.native_layer_norm],
    "overload": (aten.addmm.default,),
    "everything": lambda operator: True,
    "all but matmuls": lambda operator: operator is not aten.addmm.default,
    "draws": lambda operator: torch.Tag.nondeterministic_seeded in operator.tags,
}


@pytest.mark.parametrize("name", POLICIES)
def test_training_is_bitwise_the_same(name: str) -> None:
    assert_same(trained(lm.remat(save=POLICIES[name])), trained(), exact=True)


@settings(max_examples=20)
@given(job=jobs(tuple(name for name in MODELS if name != "linear")), chosen=st.sets(st.integers(0, 9), min_size=1))
def test_any_choice_of_operations_changes_nothing(job: Job, chosen: set[int]) -> None:
    """Operations are numbered as they are met; each model runs operation 0."""
    numbers: dict[Any, int] = {}
    transform = lm.remat(
        lambda name, module: not list(module.children()),
        save=lambda operator: numbers.setdefault(operator, len(numbers)) in {0, *chosen},
    )
    torch.manual_seed(3)
    expected = train(job.step, job.state(), job.batches(STEPS))
    torch.manual_seed(3)
    assert_same(train(transform(job.step), job.state(), job.batches(STEPS)), expected, exact=True)


STACKS: dict[str, tuple[Any, ...]] = {
    "accumulate": (lambda: lm.accumulate(3),),
    "accumulate, donate": (lambda: lm.accumulate(microbatch=2), lm.donate),
    "guard, clip, ema": (lm.guard, lambda: lm.clip(0.1), lambda: lm.ema(0.9)),
    "bf16": (lambda: lm.precision("bf16"),),
    "fp16": (lambda: lm.precision("fp16"),),
    "sam": (lambda: lm.sam(0.05),),
    "seeded": (lm.seeded,),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_with_it_is_the_stack_without(name: str) -> None:
    around = [make() for make in STACKS[name]]
    assert_same(trained(*around, lm.remat(save="matmuls")), trained(*around), exact=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no rule for attention under vmap
def test_under_ensemble_it_changes_nothing() -> None:
    state = state_of(Net(dropout=0.0))
    found, _ = trained(lm.ensemble(2), lm.remat(save="matmuls"), state=state)
    expected, _ = trained(lm.ensemble(2), state=state)
    assert_same(found, expected, exact=True)


def test_frozen_params_and_adapters() -> None:
    net = lm.bridges.lora.adapt(Net(), targets=["*qkv", "*up"], rank=2)
    assert_same(
        trained(lm.remat(save="matmuls"), state=state_of(net)),
        trained(state=state_of(net)),
        exact=True,
    )


def flops(*stack: lm.Transform) -> int:
    """Floating-point operations of a step's products and attentions."""
    wrapped, state = lm.compose(*stack)(step), state_of(Net(dropout=0.0, depth=1))
    wrapped(state, batch_of())  # a compiled step is traced
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        wrapped(state, batch_of())
    return counter.get_total_flops()


@pytest.mark.parametrize("around", [[], [lm.compile(backend="eager")]], ids=["eager", "compiled"])
def test_what_is_kept_is_not_computed_again(around: list[lm.Transform]) -> None:
    plain, everything = flops(*around), flops(*around, lm.remat())
    assert flops(*around, lm.remat(save="matmuls")) == plain
    assert plain < flops(*around, lm.remat(save="attention")) < everything


@pytest.mark.parametrize("name", ["matmuls", "attention", "everything"])
def test_compiled(name: str) -> None:
    compiled, state = lm.compile(backend="eager"), state_of(Net(depth=1))
    found = trained(compiled, lm.remat(save=POLICIES[name]), state=state)
    assert_same(found, trained(compiled, state=state), exact=True)


def kept_bytes(*stack: lm.Transform) -> int:
    """Bytes that the graph of a loss keeps, inputs and params left out."""
    peaks = lm.plan(
        lm.compose(*stack)(step), lambda: state_of(Net(0.0, depth=3)), batch_of(64), world_size=1, device="cpu"
    ).peak.by_category
    return peaks["activations"]


def test_a_plan_counts_what_is_kept() -> None:
    plain, selected, everything = kept_bytes(), kept_bytes(lm.remat(save="matmuls")), kept_bytes(lm.remat())
    block = 64 * TOKENS * WIDTH * 8  # bytes of a block's input
    # Kept of each block: queries, keys and values, the attention with its sums, and three products, one twice as wide.
    assert 2 * 8 * block <= selected - everything <= 3 * 8.5 * block
    assert everything < selected < plain


class Drawing(nn.Module):
    """Multiplies by drawn numbers, then drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return F.dropout(F.dropout(x * torch.bernoulli(torch.full_like(x, 0.5)), 0.5) ** 2, 0.5)


def test_draws_behind_a_kept_draw_are_repeated() -> None:
    """The recomputation skips the first draw, and must not give the next one its numbers."""

    def along(state: lm.TrainState, batch: Tensor) -> tuple[lm.TrainState, dict[str, Tensor]]:
        loss, grads = lm.value_and_grad(lambda params, batch: state.apply(params, batch)[0].sum())(state.params, batch)
        return state, {"loss": loss, "slope": (grads["0.layer.weight"] * state.params["0.layer.weight"]).sum()}

    state = state_of(nn.Sequential(Drawing()))
    _, found = lm.remat(save=[aten.bernoulli])(along)(state, torch.randn(64, WIDTH, dtype=torch.float64))
    torch.testing.assert_close(found["slope"], 2 * found["loss"])  # the loss is quadratic in params


def test_a_loss_that_goes_back_twice() -> None:
    """A gradient penalty recomputes the blocks for its own gradient, and for that of the loss."""

    def penalized(state: lm.TrainState, batch: Tensor) -> tuple[lm.TrainState, dict[str, Any]]:
        def loss_fn(params: Any, batch: Tensor) -> Tensor:
            x = batch.requires_grad_()
            out = state.apply(params, x)[0].square().mean()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            return out + slope.square().sum()

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    class Smooth(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x).mul_(2.0))

    state = state_of(nn.Sequential(Smooth(4, 4), Smooth(4, 4)))
    found = lm.remat(save=[aten.addmm, aten.tanh])(penalized)(state, batch_of())
    assert_same(found, penalized(state, batch_of()), exact=True)


def test_a_kept_result_that_is_written_to_outside_of_its_block() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.seen = out.square()  # needs `out` again, so that it is recomputed
            return out

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Twice(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            out = self.blocks[0](x)
            return out.mul_(3.0) + self.blocks[0].seen

    with pytest.raises(errors.StepError, match="changed it in place afterwards.*inplace=False"):
        lm.remat(save="matmuls")(step)(state_of(Outside()), batch_of())


@pytest.mark.parametrize("save", [[], (), "products", ["mm"], [aten.mm, None], aten.mm, aten.mm.default])
def test_a_policy_that_names_no_operation(save: Any) -> None:
    with pytest.raises(errors.HyperparameterError, match=r"remat\(save=.*Write save="):
        lm.remat(save=save)


@pytest.mark.parametrize("save", [[aten.convolution], lambda operator: False])
def test_a_policy_without_an_operation_of_the_model(save: Any) -> None:
    state = state_of()
    with pytest.raises(errors.PatternError, match=r"names none of the operations that its modules ran: .*addmm"):
        lm.remat(save=save)(step)(state, batch_of())


def test_compiled_blocks_hide_their_operations() -> None:
    with pytest.raises(errors.OrderError, match="cannot see the operations of blocks"):
        lm.compose(lm.compile(blocks=True), lm.remat(save="matmuls"))(step)


def test_settings_are_compared_and_shown() -> None:
    assert lm.remat(save=[aten.mm]) == lm.remat(save=[aten.mm]) != lm.remat(save=[aten.bmm])
    assert repr(lm.remat("blocks.*", save="matmuls")) == "lm.remat('blocks.*', save='matmuls')"
    assert len({lm.remat(save=name) for name, _ in itertools.product(("matmuls", "attention"), range(2))}) == 2
