"""The console: aligned lines, in color where there is a terminal; and numbers as short text."""

import io
import math
import re
import sys

import pytest
import torch

from lumen.sinks import Console, Histogram, Image, Text, configure
from lumen.sinks.format import numbers, short


class Terminal(io.StringIO):
    def isatty(self):
        return True


LOGGED = [
    {"epoch": 0, "train/loss": 2.25, "lr": 1e-3},
    {"epoch": 0, "train/loss": -1.2346e-07, "lr": math.nan},
    {"epoch": 1, "train/loss": math.inf, "lr": 123456.0},
]
LINES = [
    "step      0  epoch      0  train/loss   2.25  lr  0.001",
    "step     50  epoch      0  train/loss -1.235e-07  lr    nan",
    "step    100  epoch      1  train/loss        inf  lr 123456",
]


def test_numbers_stand_under_numbers():
    file = io.StringIO()
    sink = Console(file)
    for i, values in enumerate(LOGGED):
        sink.log(50 * i, values)
    sink.close()
    assert file.getvalue().splitlines() == LINES


def test_a_terminal_gets_colour_and_whole_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Terminal()
    sink = Console(file)
    long = {"a" * 300: 1.0, "[red]": 2.0}
    for step, values in [*((50 * i, values) for i, values in enumerate(LOGGED)), (150, long)]:
        sink.log(step, values)
    assert "\x1b[2m" in file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert plain == [*LINES, f"step    150  {'a' * 300}      1  [red]      2"]


def test_lines_go_above_a_bar(monkeypatch):
    from rich import get_console
    from rich.progress import Progress

    file = Terminal()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr("rich._console", None)  # the shared one remembers the terminal that it was made on
    with Progress(console=get_console(), auto_refresh=False) as bar:
        bar.add_task("fit", total=2)
        bar.refresh()
        Console().log(50, {"loss": 0.5})
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert text.index("fit") < text.index("loss    0.5\n") < text.rindex("fit")


def test_texts_follow_and_the_rest_is_left_out(capsys):
    values = {"loss": 0.5, "t": Text("to be\nor"), "h": Histogram([1, 2]), "i": Image(torch.rand(2, 2))}
    Console().log(1, values)
    assert capsys.readouterr().out == "step      1  loss    0.5\nt: to be\nor\n"


def test_the_configuration_is_one_line():
    file = io.StringIO()
    configure(Console(file), {"model": {"width": 64}, "note": "a\nb", "long": "x" * 500})
    line = file.getvalue()
    assert line.startswith("config  model.width 64  note a b  long xxx")
    assert line.endswith("…\n")
    assert len(line) == 201


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"), (3.0, "3"), (-0.0, "0"), (True, "1"), (999999, "999999"), (1e6, "1e+06"), (0.123456, "0.1235"),
        (1e-12, "1e-12"), (1e308, "1e+308"), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_short(value, text):
    assert short(value) == text


def test_numbers_are_named_without_train():
    assert numbers({"train/loss": 0.25, "val/loss": 1, "t": Text("a")}) == "loss 0.25  val/loss 1"


def test_a_closed_pipe_is_an_error():
    file = io.StringIO()
    sink = Console(file)
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        sink.log(0, {"loss": 1.0})
