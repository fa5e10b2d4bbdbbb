"""`lumen plot`: what sinks left is read whatever state it is in, and drawn as it was logged."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

import lumen as lm
from lumen.cli.main import main
from lumen.cli.plot import braille, figures, select
from lumen.cli.plot.read_logs import Row, RunLog, read_run
from lumen.train.curves import Line, Panel, grouped, measures, ticks
from lumen.train.curves_svg import svg
from tests import zygote

Capture = pytest.CaptureFixture[str]
NAN, INF = float("nan"), float("inf")
SINKS = {
    "metrics.jsonl": lm.sinks.JSONL,
    "metrics.csv": lm.sinks.CSV,
    "board": lambda path, time_fn: lm.sinks.TensorBoard(path.parent, time_fn=time_fn),
}


def logged(directory: Path, steps: Any = range(4), kind: str = "metrics.jsonl", scale: float = 1.0) -> Path:
    """A run of two epochs that logs a training loss, and after each epoch a validation's."""
    steps = list(steps)
    clock = iter(range(1000, 2000)).__next__
    sink = SINKS[kind](directory / kind, time_fn=clock)
    for step in steps:
        sink.log(step, {"epoch": step // 2, "train/loss": scale / (step + 1), "lr": 0.5})
        if step % 2:
            sink.log(step, {"epoch": step // 2 + 1, "val/loss": 2 * scale / (step + 1)})
    sink.close()
    return directory


def said(capsys: Capture, *argv: Any) -> tuple[int, str, str]:
    code = main(["plot", *(str(each) for each in argv)])
    return code, *capsys.readouterr()


def data(capsys: Capture, *argv: Any) -> dict[str, Any]:
    code, out, err = said(capsys, *argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", SINKS)
def test_every_sink_gives_the_numbers_that_were_logged(kind: str, tmp_path: Path, capsys: Capture) -> None:
    (run,) = data(capsys, logged(tmp_path / "a", kind=kind))["runs"]
    assert run["name"] == "a"
    assert (run["rows"], run["notes"], [*run["metrics"]]) == (6, [], ["train/loss", "val/loss"])
    assert run["metrics"]["val/loss"] == {"last": 0.5, "lowest": 0.5, "highest": 1.0, "x": [1, 3], "y": [1.0, 0.5]}
    train = run["metrics"]["train/loss"]
    assert train["x"] == [0, 1, 2, 3]
    assert train["y"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=1e-6)


def test_jsonl_comes_before_csv_before_event_files(tmp_path: Path) -> None:
    for kind, scale in (("board", 1.0), ("metrics.csv", 2.0), ("metrics.jsonl", 3.0)):
        logged(tmp_path, kind=kind, scale=scale)
        assert read_run(tmp_path).rows[0].values["train/loss"] == scale
    assert read_run(tmp_path / "metrics.csv").rows[0].values["train/loss"] == 2.0


@pytest.mark.parametrize("kind", SINKS)
def test_a_row_that_is_half_written_is_left_out(kind: str, tmp_path: Path) -> None:
    whole = read_run(logged(tmp_path, kind=kind)).rows
    (file,) = (each for each in tmp_path.iterdir() if each.suffix != ".json")
    content = file.read_bytes()
    for cut in (1, 5):
        file.write_bytes(content[:-cut])
        found = read_run(tmp_path)
        assert found.rows == whole[:-1]
        assert found.notes[0].endswith("is incomplete and was skipped")


def test_damage_is_left_out_and_said(tmp_path: Path, capsys: Capture) -> None:
    logged(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": tru}\n{"step": 1' + "0" * 400 + '}\n{"step": 5, "train/loss": 0.125}\n')
    found = read_run(tmp_path)
    assert found.notes == ["skipped unreadable lines 7, 8"]
    assert found.rows[-1] == Row(5, None, {"train/loss": 0.125})
    (tmp_path / "metrics.csv").write_text("name,size\nx,1\n")
    code, _, err = said(capsys, tmp_path / "metrics.csv")
    assert code == 1
    assert "is not a log of a run: line 2 is not a table with the columns step, time" in err
    events = logged(tmp_path / "b", kind="board")
    (file,) = events.iterdir()
    file.write_bytes(file.read_bytes()[:40] + b"\xff" * 200)
    assert len(read_run(events).notes) == 1


@pytest.mark.parametrize("kind", SINKS)
def test_a_run_that_went_back_shows_each_step_once(kind: str, tmp_path: Path) -> None:
    logged(tmp_path, kind=kind)
    logged(tmp_path, range(2, 6), kind=kind, scale=3.0)
    found = read_run(tmp_path)
    curve = select.curve(found.rows, select.x_positions(found, "step"), "train/loss")
    assert curve[0] == [0, 1, 2, 3, 4, 5]
    assert curve[1] == pytest.approx([1, 1 / 2, 1, 3 / 4, 3 / 5, 1 / 2], rel=1e-6)
    assert found.notes == ["the run restarted at step 2: rows logged twice show the later values"]


def test_a_resumed_board_drops_what_its_mark_says(tmp_path: Path) -> None:
    logged(tmp_path, kind="board")
    sink = lm.sinks.TensorBoard(tmp_path)
    sink.rewind(0)
    sink.log(3, {"train/loss": 9.0})
    sink.close()
    assert [(row.step, row.values.get("train/loss")) for row in read_run(tmp_path).rows] == [(0, 1.0), (3, 9.0)]


def test_other_values_are_no_curves(tmp_path: Path) -> None:
    sink = lm.sinks.JSONL(tmp_path / "metrics.jsonl")
    sink.log(0, {"loss": 1.0, "text": lm.sinks.Text("0.5"), "weights": lm.sinks.Histogram([1.0, 2.0]), "n": [1, 2]})
    sink.close()
    assert read_run(tmp_path).rows[0].values == {"loss": 1.0, "n/0": 1.0, "n/1": 2.0}


# --------------------------------------------------------------------------------------------- choosing


def test_metrics_by_name_by_what_they_measure_and_by_pattern(tmp_path: Path, capsys: Capture) -> None:
    run = logged(tmp_path)

    def names(*wanted: str) -> list[str]:
        return [*data(capsys, run, "--metric", *wanted)["runs"][0]["metrics"]]

    assert names("loss") == ["train/loss", "val/loss"]
    assert names("val/loss") == ["val/loss"]
    assert names("val/*", "lr") == ["val/loss", "lr"]
    code, out, err = said(capsys, run, "--metric", "val/los")
    assert (code, out) == (1, "")
    assert err.startswith(f"lumen plot: {run / 'metrics.jsonl'} has not logged 'val/los'; did you mean val/loss")
    assert "Available: val/loss, " in err
    assert "train/loss" in err


def test_the_horizontal_axis(tmp_path: Path, capsys: Capture) -> None:
    run = logged(tmp_path)

    def at(x: str) -> list[float]:
        return data(capsys, run, "--metric", "train/loss", "--x", x)["runs"][0]["metrics"]["train/loss"]["x"]

    assert at("step") == [0, 1, 2, 3]
    assert at("seconds") == [0, 1, 3, 4]
    assert at("epoch") == [0.0, 1.0, 1.5, 2.0]
    sink = lm.sinks.JSONL(tmp_path / "b" / "plain.jsonl", time_fn=lambda: NAN)
    sink.log(3, {"loss": 1.0})
    sink.close()
    assert "has no epochs" in said(capsys, tmp_path / "b", "--x", "epoch")[2]
    assert "has no times" in said(capsys, tmp_path / "b", "--x", "seconds")[2]


def test_smoothing_keeps_gaps_and_what_was_logged(tmp_path: Path, capsys: Capture) -> None:
    assert select.smooth_curve([1.0, 3.0, INF, 2.0], 0.0) == [1.0, 3.0, INF, 2.0]
    assert select.smooth_curve([5.0] * 4, 0.9) == pytest.approx([5.0] * 4)
    found = data(capsys, logged(tmp_path), "--metric", "val/loss", "--smooth", "0.5")["runs"][0]["metrics"]["val/loss"]
    assert found["y"] == [1.0, 0.5]
    assert found["smoothed"] == pytest.approx([1.0, 2 / 3])
    code, _, err = said(capsys, tmp_path, "--smooth", "1")
    assert (code, err) == (1, "lumen plot: --smooth must be at least 0 and below 1, got 1: --smooth 0.9.\n")


def test_runs_are_called_by_what_differs(tmp_path: Path) -> None:
    def names(*paths: str, configs: Any = None) -> list[str]:
        configs = configs or [{}] * len(paths)
        return select.run_names(
            [RunLog(tmp_path / p, config={"config": c}) for p, c in zip(paths, configs, strict=True)]
        )

    assert names("a/metrics.jsonl") == ["a"]
    assert names("a/b.csv") == ["b.csv"]
    assert names("a/metrics.jsonl", "b/metrics.jsonl") == ["a", "b"]
    assert names("x/a/log/m.csv", "x/b/log/m.csv", "x/b/log/n.csv") == ["a/log/m.csv", "b/log/m.csv", "b/log/n.csv"]
    assert names("a", "a/b") == ["a", "b"]
    lrs = [{"lr": 0.1, "seed": 0, "logdir": "x/a"}, {"lr": 0.2, "seed": 0, "logdir": "x/b"}]
    assert names("a/m.csv", "b/m.csv", configs=lrs) == ["a (lr 0.1)", "b (lr 0.2)"]


def test_what_belongs_together_is_what_measures_the_same() -> None:
    names = ["train/loss", "train/aux/loss", "val/aux/loss", "quick/loss", "lr"]
    assert grouped(names) == {
        "loss": [("train/loss", "train"), ("quick/loss", "quick")],
        "aux/loss": [("train/aux/loss", "train"), ("val/aux/loss", "val")],
        "lr": [("lr", "")],
    }
    assert measures(names) == names[:-1]
    assert measures(["loss", "lr", "epoch", "rows_per_second"]) == ["loss"]


def test_of_many_points_those_are_drawn_that_are_seen() -> None:
    heights = [math.sin(i / 7) for i in range(50_000)]
    heights[31_234] = 5.0
    (drawn,) = points(Panel("x", [Line("", range(50_000), heights)]))
    assert len(drawn) < 2_000
    assert min(y for _, y in drawn) == points(Panel("x", [Line("", [0, 1], [-1.0, 5.0])]))[0][1][1]


# ---------------------------------------------------------------------------------------------- drawing


def test_the_terminal_shows_curves_numbers_and_gaps(tmp_path: Path, capsys: Capture) -> None:
    run = logged(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": "NaN"}\n{"step": 5, "train/loss": 0.125, "val/odd\\u001b": 1}\n')
    code, out, err = said(capsys, run)
    assert code == 0
    assert re.search(r"^loss\n +1 │", out, re.MULTILINE)
    assert "· train  o val" in out
    assert "loss train" in out
    assert "0.125 at 5" in out
    assert "\x1b" not in out
    assert err == "note: loss (train): 1 of 6 are NaN or infinite, the first at step 4\n"


def test_several_runs_with_different_metrics_one_of_them_empty(tmp_path: Path, capsys: Capture) -> None:
    runs = [logged(tmp_path / "a"), logged(tmp_path / "b", [0]), tmp_path / "c"]
    runs[2].mkdir()
    (runs[2] / "metrics.jsonl").touch()
    code, out, err = said(capsys, *runs)
    assert code == 0
    assert "· a train  o a val  x b train" in out
    assert err == "note: b: val/loss not logged\nnote: c: nothing has been logged yet\n"
    code, _, err = said(capsys, runs[2])
    assert (code, err) == (1, "lumen plot: no number has been logged.\n")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "html"])
def test_files(kind: str, tmp_path: Path, capsys: Capture) -> None:
    runs = [logged(tmp_path / "a"), logged(tmp_path / "$b_$<")]
    file = tmp_path / "new" / f"curves.{kind}"
    code, out, _ = said(capsys, *runs, "--smooth", "0.5", "--log", "-o", file)
    assert (code, out) == (0, f"{file}: loss\n")
    content = file.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype"}[kind])
    if kind in ("svg", "html"):
        assert "$b_$&lt; val" in content.decode()
        assert "<script" not in content.decode()
        assert "src=" not in content.decode()
    said(capsys, *runs, "--smooth", "0.5", "--log", "-o", file)
    assert file.read_bytes() == content, "the same curves are the same file"


def test_files_that_cannot_be_written(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    run = logged(tmp_path)
    assert "use curves.png, .svg, .pdf or .html" in said(capsys, run, "-o", tmp_path / "curves.gif")[2]
    assert "cannot be written: " in said(capsys, run, "-o", tmp_path / "metrics.jsonl" / "a.html")[2]
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[examples]' in the clone of Lumen" in said(capsys, run, "-o", tmp_path / "curves.png")[2]
    assert said(capsys, run, "-o", tmp_path / "curves.html")[0] == 0


def test_paths_that_hold_no_run(tmp_path: Path, capsys: Capture) -> None:
    logged(tmp_path / "first")
    assert "Did you mean first?" in said(capsys, tmp_path / "frist")[2]
    assert f"There are some in {tmp_path / 'first'}." in said(capsys, tmp_path)[2]
    (tmp_path / "none").mkdir()
    assert 'sinks=[lm.sinks.JSONL("runs/a/metrics.jsonl")]' in said(capsys, tmp_path / "none")[2]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "none" / name).touch()
    assert "contains several log files; pass one of them: " in said(capsys, tmp_path / "none")[2]


def points(panel: Panel) -> list[list[tuple[float, float]]]:
    """The curves of an SVG, and its lone points."""
    root = ET.fromstring(svg(panel))
    name = "{http://www.w3.org/2000/svg}"
    lines = [each.attrib["points"].split() for each in root.iter(f"{name}polyline")]
    found = [[tuple(map(float, point.split(","))) for point in line] for line in lines]
    return found + [[(float(e.attrib["cx"]), float(e.attrib["cy"]))] for e in root.iter(f"{name}circle")]


def test_svg_keeps_gaps_and_proportions() -> None:
    panel = Panel("a & b", [Line("<x>", [0, 1, 2, 3, 4, 5], [0.0, 1.0, 2.0, NAN, 4.0, INF])])
    line, lone = points(panel)
    assert len(line) == 3
    assert line[2][0] - line[1][0] == pytest.approx(line[1][0] - line[0][0])
    assert line[0][1] - line[1][1] == pytest.approx((line[0][1] - lone[0][1]) / 4, abs=0.11)
    (curve,) = points(Panel("log", [Line("x", [0, 1, 2, 3], [1.0, 10.0, 100.0, -1.0])], log=True))
    assert curve[0][1] - curve[1][1] == pytest.approx(curve[1][1] - curve[2][1])


@pytest.mark.parametrize(
    "values", [[], [NAN], [1.0], [0.0, 0.0], [-1e308, 1e308], [5e-324, 1e-323], [1e-323, 1.5e-323], [1.7e308, 1.7e308]]
)
@pytest.mark.parametrize("log", [False, True])
def test_any_numbers_can_be_drawn(values: list[float], log: bool) -> None:
    panel = Panel("x", [Line("x", list(range(len(values))), values)], log)
    drawn = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    assert sum(map(len, points(panel))) == len(drawn)
    rows = list(braille.render_panel(panel, 60, 5, color=True))
    assert any("no finite number" in row for row in rows) == (not drawn)
    assert ticks(0.0, 5e-324) == []


def test_colours_only_where_they_are_seen() -> None:
    panel = Panel("x", [Line("a", [0, 1], [0.0, 1.0]), Line("b", [0, 1], [1.0, 0.0])])
    assert "\x1b[34m━\x1b[0m a" in "\n".join(braille.render_panel(panel, 60, 5, color=True))
    plain = "\n".join(braille.render_panel(panel, 60, 5, color=False))
    assert "\x1b" not in plain
    assert "· a  o b" in plain
    assert max(map(len, plain.split("\n"))) <= 60


def test_plotting_loads_only_what_it_needs(tmp_path: Path) -> None:
    logged(tmp_path)
    unwanted = {"jax", "orbax", "rich", "wandb", "mlflow", "matplotlib", "tensorboardX", "IPython"}
    program = (
        f"import sys; from lumen.cli.main import main; code = main(['plot', {str(tmp_path)!r}]);"
        f"sys.exit(code or ','.join({unwanted} & set(sys.modules)) or None)"
    )
    done = zygote.run([sys.executable, "-c", program], bare=True)
    assert (done.returncode, done.stderr) == (0, "")
