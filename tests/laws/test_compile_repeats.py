"""A recorded graph cut at its repeated layers: the same bits, each kind of part compiled once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lumen as lm
from lumen.core import _torch_compat
from lumen.transforms._support import compiled_graph, tandem_repeats
from lumen.transforms._support.compiled_graph import cacheable
from lumen.transforms._support.graph_segments import compile_segments

from .models import train

N = 4


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut also what is too short to be worth it."""
    monkeypatch.setattr(tandem_repeats, "MIN_SAVED", 4)
    monkeypatch.setattr(tandem_repeats, "MIN_COUNT", 2)


class Program:
    """A value `x` that operations change, what they keep for later, and the inputs that they read and write."""

    def __init__(self, x: Tensor, inputs: list[Tensor]) -> None:
        self.x, self.inputs, self.kept = x, inputs, [x]

    def write_through_view(self, _: int) -> None:
        self.x = self.x.clone(memory_format=torch.contiguous_format)
        self.x.view(2, 8)[0].mul_(0.5)

    def write(self, _: int) -> None:
        self.x = self.x.tanh()
        self.kept.append(self.x)
        self.x.add_(0.25)

    def write_input(self, layer: int) -> None:
        self.inputs[layer].mul_(0.9)

    def copy_into_input(self, layer: int) -> None:
        self.inputs[layer].copy_(self.x.t())

    def swap(self, layer: int) -> None:
        first, second = self.inputs[layer], self.inputs[layer - 1]
        before = first.clone()
        first.copy_(second)
        second.copy_(before)

    def use_kept(self, layer: int) -> None:
        self.x = (self.x * self.kept[layer % len(self.kept)]).sin()

    def constant(self, layer: int) -> None:
        self.x = self.x + torch.tensor([float(layer % 2)] * N, dtype=torch.float64)

    def tuple_result(self, _: int) -> None:
        values, order = self.x.sort()
        self.x = values + order.flip(0)


OPERATIONS: dict[str, Callable[[Program, int], None]] = {
    "matmul": lambda p, layer: setattr(p, "x", (p.x @ p.inputs[layer]).tanh()),
    "add": lambda p, layer: setattr(p, "x", p.x + p.inputs[layer].view(-1).view(N, N)),
    "transpose": lambda p, layer: setattr(p, "x", p.x.t()),
    "reshape": lambda p, layer: setattr(p, "x", p.x.reshape(2, 8).reshape(8, 2).reshape(N, N)),
    "chunk": lambda p, layer: setattr(p, "x", torch.cat(p.x.chunk(2)[::-1])),
    "unbind": lambda p, layer: setattr(p, "x", torch.stack(p.x.unbind(1))),
    "random": lambda p, layer: setattr(p, "x", p.x * torch.rand_like(p.x)),
    "keep": lambda p, layer: p.kept.append(p.x.t()),
    "write_through_view": Program.write_through_view,
    "write": Program.write,
    "write_input": Program.write_input,
    "copy_into_input": Program.copy_into_input,
    "swap": Program.swap,
    "use_kept": Program.use_kept,
    "constant": Program.constant,
    "tuple_result": Program.tuple_result,
}


def compared(function: Callable[..., Any], example: list[Tensor]) -> int | None:
    """Run a function's graph whole and in parts, which must give the same bits, and count its kinds of parts."""
    kinds: list[Any] = []

    def compile_fn(part: Any, _: Any) -> Any:
        kinds.append(part)
        return part

    graph = _torch_compat.record(function, example)
    parts = compile_segments(graph, compile_fn)
    if parts is None:
        return None
    results = []
    for run in (lambda inputs: graph(*inputs), parts):
        inputs = [t.clone() for t in example]
        torch.manual_seed(1)
        results.append([*run(inputs), *inputs])
    for whole, cut in zip(*results, strict=True):
        assert torch.equal(whole, cut)
        assert whole.stride() == cut.stride()
    return len(kinds)


names = st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=7)


@settings(max_examples=30)
@given(layer=names, last=names, layers=st.integers(3, 6))
def test_a_graph_in_parts_is_the_graph(layer: list[str], last: list[str], layers: int) -> None:
    torch.manual_seed(0)
    example = [torch.randn(N, N, dtype=torch.float64) for _ in range(layers)]

    def function(*inputs: Tensor) -> list[Tensor]:
        program = Program(inputs[0].sin(), list(inputs))
        for index in range(layers):
            for name in layer:
                OPERATIONS[name](program, index)
        for name in last:
            OPERATIONS[name](program, 0)
        return [program.x, *program.kept[1:]]

    compared(function, example)


def layered(inputs: tuple[Tensor, ...], *, constants: bool = False) -> Tensor:
    """One layer for each input but the first, with a matrix product, and a write into the layer's input."""
    x = inputs[0].sin()
    for index, weight in enumerate(inputs[1:]):
        x = (x @ weight).tanh() * (index if constants else 2)
        weight.copy_(weight * 0.5)
    return x


def example(count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(N, N, dtype=torch.float64) for _ in range(count)]


def test_equal_layers_are_one_kind_of_part() -> None:
    shallow, deep = (compared(lambda *inputs: [layered(inputs)], example(1 + layers)) for layers in (6, 12))
    assert shallow == deep
    assert shallow is not None
    assert shallow <= 3  # a layer, and what comes before and after
    assert compared(lambda *inputs: [layered(inputs, constants=True)], example(7)) is None, "no two are alike"


def test_parts_compiled_by_inductor() -> None:
    graph = _torch_compat.record(lambda *inputs: [layered(inputs)], example(7))
    kinds = []

    def compile_fn(part: Any, inputs: list[Any]) -> Any:
        kinds.append(part)
        return _torch_compat.inductor_compile(part, cacheable(inputs), options={"size_asserts": False})

    with torch.no_grad():
        parts = compile_segments(graph, compile_fn)
        assert parts is not None
        whole, cut = (
            [*run(inputs), *inputs] for run, inputs in ((lambda i: graph(*i), example(7)), (parts, example(7)))
        )
    torch.testing.assert_close(cut, whole)


def test_memory_that_two_parts_would_write_to_stays_in_one_graph() -> None:
    def function(*inputs: Tensor) -> list[Tensor]:
        total = torch.zeros(N, N, dtype=torch.float64)
        for tensor in inputs:
            total[0].add_(tensor.sin().cos().tanh()[0])
        return [total]

    assert compared(function, example(8)) is None


def test_a_value_is_freed_once_it_was_read_for_the_last_time() -> None:
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def compile_fn(part: Any, _: Any) -> Any:
        def run(*inputs: Tensor) -> Any:
            alive.append(sum(ref() is not None for ref in made))
            outputs = part(*inputs)
            made.extend(map(weakref.ref, outputs))
            return outputs

        return run

    graph = _torch_compat.record(lambda *inputs: [layered(inputs)], example(9))
    parts = compile_segments(graph, compile_fn)
    assert parts is not None
    parts(example(9))
    assert max(alive) <= 2


class Layer(nn.Module):
    """What layers have that makes cutting hard: dropout, a shared mask, a running mean, tensors written in the code."""

    def __init__(self, has_batch_norm: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(N), nn.Linear(N, 2 * N, bias=False), nn.Linear(2 * N, N)
        self.batch_norm = nn.BatchNorm1d(2 * N) if has_batch_norm else nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(N, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x + self.drop(self.down(self.batch_norm(self.up(self.norm(x))).tanh())) * torch.tensor(
            0.5, dtype=x.dtype
        )


def step(state: Any, batch: Tensor) -> tuple[Any, Any]:
    def loss_fn(params: Any, batch: Tensor) -> Any:
        out, buffers = state.apply(params, batch)
        return out.square().mean(), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads).replace(buffers=aux.buffers), {"loss": loss}


@pytest.mark.parametrize(
    ("has_batch_norm", "stack"),
    [
        (True, ()),
        (False, (lm.guard("skip"), lm.clip(0.1), lm.ema(0.9), lm.donate(), lm.accumulate(2), lm.remat("*"))),
    ],
    ids=str,
)
def test_a_step_in_parts_is_the_step(
    has_batch_norm: bool, stack: tuple[lm.Transform, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[bool] = []
    compile_parts = compiled_graph.compile_segments
    torch.manual_seed(0)
    module = nn.Sequential(*[Layer(has_batch_norm) for _ in range(3)]).double()
    batches = [torch.randn(4, N, dtype=torch.float64) for _ in range(2)]

    def run(compile_fn: Any) -> Any:
        monkeypatch.setattr(compiled_graph, "compile_segments", compile_fn)
        fast = lm.compose(lm.compile(backend="eager"), *stack)(step)
        state = fast.init(lm.TrainState.create(module, lm.optim.sgd(1e-2, momentum=0.9), seed=0))
        torch.manual_seed(2)
        new, metrics = train(fast, state, batches)
        return lm.tree.leaves((fast.export(new), metrics))

    def spied(*args: Any) -> Any:
        parts = compile_parts(*args)
        cut.append(parts is not None)
        return parts

    whole, parts = run(lambda *_: None), run(spied)
    assert all(cut)
    assert cut
    assert all(map(torch.equal, whole, parts))
