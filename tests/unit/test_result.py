"""`Result`: what it says of a run is what the sinks were told, at a prompt and in a notebook."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lumen as lm
from lumen.core.step import as_step
from lumen.train.history import History
from lumen.train.result import panels

STEP = as_step(lambda state, batch: (state, {}))


class Extra(lm.Callback):
    """Logs what is no loss."""

    def on_validate(self, view: Any) -> None:
        view.log({"<b>odd</b>": math.inf, "tensor": torch.ones(2), "note": lm.sinks.Text("text"), "gap": 1.0})


def fit(directory: Path, steps: int = 12, **options: Any) -> lm.Result:
    """A run whose loss is that of a step's number, and jumps to NaN at one of them."""

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        n = state["n"] + 1
        return {"n": n}, {"loss": torch.where(n == 4, torch.nan, (n - 7.0) ** 2)}

    runner = lm.Runner(
        step,
        sinks=[lm.sinks.JSONL(directory / "metrics.jsonl"), lm.sinks.CSV(directory / "metrics.csv"), lm.sinks.Memory()],
        checkpoint=lm.Checkpointer(directory, monitor="val/gap", mode="max"),
        callbacks=[Extra()],
        log_every=1,
        progress=False,
    )
    validate = lm.Validate(lambda state, x: {"accuracy": state["n"] / 10, "gap": -state["n"].float()}, [torch.ones(1)])
    data = [torch.ones(5, 1)] * 3
    return runner.fit({"n": torch.tensor(0)}, data, until=lm.Steps(steps), validate=validate, **options)


def rows(directory: Path) -> dict[str, tuple[list[int], list[float]]]:
    """By name what the JSONL sink wrote."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "time", "epoch", "note") and not name.startswith("tensor"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return found


def test_history_is_what_the_sinks_got(tmp_path: Path) -> None:
    result = fit(tmp_path)
    written = rows(tmp_path)
    assert {*result.history.names} == {*written}, "no tensor is moved to the host, and no text is a curve"
    for name, (steps, values) in written.items():
        found = result.history[name]
        assert found[0] == steps
        assert str(found[1]) == str(values)
    assert result.history.best("train/loss") == (7, 0.0)
    assert result.history.best("val/accuracy") == (12, pytest.approx(1.2))
    assert result.history.best("val/gap") == (3, -3.0), "as the checkpointer was told"
    assert result.history.best("gap") is None
    assert result.history.extremes("train/loss").gaps == 1
    with pytest.raises(KeyError, match="'loss' was not logged; logged were train/loss, "):
        result.history["loss"]


def test_history_of_a_run_that_goes_on_begins_there(tmp_path: Path) -> None:
    fit(tmp_path, 6)
    result = fit(tmp_path, 12, resume="auto")
    assert result.history["train/loss"][0] == [7, 8, 9, 10, 11, 12]
    over = fit(tmp_path, 12, resume="auto")
    assert over.history.names == []
    assert over.metrics == result.metrics
    assert "train/loss" in over._repr_html_()


@given(st.lists(st.floats() | st.integers(-5, 5), min_size=1, max_size=1000))
def test_history_is_bounded_and_keeps_the_extremes(values: list[float]) -> None:
    history = History()
    for step, value in enumerate(values):
        history.add(step, {"loss": value})
    steps, kept = history["loss"]
    assert steps == sorted({*steps})
    assert str(kept) == str([values[step] for step in steps])
    assert min(len(values), 200) <= len(steps) <= 403
    assert steps[-1] == len(values) - 1
    finite = [value for value in values if math.isfinite(value)]
    found = history.extremes("loss")
    assert found.gaps == len(values) - len(finite)
    if not finite:
        assert (found.lowest, found.highest) == (None, None)
    else:
        assert found.lowest == (values.index(min(finite)), min(finite))
        assert found.highest == (values.index(max(finite)), max(finite))
        assert {min(finite), max(finite)} <= {*kept}


def test_history_is_spread_evenly() -> None:
    history = History()
    for step in range(100_000):
        history.add(step, {"a": 0.0})
    steps, _ = history["a"]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert 200 <= len(steps) <= 402
    assert len({*gaps[:-1]}) == 1


def test_repr_is_one_line_without_tensors(tmp_path: Path) -> None:
    text = repr(fit(tmp_path))
    assert re.match(r"Result\(Steps\(12\): step 12, epoch 4, \d+\.\d s; loss 25  val/accuracy 1.2  val/gap -12", text)
    assert "tensor" not in text
    assert "\n" not in text


def test_the_page_shows_the_run_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    result = fit(tmp_path)
    page = result._repr_html_()
    root = ET.fromstring(page)
    text = "".join(root.itertext())
    assert "Steps(12) · 12 steps · 4 epochs" in text
    assert "rows/s" in text
    for name, path in result.files.items():
        assert f"{name}: {path}" in text
        assert path.exists()
    assert [*result.files] == ["checkpoints", "newest checkpoint", "JSONL", "CSV"]
    assert "<b>odd</b>" in text, "escaped"
    assert "<b>odd" not in page
    assert not {"script", "link", "img", "style", "iframe"} & {each.tag.rpartition("}")[2] for each in root.iter()}
    assert page.count("http") == page.count('xmlns="http://www.w3.org/2000/svg"')
    cells = {row[0].text: [cell.text for cell in row] for row in root.iter("tr")}
    assert cells["train/loss"] == ["train/loss", "25", "0", "7", "36", "1", "1 NaN or infinite"]
    assert cells["val/accuracy"][1:] == ["1.2", "0.3", "3", "1.2", "12"]
    bold = [cell.text for row in root.iter("tr") for cell in row if "bold" in cell.attrib.get("style", "")]
    assert bold == ["0", "1.2", "-3"]


def test_the_curves_of_training_and_validation_lie_over_each_other() -> None:
    history = History()
    for step in range(3):
        history.add(step, {"train/loss": 1.0, "val/loss": 2.0, "lr": 0.1, "rows_per_second": 9.0})
    result = lm.Result({}, {}, lm.train.clock.Clock(), "", STEP, history)
    (panel,) = panels(result)
    assert (panel.title, [line.name for line in panel.lines]) == ("loss", ["train", "val"])


def test_a_run_with_very_many_metrics_is_cut(tmp_path: Path) -> None:
    history = History()
    values = {f"train/loss/{i}": float(i) for i in range(500)}
    history.add(1, values)
    result = lm.Result({}, values, lm.train.clock.Clock(), "", STEP, history)
    assert "and 460 more in <code>result.metrics</code>" in result._repr_html_()
    assert len(result._repr_html_()) < 60_000
    assert repr(result).endswith("… 494 more)")


def test_the_best_state_with_its_average_is_one_line_away(tmp_path: Path) -> None:
    def step(state: Any, x: Any) -> tuple[Any, Any]:
        loss, grads = lm.value_and_grad(lambda params, x: state.apply(params, x)[0].square().mean())(state.params, x)
        return state.apply_gradients(grads), {"loss": loss}

    def make_state() -> Any:
        torch.manual_seed(0)
        return lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.adam(0.1))

    scores, averages = iter([3.0, 1.0, 2.0]), []

    def evaluate(state: Any, x: Any) -> dict[str, Any]:
        averages.append({name: p.clone() for name, p in state.params.items()})
        return {"score": next(scores)}

    checkpointer = lm.Checkpointer(tmp_path, monitor="val/score")
    runner = lm.Runner(step, transforms=[lm.ema(0.5), lm.donate()], checkpoint=checkpointer, progress=False)
    validate = lm.Validate(evaluate, [torch.ones(1)], use="ema")
    result = runner.fit(make_state(), [torch.ones(4, 2)] * 2, until=lm.Epochs(3), validate=validate)
    path = checkpointer.best()
    assert path is not None
    for like in (result.state, runner.step.init(make_state())):
        best = lm.checkpoint.restore(path, like)
        assert int(best.step) == 4
        assert all(torch.equal(p, averages[1][name]) for name, p in lm.ema.params(best).items())
    with pytest.raises(lm.LumenError, match=r"the slots of transforms are in result.state, and in runner.step.init"):
        lm.checkpoint.restore(path, make_state())
