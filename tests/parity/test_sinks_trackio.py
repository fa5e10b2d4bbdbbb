"""Trackio, on this machine: what is logged is in its database."""

import importlib.util
import json
import math
import sqlite3
import sys

import numpy as np
import pytest
import torch

from lumen.errors import SinkError
from lumen.sinks import Histogram, Image, Text, Trackio, configure, position

if importlib.util.find_spec("trackio") is None:  # it is imported below, with a directory of the tests' own
    pytest.skip("could not import 'trackio'", allow_module_level=True)
PIL = pytest.importorskip("PIL.Image")

QUIET = {"auto_log_cpu": False, "auto_log_gpu": False}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        import trackio

        yield trackio.utils.TRACKIO_DIR  # which it reads once


@pytest.fixture
def project(request):
    return request.node.name.replace("_", "-")


def read(folder, project, query):
    with sqlite3.connect(folder / f"{project}.db") as database:
        return database.execute(query).fetchall()


def rows(folder, project, run):
    found = read(folder, project, f"SELECT step, metrics FROM metrics WHERE run_name = '{run}' ORDER BY id")
    return [(step, json.loads(metrics)) for step, metrics in found]


def test_numbers_are_read_back_exactly(folder, project):
    sink = Trackio(project, name="a", **QUIET)
    sink.log(3, {"train/loss": 0.1, "n": 2**53, "nan": math.nan, "inf": math.inf, "low": -math.inf})
    sink.log(10, {"train/loss": torch.tensor(0.25), "f1": [0.5, 1.0]})
    sink.close()
    sink.close()
    assert rows(folder, project, "a") == [
        (3, {"train/loss": 0.1, "n": 2**53, "nan": "NaN", "inf": "Infinity", "low": "-Infinity"}),
        (10, {"train/loss": 0.25, "f1/0": 0.5, "f1/1": 1.0}),
    ]


def test_a_named_run_goes_on_in_another_sink_and_has_the_newest_configuration(folder, project):
    for begin, lr in ((0, 0.5), (2, 0.25)):
        sink = Trackio(project, name="a", **QUIET)
        configure(sink, {"lr": lr, "model": {"width": 64, "norm": None}, "betas": (0.9, 0.95)})
        for step in range(begin, begin + 2):
            sink.log(step, {"loss": step / 2})
        sink.close()
    assert rows(folder, project, "a") == [(step, {"loss": step / 2}) for step in range(4)]
    ((config,),) = read(folder, project, "SELECT config FROM configs")
    own = {name: value for name, value in json.loads(config).items() if name[0] != "_"}
    assert own == {"lr": 0.25, "model": {"width": 64, "norm": None}, "betas": [0.9, 0.95]}
    assert position(sink) is None


def test_a_configuration_in_the_middle_of_a_run_is_the_runs(folder, project):
    sink = Trackio(project, **QUIET)
    sink.log(0, {"loss": 1.0})
    configure(sink, {"lr": 0.5})
    sink.log(1, {"loss": 0.5})
    sink.close()
    assert rows(folder, project, sink.name) == [(0, {"loss": 1.0}), (1, {"loss": 0.5})]
    ((config,),) = read(folder, project, "SELECT config FROM configs")
    assert json.loads(config)["lr"] == 0.5


def test_two_sinks_and_a_run_of_the_scripts_own_are_apart(folder, project):
    import trackio

    own = trackio.init(project, name="own", embed=False, **QUIET)
    sinks = [Trackio(project, name=name, **QUIET) for name in "ab"]
    for step in range(2):
        for number, sink in enumerate(sinks):
            sink.log(step, {"loss": step + number / 2})
    trackio.log({"x": 1})
    for sink in sinks:
        sink.close()
    trackio.log({"x": 2})
    own.finish()
    for number, name in enumerate("ab"):
        assert rows(folder, project, name) == [(step, {"loss": step + number / 2}) for step in range(2)]
    assert rows(folder, project, "own") == [(0, {"x": 1}), (1, {"x": 2})]


def test_pictures_histograms_and_texts_are_trackios_own(folder, project):
    image, gray = Image(torch.rand(3, 4, 5)), Image(torch.rand(4, 5))
    sink = Trackio(project, name="a", **QUIET)
    sink.log(7, {"i": image, "g": gray, "h": Histogram([0, 1, 1, 4], bins=2), "t": Text("a *b*")})
    sink.close()
    ((step, row),) = rows(folder, project, "a")
    assert step == 7
    assert row["h"] == {"_type": "trackio.histogram", "bins": [0.0, 2.0, 4.0], "values": [3, 1]}
    assert row["t"] == {"_type": "trackio.markdown", "_value": "a *b*"}
    for name, logged in (("i", image), ("g", gray)):
        assert row[name]["_type"] == "trackio.image"
        with PIL.open(folder / "media" / row[name]["file_path"]) as found:
            assert (np.asarray(found.convert("RGB")) == logged.pixels).all()


@pytest.mark.parametrize("name", ["step", "metrics", "__x"])
def test_a_name_that_trackio_would_change_is_refused(project, name):
    with pytest.raises(SinkError, match=f"named '{name}'"):
        Trackio(project).log(0, {name: 1.0})


def test_making_and_closing_begins_no_run(folder, project):
    Trackio(project).close()
    assert not (folder / f"{project}.db").exists()


def test_it_loads_on_first_use(monkeypatch):
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    Trackio("p")
    assert "trackio" not in sys.modules
