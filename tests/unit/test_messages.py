"""Names in messages: whatever a leaf, a metric or a file is called, its name is written out on one line."""

from __future__ import annotations

import copy
import inspect
import io
import warnings

import pytest
import torch
from torch import nn

import lumen as lm
from lumen import checkpoint, errors
from lumen.bridges import _pretrained
from lumen.cli.main import main
from lumen.core import batching
from lumen.data.fetch import Columns
from lumen.errors import printable
from lumen.optim._param_names import matching
from lumen.parallel.comm import consistency
from lumen.parallel.tensor import layout
from lumen.planner import report_text
from lumen.planner.memory import Moment, Peak
from lumen.sinks.format import numbers
from lumen.train import plateau, progress
from lumen.train.clock import Clock
from lumen.transforms._support import module_patterns

NAME = "a\x1b[31m\nb\x07"
SHOWN = "a\\x1b[31m\\nb\\x07"


class Net(nn.Module):
    """A layer and a buffer with that name."""

    def __init__(self, layer=None):
        super().__init__()
        self.add_module(NAME, layer or nn.Linear(2, 1))
        self.register_buffer(f"{NAME}s", torch.zeros(2))

    def forward(self, x):
        return self._modules[NAME](x)


def state(tx=None):
    return lm.TrainState.create(Net(), tx or lm.optim.sgd(0.1))


def step(state, batch):
    def loss_fn(params, batch):
        return state.apply(params, batch)[0].square().mean()

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {NAME: loss}


def in_place(state, batch):
    state.buffers[f"{NAME}s"].add_(1.0)
    return state, {}


def impure(state, batch):
    return state, {NAME: torch.rand(())}


def twice(state):
    weight = next(iter(state.params.values()))
    return state.replace(buffers={NAME: weight, f"{NAME}s": weight})


def table(path, name):
    """A CSV file that cannot be continued."""
    file = path / "table.csv"
    file.write_text(f'"{name}"\n')
    lm.sinks.CSV(file).log(1, {"loss": 1.0})


REFUSED = {
    "pattern": lambda _: matching("nothing.*", [NAME], "param"),
    "block": lambda _: (_ for _ in ()).throw(module_patterns.unmatched(Net(), "remat")),
    "plan of tensors": lambda _: layout.module_styles(Net(), {"nothing": None}),
    "merge": lambda _: lm.pure(Net(), merge={"nothing": "sum"}),
    "lazy": lambda _: lm.pure(Net(nn.LazyLinear(1))),
    "rows": lambda _: batching.count({NAME: torch.ones(2), "b": torch.ones(3)}),
    "columns": lambda _: Columns({NAME: torch.ones(2), "b": torch.ones(3)}),
    "column": lambda _: Columns({NAME: torch.ones(())}),
    "in place": lambda _: lm.compose()(in_place)(state(), torch.ones(3, 2)),
    "checked": lambda _: lm.check_purity(in_place, state(), torch.ones(3, 2)),
    "impure": lambda _: lm.check_purity(impure, state(), torch.ones(3, 2)),
    "structure": lambda _: lm.compose()(lambda s, b: (s.replace(buffers={}), {}))(state(), torch.ones(3, 2)),
    "donated": lambda _: lm.donate()(step)(twice(state()), torch.ones(3, 2)),
    "plateau": lambda _: plateau.plateau_monitors(state(tx=lm.optim.reduce_on_plateau(monitor="val/loss")), [NAME]),
    "table": lambda path: table(path, NAME),
    "gradients": lambda _: state().apply_gradients({}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors(case, tmp_path):
    with pytest.raises(errors.LumenError) as caught:
        REFUSED[case](tmp_path)
    check(str(caught.value))


def check(text):
    assert SHOWN in text, text
    assert all(c.isprintable() for line in text.split("\n") for c in line), repr(text)


def console():
    file = io.StringIO()
    sink = lm.sinks.Console(file)
    sink.config({NAME: NAME})
    sink.log(1, {NAME: 1.0, "text": lm.sinks.Text(NAME.replace("\n", ""))})
    return file.getvalue().replace("\\x1b[31mb", "\\x1b[31m\\nb")


def lines():
    written = []
    progress.Lines(written.append).show(Clock(), {f"train/{NAME}": 1.0})
    return written[0]


SAID = {
    "inspect": lambda: lm.inspect(step, state(), {NAME: torch.ones(2)}),
    "summary": lambda: str(lm.summary(state())),
    "summary of a tree": lambda: str(lm.summary({NAME: torch.ones(2)})),
    "differences": lambda: "\n".join(lm.tree.differences({NAME: 1, "b": 2}, {"b": 2, f"{NAME}c": 1})),
    "described": lambda: "\n".join(consistency.fingerprint_lines(state())),
    "hub": lambda: "\n".join(_pretrained.lines("missing", [NAME])),
    "numbers": lambda: numbers({NAME: 1.0}),
    "progress": lines,
    "console": console,
    "plan": lambda: report_text._where(Peak(0, Moment("step", "forward", NAME), {}, [])),
}


@pytest.mark.parametrize("case", SAID)
def test_texts(case, capsys):
    check(SAID[case]())


def test_commands(tmp_path, capsys):
    path = tmp_path / "first"
    checkpoint.save(path, {NAME: {NAME: torch.ones(2)}, "c": 3}, meta={NAME: NAME}, extra={NAME: torch.ones(1)})
    for more in ([], ["--verify"], ["--values", f"{NAME}/{NAME}"]):
        assert main(["inspect", str(path), *more]) == 0
        check(capsys.readouterr().out)
    assert main(["inspect", str(path), "--values", "nothing"]) == 1
    check(capsys.readouterr().err)


def test_a_run(tmp_path, capsys):
    data = lm.Loader(torch.ones(8, 2), batch_size=4, seed=0)
    result = lm.Runner(step, log_every=1, progress="lines").fit(state(), data, until=lm.Epochs(1))
    shown = capsys.readouterr().out
    for text in (shown, repr(result), result._repr_html_()):
        check(text)


def test_what_every_exception_says_has_no_control_characters():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if not kind.__name__.startswith("_")]
    assert len(kinds) > 20
    for kind in kinds:
        error = kind("one \x1b[31m\r\n\ttwo \x07\u202e\udc80")
        again = copy.copy(error)
        assert str(error) == str(again) == "one \\x1b[31m\\r\n\ttwo \\x07\\u202e\\udc80"
    with pytest.warns(lm.InexactWarning) as caught:
        warnings.warn("\x1b", lm.InexactWarning, stacklevel=1)
    assert str(caught[0].message) == "\\x1b"


def test_printable_names_stay_as_they_are():
    assert printable("encoder.weight é 漢 \\x1b") == "encoder.weight é 漢 \\x1b"


def test_brackets_are_no_markup(monkeypatch):
    from rich.console import Console

    wide = Console(width=200, file=io.StringIO(), force_terminal=True, color_system=None)
    net = nn.Sequential()
    net.add_module("[red]layer", nn.Linear(2, 1))
    wide.print(lm.summary(lm.TrainState.create(net, lm.optim.sgd(0.1))))
    bar = progress.Bar()
    bar._bar.live.console = wide
    bar.start(2, 0)
    bar.show(Clock(), {"[red]loss": 1.0})
    bar.stop()
    assert "[red]layer" in wide.file.getvalue()
    assert "[red]loss" in wide.file.getvalue()
