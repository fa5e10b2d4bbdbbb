"""W&B, offline: what is logged is in the file that `wandb sync` would send."""

import json
import math
import sys
import time

import pytest
import torch

from lumen.sinks import Histogram, Image, Text, WandB, configure, position
from tests import zygote

pytest.importorskip("wandb")
pytest.importorskip("PIL")

QUIET = {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True, "disable_git": True}


@pytest.fixture(autouse=True)
def no_reports(monkeypatch):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")


@pytest.fixture(scope="module", autouse=True)
def one_service():
    """W&B's process, shared by the tests and ended with them."""
    import wandb

    yield
    wandb.teardown()


@pytest.fixture
def make(tmp_path):
    def make(**arguments):
        return WandB(
            "project", dir=tmp_path / "new", **{"mode": "offline", "id": "abc", "settings": QUIET, **arguments}
        )

    return make


def records(folder):
    """The records of all offline files in order of time, each file complete."""
    deadline = time.monotonic() + 30
    while True:  # `finish` returns before W&B's process has written the last of them
        found = [list(read(path)) for path in sorted(folder.rglob("*.wandb"))]
        if all(file and file[-1].HasField("exit") for file in found):
            return [record for file in found for record in file]
        assert time.monotonic() < deadline, "a file of W&B has no end"
        time.sleep(0.02)


def read(path):
    """The records of a file in LevelDB's log format, whose reader W&B itself no longer has in Python."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):
            return
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def rows(folder):
    found = []
    for record in records(folder):
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found.append({name: value for name, value in items.items() if name not in ("_timestamp", "_runtime")})
    return found


def test_numbers_are_read_back_exactly(tmp_path, make):
    sink = make()
    first = {"train/loss": 0.1, "n": 2**53, "nan": math.nan, "inf": math.inf, "low": -math.inf}
    sink.log(3, first)
    sink.log(10, {"train/loss": torch.tensor(0.25), "f1": [0.5, 1.0]})
    sink.log(10, {"val/loss": 0.5})
    sink.close()
    sink.close()
    found = rows(tmp_path)
    assert found[1:] == [{"_step": 10, "train/loss": 0.25, "f1/0": 0.5, "f1/1": 1.0, "val/loss": 0.5}]
    assert {name: float(value) for name, value in found[0].items() if name != "nan"} == {
        "_step": 3.0,
        **{name: value for name, value in first.items() if name != "nan"},
    }
    assert math.isnan(float(found[0]["nan"]))


def test_a_sink_goes_on_with_its_run_and_its_newest_step(tmp_path, make):
    sink = make(id=None)
    for begin in (0, 2):
        for step in range(begin, begin + 2):
            sink.log(step, {"loss": step / 2})
        sink.close()
    assert [row["loss"] for row in rows(tmp_path)] == [0.0, 0.5, 1.0, 1.5]
    runs = [record.run for record in records(tmp_path) if record.HasField("run")]
    assert [run.run_id for run in runs] == [sink.id] * 2
    assert position(sink) is None


def test_rows_below_the_newest_step_are_passed_over(tmp_path, make):
    sink = make()
    for step in (5, 10, 7, 15):
        sink.log(step, {"loss": step / 2})
    sink.close()
    assert [row["_step"] for row in rows(tmp_path)] == [5, 10, 15]


def test_the_configuration_is_the_runs(tmp_path, make):
    sink = make()
    configure(sink, {"model": {"width": 64, "norm": None}, "betas": (0.9, 0.95)})
    assert not (tmp_path / "new").exists()
    sink.log(0, {"loss": 1.0})
    configure(sink, {"lr": 0.5})
    sink.log(1, {"loss": 1.0})
    sink.close()
    updates = [item for record in records(tmp_path) if record.HasField("config") for item in record.config.update]
    assert {item.key: json.loads(item.value_json) for item in updates} == {
        "model": {"width": 64, "norm": None},
        "betas": [0.9, 0.95],
        "lr": 0.5,
    }


def test_pictures_histograms_and_texts_are_wandbs_own(tmp_path, make):
    image, gray = Image(torch.rand(3, 4, 5)), Image(torch.rand(4, 5))
    sink = make()
    sink.log(0, {"i": image, "g": gray, "h": Histogram([0, 1, 1, 4], bins=2), "t": Text("a < b")})
    sink.close()
    (row,) = rows(tmp_path)
    assert row["h/_type"] == "histogram"
    assert (row["h/bins"], row["h/values"]) == ([0.0, 2.0, 4.0], [3, 1])
    (files,) = tmp_path.rglob("files")
    assert row["t/_type"] == "html-file"
    assert "<pre>a &lt; b</pre>" in (files / row["t/path"]).read_text()
    for name, logged in (("i", image), ("g", gray)):
        assert row[f"{name}/_type"] == "image-file"
        assert (read_png(files / row[f"{name}/path"]) == logged.pixels).all()


def read_png(path):
    import numpy as np
    from PIL import Image as Library

    with Library.open(path) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def test_a_run_of_the_scripts_own_is_not_touched(tmp_path, make):
    import wandb

    own = wandb.init(project="own", dir=tmp_path, id="own", mode="offline", settings=QUIET)
    sink = make()
    sink.log(0, {"loss": 1.0})
    sink.close()
    own.log({"x": 1})
    own.finish()
    assert {record.run.run_id for record in records(tmp_path) if record.HasField("run")} == {"own", "abc"}
    assert sorted(rows(tmp_path), key=lambda row: "x" in row) == [{"_step": 0, "loss": 1.0}, {"_step": 0, "x": 1}]


def test_making_and_closing_begins_no_run(tmp_path, make):
    make().close()
    assert not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_is_an_error(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        WandB("project", dir=tmp_path / "file" / "runs", mode="offline").log(0, {"loss": 1.0})


def test_a_missing_wandb_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[wandb\]'"):
        WandB("project")


def test_a_directory_of_old_runs_is_not_the_library(tmp_path):
    (tmp_path / "wandb").mkdir()
    code = (
        "import sys; from lumen.sinks.extras import require\n"
        "sys.path = [sys.argv[1]] + [p for p in sys.path if 'site-packages' not in p]\n"
        "from importlib.util import find_spec; assert find_spec('wandb').origin is None\n"
        "try: require('wandb', 'WandB')\n"
        "except ImportError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    assert zygote.run([sys.executable, "-c", code, str(tmp_path)], bare=True).returncode == 0


def test_it_loads_on_first_use():
    code = "import sys, lumen.sinks as s; s.WandB('p', mode='offline'); assert 'wandb' not in sys.modules"
    assert zygote.run([sys.executable, "-c", code], bare=True).returncode == 0
