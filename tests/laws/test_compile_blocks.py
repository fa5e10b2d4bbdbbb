"""`compile(blocks=...)`: the same numbers, each kind of block compiled once, and what cannot be compiled said once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lumen as lm

from .models import assert_same, train

D, T, B = 8, 5, 4


class Block(nn.Module):
    """Attention and a gated layer, with what blocks of real models have: an index, a mask, options, tuples."""

    def __init__(self, index: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.up = nn.Linear(D, 2 * D)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        a, b = self.up(x + scores.softmax(-1) @ v).chunk(2, dim=-1)
        return x + self.drop(a * b.sigmoid()), {"scores": scores, "index": "one"}


class Layers(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(3, D)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(D, 2)
        self.register_buffer("mask", torch.ones(T, T, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(block, Block):
            return block(x)
        x, seen = block(x, mask=self.mask, scale=0.5)
        return x + 0 * seen["scores"].masked_fill(self.mask, 0).sum()


def step(state: Any, batch: Any) -> tuple[Any, Any]:
    def loss_fn(params: Any, batch: Any) -> Any:
        out, buffers = state.apply(params, batch["x"])
        return lm.Mean.of((out - batch["y"]).square().mean((-1, -2))), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads).replace(buffers=aux.buffers), {"loss": loss}


def state_of(*blocks: nn.Module) -> lm.TrainState:
    return lm.TrainState.create(Layers(list(blocks)).double(), lm.optim.adamw(1e-2), seed=0)


def blocks_of(kind: Any, count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind() for _ in range(count)]


def batches(count: int = 3, rows: int = B) -> list[Any]:
    torch.manual_seed(1)
    return [
        {"x": torch.randn(rows, T, 3, dtype=torch.float64), "y": torch.randn(rows, T, 2, dtype=torch.float64)}
        for _ in range(count)
    ]


class Counted(lm.compile):
    """`lm.compile(blocks=...)` that counts what it compiles."""

    def __init__(self, blocks: Any = True, **kwargs: Any) -> None:
        super().__init__(backend="eager", blocks=blocks, **kwargs)
        self.functions: list[Any] = []  # a transform is frozen, its list is not

    def _compile_block(self, function: Any, example: Any) -> Any:
        self.functions.append(function)
        return super()._compile_block(function, example)


def assert_law(state: lm.TrainState, *stack: lm.Transform, kinds: int = 1, around: Any = ()) -> None:
    """The stack with compiled blocks does what it does without, and compiles so many kinds of blocks."""
    compiled = Counted()
    fast, slow = lm.compose(compiled, *stack)(step), lm.compose(*stack)(step)
    torch.manual_seed(2)
    new, metrics = train(fast, fast.init(state), batches())
    torch.manual_seed(2)
    wanted, expected = train(slow, slow.init(state), batches())
    assert_same((fast.export(new), metrics), (slow.export(wanted), expected))
    assert len(compiled.functions) == kinds


STACKS: dict[str, tuple[Any, ...]] = {
    "alone": (),
    "donate": (lm.donate,),
    "accumulate": (lambda: lm.accumulate(2), lm.donate),
    "remat": (lambda: lm.remat("blocks.*"),),
    "bf16": (lambda: lm.precision("bf16"),),
    "clip": (lambda: lm.clip(0.1), lambda: lm.ema(0.9), lm.donate),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_with_compiled_blocks_is_the_stack(name: str) -> None:
    stack = [make() for make in STACKS[name]]
    assert_law(state_of(*blocks_of(Block)), *stack)


def test_compiled_by_inductor() -> None:
    state = state_of(*blocks_of(Block))
    fast = lm.compose(lm.compile(blocks="blocks.*"), lm.donate())(step)
    assert_same(train(fast, fast.init(state), batches()), train(step, state, batches()))


def test_dropout_draws_as_in_eager_mode_without_the_compiler() -> None:
    assert_law(state_of(*blocks_of(lambda: Block(dropout=0.5))))


def test_blocks_that_differ_in_what_they_do_not_use_share_one_form() -> None:
    torch.manual_seed(0)
    assert_law(state_of(*[Block(index) for index in range(4)]), kinds=1)


class Scaled(nn.Module):
    """The same forward for all factors; only what runs backward knows the factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return _Scale.apply(self.layer(x).tanh(), self.factor)  # type: ignore[no-untyped-call, no-any-return]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def test_blocks_with_other_gradients_are_other_kinds() -> None:
    torch.manual_seed(0)
    assert_law(state_of(Scaled(1.0), Scaled(2.0), Scaled(1.0)), kinds=2)


class Normed(nn.Module):
    """A block with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, bias=False)
        self.norm = nn.BatchNorm1d(T)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.layer(x)).tanh()


def test_running_statistics_move_as_they_do_uncompiled() -> None:
    assert_law(state_of(*blocks_of(Normed)))
    assert_law(state_of(*blocks_of(Normed)), lm.remat("blocks.*"))


class Table(nn.Module):
    """A block with a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.table = torch.randn(D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.table.to(x.device)


class Literal(nn.Module):
    """A block that writes out a tensor."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.tensor([self.value], dtype=x.dtype)


def test_tensors_that_the_code_writes_out_are_told_apart() -> None:
    torch.manual_seed(0)
    assert_law(state_of(Literal(1.0), Literal(2.0), Literal(1.0)), kinds=2)


def test_other_shapes_modes_and_arguments_are_compiled_anew() -> None:
    compiled = Counted()
    state = state_of(*blocks_of(Block))

    def both(state: Any, batch: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            judged, _ = state.apply_fn.eval()(state.params, state.buffers, batch["x"])
        state, metrics = step(state, batch)
        return state, {**metrics, "before": judged.sum()}

    fast = lm.compose(compiled)(both)
    assert_same(train(fast, state, batches()), train(both, state, batches()))
    assert len(compiled.functions) == 2  # in training mode, and in evaluation mode without gradients
    assert_same(fast(state, batches(1, rows=3)[0]), both(state, batches(1, rows=3)[0]))
    assert len(compiled.functions) == 4


class Reads(nn.Module):
    """A block that looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else -self.layer(x)


class Rebinds(nn.Module):
    """A block that puts another tensor in the place of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.detach().mean()
        return self.layer(x)


class Options:
    """An argument that is no tensor and no plain value."""


class Takes(nn.Module):
    """A block that is called with such an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor, options: Options | None = None) -> Tensor:
        return self.layer(x) if options is not None else x


class Gives(nn.Module):
    """A block that returns such a thing beside its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Options]:
        return self.layer(x), Options()


class Picks(Layers):
    """Layers that take the first thing that a block returns."""

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)[0]


class Calls(Layers):
    """Layers whose blocks are called with options."""

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x, Options())


def hooked() -> nn.Module:
    block = Scaled(1.0)
    block.layer.register_forward_hook(lambda module, args, out: out * 2)
    return block


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Reads, "Reads runs uncompiled, because it needs the value of a tensor in Python"),
        (Table, "Table runs uncompiled, because it uses a tensor of shape (8,) that is neither an argument nor"),
        (Rebinds, "Rebinds runs uncompiled, because it replaces its buffer 'seen' with"),
        (hooked, "Scaled runs uncompiled, because modules inside it have hooks"),
    ],
)
def test_a_block_that_cannot_be_compiled_says_so_once_and_runs_as_it_is(make: Any, why: str) -> None:
    state = state_of(*blocks_of(make))
    compiled = Counted()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = train(lm.compose(compiled)(step), state, batches())
    said = [str(w.message) for w in seen if issubclass(w.category, lm.errors.GraphBreakWarning)]
    assert len(said) == 1
    assert why in said[0]
    assert_same(found, train(step, state, batches()))
    assert len(compiled.functions) == 0


@pytest.mark.parametrize(
    ("net", "block", "why"), [(Calls, Takes, "it is called with a Options"), (Picks, Gives, "it returns a Options")]
)
def test_what_is_no_tensor_is_named(net: Any, block: Any, why: str) -> None:
    torch.manual_seed(0)
    state = lm.TrainState.create(net([block(), block()]).double(), lm.optim.adamw(1e-2), seed=0)
    with pytest.warns(lm.errors.GraphBreakWarning, match=f"{block.__name__} runs uncompiled, because {why}, which"):
        found = train(lm.compose(Counted())(step), state, batches())
    assert_same(found, train(step, state, batches()))


def test_under_vmap_of_the_users_own_it_says_so() -> None:
    state = state_of(*blocks_of(Block))

    def each(state: Any, batch: Any) -> tuple[Any, Any]:
        outs = torch.vmap(lambda x: state.apply(state.params, x[None])[0][0])(batch["x"])
        return state, {"out": outs.sum()}

    with pytest.warns(lm.errors.GraphBreakWarning, match="a model runs uncompiled, because it was called under vmap"):
        found = lm.compose(Counted())(each)(state, batches(1)[0])
    assert_same(found, each(state, batches(1)[0]))


@pytest.mark.parametrize("inner", [lm.ensemble(2), lm.dp_sgd(1.0, 1.0)])
def test_transforms_that_map_the_model_are_refused(inner: lm.Transform) -> None:
    with pytest.raises(lm.errors.OrderError, match=r"runs the model under vmap, where lm\.compile\(.*blocks=True\)"):
        lm.compose(lm.compile(blocks=True), inner)(step)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(lm.errors.HyperparameterError, match="CUDA graphs need the whole step compiled"):
        lm.compile(mode="reduce-overhead", blocks=True)
    with pytest.raises(lm.errors.PatternError, match=r"compile\(.*blocks='layer\.\*'\) matches no module of Layers"):
        lm.compose(lm.compile(blocks="layer.*"))(step)(state_of(*blocks_of(Block)), batches(1)[0])


def test_a_new_model_is_no_old_one() -> None:
    """The forms of one model do not stand for those of another that the same step is given."""
    compiled = Counted()
    fast = lm.compose(compiled)(step)
    for factor in (1.0, 3.0):
        torch.manual_seed(0)
        state = state_of(Scaled(factor), Scaled(factor))
        assert_same(train(fast, state, batches()), train(step, state, batches()))
    assert len(compiled.functions) == 2


def test_the_loss_of_a_function_is_untouched() -> None:
    """Only modules are compiled: what the loss does with their answer is as it was."""
    state = state_of(*blocks_of(Block))

    def with_values(state: Any, batch: Any) -> tuple[Any, Any]:
        def loss_fn(params: Any, batch: Any) -> Any:
            out, _ = state.apply(params, batch["x"])
            loss = F.mse_loss(out, batch["y"])
            return loss * 2 if loss.item() > 0.5 else loss

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    assert_same(train(lm.compose(Counted())(with_values), state, batches()), train(with_values, state, batches()))
