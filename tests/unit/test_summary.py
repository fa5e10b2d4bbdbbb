"""summary: its counts are those of the module, its bytes those of the state, and it changes nothing."""

import io
import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import lumen as lm
from lumen.core.flops import flops_of
from lumen.errors import HyperparameterError, StepError
from lumen.train.summary import human_flops, summary


class Block(nn.Module):
    """A frozen embedding, a parameter of its own, a tied matrix and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.embed.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(3))
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner[0].weight
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool), persistent=False)

    def forward(self, x):
        return self.norm(self.tied(self.inner[0](x))) * self.scale.sum()


def state_of(net, tx=None):
    return lm.TrainState.create(net, tx or lm.optim.adamw(1e-3))


def step(state, batch):
    def loss_fn(params, batch):
        out, buffers = state.apply(params, batch)
        return (out**2).mean(), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def by_name(found):
    return {row.name: row for row in found.rows}


def test_counts_are_the_modules_own():
    net = Block()
    found = summary(state_of(net), depth=2)
    assert found.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert found.frozen == 20
    assert found.buffers == sum(b.numel() for b in net.buffers())
    parts = by_name(found)
    assert list(parts) == ["", "embed", "inner", "inner.0", "inner.1", "inner.2", "norm", "tied"]
    assert [parts["inner"].trainable, parts["inner.0"].trainable, parts["inner.1"].trainable] == [40, 20, 0]
    assert (parts["embed"].frozen, parts["embed"].trainable) == (20, 0)
    assert parts["tied"].trainable == 0  # counted where it stands first
    assert (parts["norm"].trainable, parts["norm"].buffers) == (8, 9)
    assert parts["inner"].dtypes == ("float32", "float64")
    assert parts["inner"].nbytes == 20 * 4 + 20 * 8


@pytest.mark.parametrize(
    ("depth", "names"),
    [(0, [""]), (1, ["", "0", "1"]), (2, ["", "0", "0.0", "0.1", "1"]), (9, ["", "0", "0.0", "0.1", "1"])],
)
def test_depth(depth, names):
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
    assert list(by_name(summary(state_of(net), depth=depth))) == names


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 3))
def test_children_add_up_to_the_whole(widths, depth):
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b)) for a, b in itertools.pairwise(widths)]
    found = summary(state_of(nn.Sequential(*layers)), depth=depth)
    for field in ("trainable", "buffers", "elements", "nbytes"):
        for level in range(1, min(depth, 2) + 1):
            at = [getattr(part, field) for part in found.rows if part.depth == level]
            assert sum(at) == getattr(found.rows[0], field)


@pytest.mark.parametrize("tx", [lm.optim.sgd(0.1), lm.optim.adamw(1e-3), lm.optim.adafactor(1e-3)])
def test_bytes_are_the_states(tx):
    ema = lm.ema(0.9)
    state = ema.init(state_of(nn.Linear(7, 3), tx))
    sizes = summary(state).nbytes
    assert sum(sizes.values()) == lm.tree.nbytes(state)
    assert sizes["params"] == 4 * 24
    assert sizes["slots"] >= 4 * 24
    assert sizes["opt_state"] == lm.tree.nbytes(state.opt_state)


def test_any_pytree():
    state = {"gen": {"w": torch.ones(3), "n": torch.ones((), dtype=torch.int64)}, "disc": [torch.ones(2, 2)]}
    found = summary(state, depth=2)
    assert [(part.name, part.elements) for part in found.rows] == [
        ("", 8), ("gen", 4), ("gen.w", 3), ("gen.n", 1), ("disc", 4), ("disc.0", 4)
    ]  # fmt: skip
    assert found.nbytes == {"gen": 20, "disc": 16}
    assert str(found).splitlines()[0].split() == ["name", "elements", "bytes", "dtypes"]
    assert summary(torch.ones(3)).rows[0].elements == 3
    assert "0 B" in str(summary({}))


def test_the_state_of_a_users_own_class():
    @lm.dataclass
    class Players:
        a: lm.TrainState
        b: torch.Tensor
        name: str = lm.static(default="x")

    found = summary(Players(state_of(nn.Linear(2, 2)), torch.ones(4)))
    assert [part.name for part in found.rows] == ["", "a", "b"]
    assert set(found.nbytes) == {"a", "b"}


def test_flops_of_the_step_are_part_of_it():
    state, batch = state_of(nn.Linear(100, 100)), torch.ones(50, 100)
    found = summary(lm.accumulate(2)(step), state, batch)
    assert found.flops == flops_of(step, state, batch) == 4 * 50 * 100 * 100
    assert str(found).endswith("one step: 2.0 MFLOP")
    assert summary(state).flops is None
    assert "one step" not in str(summary(state))


def test_it_says_why_flops_are_unknown():
    def reads(state, batch):
        return state, {"loss": float(batch.sum())}

    found = summary(reads, state_of(nn.Linear(2, 2)), torch.ones(2, 2))
    assert found.flops is None
    assert "unknown; the step reads a tensor's value" in str(found)


def test_nothing_is_changed():
    state, batch = state_of(Block()), torch.randn(6, 4)
    before, generator = lm.tree.map(torch.clone, state), torch.get_rng_state()
    summary(step, state, batch, depth=3).show()
    assert torch.equal(torch.get_rng_state(), generator)
    assert lm.tree.structure(before) == lm.tree.structure(state)
    assert all(torch.equal(a, b) for a, b in zip(lm.tree.leaves(before), lm.tree.leaves(state), strict=True))
    step(state, batch)


def test_plain_text_where_there_is_no_terminal_and_a_table_where_there_is(capsys, monkeypatch):
    found = summary(state_of(nn.Linear(2, 2)))
    found.show()
    assert capsys.readouterr().out == f"{found}\n"
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    found.show()
    assert "┃ trainable ┃" in terminal.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")


def test_rich_shows_what_the_text_says():
    found = summary(step, state_of(Block()), torch.ones(2, 4), depth=2)
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(found)
    shown = console.file.getvalue()
    for line in str(found).splitlines():
        for word in line.split("  "):
            assert word.strip() in shown


def test_what_is_refused():
    state = state_of(nn.Linear(2, 2))
    with pytest.raises(HyperparameterError, match="depth=-1"):
        summary(state, depth=-1)
    with pytest.raises(StepError, match=r"summary\(step, state, batch\)"):
        summary(step, state)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (1000, "1.0 kFLOP"), (2.5e12, "2.5 TFLOP"), (4e18, "4000.0 PFLOP")],
)
def test_units(count, text):
    assert human_flops(count) == text
