"""What a run shows: a bar in a notebook, both sides of the numbers, and where to go on."""

from __future__ import annotations

import os
import signal
import sys
import types
from typing import Any

import pytest
import torch

import lumen as lm
from lumen.train.clock import Clock
from lumen.train.progress import Bar, NotebookBar, make_progress


class Handle:
    """What IPython's `display` returns: it replaces what a cell shows."""

    shown: Any = None

    def update(self, shown: Any) -> None:
        self.shown = shown._repr_html_(), repr(shown)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """A notebook's cell, without a kernel."""
    handle = Handle()

    def display(shown: Any, display_id: bool) -> Handle:
        handle.update(shown)
        return handle

    display_module = types.ModuleType("IPython.display")
    display_module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display_module)
    return handle


class Interrupt(lm.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, view: lm.CallbackContext) -> None:
        if view.clock.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def step(state: Any, batch: Any) -> Any:
    return {"w": state["w"] + batch}, {"loss": batch * 1.0}


def fit(progress: Any = True, stop: int = 0, **options: Any) -> lm.Result:
    runner = lm.Runner(step, log_every=2, progress=progress, callbacks=[Interrupt(stop)], **options)
    validate = lm.Validate(lambda state, batch: {"loss": state["w"], "<b>": batch}, [torch.tensor(3.0)])
    resume = "auto" if "checkpoint" in options else "never"
    return runner.fit({"w": torch.zeros(())}, range(4), until=lm.Epochs(2), validate=validate, resume=resume)


def test_a_notebook_shows_a_bar_without_widgets_and_keeps_it(cell: Handle) -> None:
    assert isinstance(make_progress(True), NotebookBar)
    fit()
    html, text = cell.shown
    assert '<progress value="8" max="8"' in html
    assert "&lt;b&gt; 3" in html
    assert "<b>" not in html.replace("</b>", "")
    assert text.startswith("epoch 2  step 8/8  0:00  loss 2.5  val/loss 12  val/<b> 3  steps/s ")


def test_the_bar_of_a_terminal_shows_training_and_validation(capsys: Any) -> None:
    bar = Bar()
    bar._bar.console.width = 200
    bar.start(8, 0)
    bar.show(lm.CallbackContext(types.SimpleNamespace(step=4, epoch=0), None).clock, {"train/loss": 0.5, "lr": 0.1})
    bar.show(types.SimpleNamespace(step=4, epoch=1), {"val/loss": 0.75})  # type: ignore[arg-type]
    bar.stop()
    assert "loss 0.5  val/loss 0.75  lr 0.1" in capsys.readouterr().out


def test_a_fast_run_draws_its_bar_rarely_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(Bar, "_draw", lambda bar: drawn.append((bar._clock.step, bar._numbers)))
    monkeypatch.setattr("lumen.train.progress.time", types.SimpleNamespace(monotonic=lambda: 1.0))
    lm.Runner(step, log_every=2, progress="bar").fit({"w": torch.zeros(())}, range(4), until=lm.Epochs(2))
    assert [number for number, _ in drawn] == [1, 8]
    assert drawn[-1][1].startswith("loss 2.5  ")


def test_a_bar_that_is_slow_to_draw_is_drawn_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, now = [], [0.0]

    def draw(bar: Bar) -> None:
        drawn.append(bar._clock.step)
        now[0] += 0.5

    monkeypatch.setattr(Bar, "_draw", draw)
    monkeypatch.setattr("lumen.train.progress.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    bar = Bar()
    for second in range(60):
        now[0] = max(now[0], float(second))
        bar.tick(Clock(step=second))
    assert drawn == [0, 26, 52]  # 25 seconds after the end of each


@pytest.mark.parametrize(("kind", "ticks"), [(False, False), ("lines", False), ("bar", True)])
def test_only_a_bar_is_asked_after_a_step_at_which_nothing_is_due(
    monkeypatch: pytest.MonkeyPatch, kind: Any, ticks: bool
) -> None:
    ticked = set()
    monkeypatch.setattr(type(make_progress(kind)), "tick", lambda _, clock: ticked.add(clock.step))
    until = lm.Steps(8)
    lm.Runner(step, log_every=100, progress=kind).fit({"w": torch.zeros(())}, range(9), until=until)
    assert ticked - {8} == (set(range(1, 8)) if ticks else set())


def test_an_interrupted_run_says_where_it_was_saved_and_a_resumed_one_from_where(tmp_path: Any, capsys: Any) -> None:
    saved = tmp_path / "checkpoints" / "3"
    with pytest.raises(lm.Interrupted):
        fit(progress="lines", stop=3, checkpoint=lm.Checkpointer(tmp_path))
    out, err = capsys.readouterr()
    assert f'SIGINT: stopped after step 3, saved at {saved}. To go on, write fit(..., resume="auto").' in err
    assert "resumed" not in out
    fit(progress="lines", checkpoint=lm.Checkpointer(tmp_path))
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"resumed from {saved}: step 3, epoch 0"
    assert err == ""


def test_an_interrupted_run_in_a_notebook_returns_and_says_that_nothing_was_saved(cell: Handle, capsys: Any) -> None:
    result = fit(stop=3)
    assert (result.reason, result.clock.step) == ("SIGINT", 3)
    assert "SIGINT: stopped after step 3; nothing was saved." in capsys.readouterr().err
    assert '<progress value="3" max="8"' in cell.shown[0]


def test_a_resumed_run_in_a_notebook_says_so(cell: Handle, tmp_path: Any) -> None:
    fit(stop=3, checkpoint=lm.Checkpointer(tmp_path))
    result = fit(checkpoint=lm.Checkpointer(tmp_path))
    assert "step 3, epoch 0</div>" in cell.shown[0]
    assert int(result.state["w"]) == 12


def test_a_range_is_data() -> None:
    """Each batch is a number, of which a compiled step has one program."""
    traced = []

    def counting(state: Any, batch: Any) -> Any:
        traced.append(type(batch))
        return {"w": state["w"] + batch}, {"index": batch}

    for transforms in ([], [lm.unroll(2)], [lm.compile(backend="eager")]):
        traced.clear()
        runner = lm.Runner(counting, transforms=transforms, progress=False, log_every=100)
        result = runner.fit({"w": torch.zeros((), dtype=torch.int64)}, range(2, 7), until=lm.Epochs(3))
        assert (result.clock.step, int(result.state["w"]), result.metrics["train/index"]) == (15, 60, 4.0)
    assert len(traced) == 1
