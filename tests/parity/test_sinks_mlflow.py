"""MLflow, in a directory: what is logged is what its client reads back."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from lumen.sinks import Histogram, Image, MLflow, Text, configure, position
from tests import zygote

pytest.importorskip("mlflow")


@pytest.fixture(scope="module", autouse=True)
def no_reports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("DO_NOT_TRACK", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the database takes a second to set up
        yield


@pytest.fixture
def uri(tmp_path):
    return (tmp_path / "store").as_uri()


def client(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def history(uri, run_id, name):
    return [(metric.step, metric.value) for metric in client(uri).get_metric_history(run_id, name)]


def test_numbers_are_read_back_exactly(uri):
    sink = MLflow(uri, time_fn=iter([0.5, 12.25]).__next__)
    sink.log(3, {"train/loss": 0.1, "nan": math.nan, "inf": math.inf, "low": -math.inf, "n": 2**53})
    sink.log(10, {"train/loss": torch.tensor(0.25), "f1": [0.5, 1.0]})
    sink.close()
    sink.close()
    found = client(uri).get_metric_history(sink.run_id, "train/loss")
    assert [(metric.step, metric.value, metric.timestamp) for metric in found] == [(3, 0.1, 500), (10, 0.25, 12250)]
    last = client(uri).get_run(sink.run_id).data.metrics
    assert math.isnan(last.pop("nan"))
    assert last == {
        "train/loss": 0.25, "inf": math.inf, "low": -math.inf, "n": float(2**53), "f1/0": 0.5, "f1/1": 1.0,
    }  # fmt: skip


def test_more_numbers_than_one_request_holds(uri):
    sink = MLflow(uri)
    sink.log(0, {"lane": np.arange(2500) / 4})
    sink.close()
    assert client(uri).get_run(sink.run_id).data.metrics == {f"lane/{i}": i / 4 for i in range(2500)}


def test_a_sink_goes_on_with_its_run(uri):
    sink = MLflow(uri, experiment="digits", run_name="first", tags={"who": "me"})
    sink.log(0, {"loss": 0.5})
    running = client(uri).get_run(sink.run_id)
    assert (running.info.status, running.info.run_name, running.data.tags["who"]) == ("RUNNING", "first", "me")
    sink.close()
    assert client(uri).get_run(sink.run_id).info.status == "FINISHED"
    sink.log(1, {"loss": 0.25})
    assert client(uri).get_run(sink.run_id).info.status == "RUNNING"
    sink.close()
    resumed = MLflow(uri, experiment="digits", run_id=sink.run_id)
    resumed.log(2, {"loss": 0.125})
    resumed.close()
    assert history(uri, sink.run_id, "loss") == [(0, 0.5), (1, 0.25), (2, 0.125)]
    experiment = client(uri).get_experiment_by_name("digits").experiment_id
    assert len(client(uri).search_runs([experiment])) == 1
    assert position(sink) is None


CONFIG = {"model": {"width": 64, "norm": None}, "betas": (0.9, 0.95), "git": {"commit": "abc", "dirty": False}}
PARAMS = {
    "model.width": "64", "model.norm": "None", "betas": "[0.9, 0.95]", "git.commit": "abc", "git.dirty": "False",
}  # fmt: skip


def test_the_configuration_is_params(uri, tmp_path):
    sink = MLflow(uri)
    configure(sink, CONFIG)
    assert not (tmp_path / "store").exists()
    sink.log(0, {"loss": 1.0})
    sink.close()
    data = client(uri).get_run(sink.run_id).data
    assert data.params == PARAMS
    assert data.tags["mlflow.source.git.commit"] == "abc"


def test_a_resumed_run_may_have_another_configuration(uri):
    sink = MLflow(uri)
    configure(sink, CONFIG)
    sink.log(0, {"loss": 1.0})
    configure(sink, {**CONFIG, "git": {"commit": "def", "dirty": False}, "late": 1})
    sink.log(1, {"loss": 1.0})
    sink.close()
    data = client(uri).get_run(sink.run_id).data
    assert data.params == {**PARAMS, "late": "1"}
    assert data.tags["git.commit"] == data.tags["mlflow.source.git.commit"] == "def"
    assert "late" not in data.tags


def test_long_and_many_values_are_taken(uri):
    sink = MLflow(uri)
    configure(sink, {"long": "x" * 10_000, "fits": "y" * 6000, **{f"p{i}": i for i in range(250)}})
    sink.log(0, {"loss": 1.0})
    sink.close()
    params = client(uri).get_run(sink.run_id).data.params
    assert params.pop("long") == "x" * (6000 - 25) + "… (cut, 10000 characters)"
    assert params.pop("fits") == "y" * 6000
    assert params == {f"p{i}": str(i) for i in range(250)}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a b/c-d.e_f", "a b/c-d.e_f"),
        ("loss (train), 90%", "loss _train__ 90_"),
        ("a//b/", "a/b"),
        ("../up", "__/up"),
        ("/root", "root"),
        ("./a", "a"),
        ("//", "_"),
        ("é", "é"),
        ("n" * 300, "n" * 250),
    ],
)
def test_any_name_becomes_one_that_mlflow_takes(uri, name, found):
    sink = MLflow(uri)
    configure(sink, {name: 1})
    sink.log(0, {name: 0.5})
    sink.log(0, {f"{name}": Text("a")})
    sink.close()
    data = client(uri).get_run(sink.run_id).data
    assert (data.metrics, data.params) == ({found: 0.5}, {found: "1"})


def test_pictures_histograms_and_texts_are_artifacts(uri, tmp_path):
    image = Image(torch.rand(3, 4, 5))
    sink = MLflow(uri)
    sink.log(7, {"val/i": image, "h": Histogram([0, 1, 1, 4, math.nan], bins=2), "t": Text("“a”")})
    sink.close()
    folder = tmp_path / "down"
    folder.mkdir()
    client(uri).download_artifacts(sink.run_id, "", str(folder))
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert files.keys() == {"images/val/i/7.png", "histograms/h/7.json", "texts/t/7.txt"}
    assert files["images/val/i/7.png"].read_bytes() == image.png()
    assert files["texts/t/7.txt"].read_text(encoding="utf-8") == "“a”"
    assert json.loads(files["histograms/h/7.json"].read_text()) == {
        "edges": [0.0, 2.0, 4.0],
        "counts": [3, 1],
        "nonfinite": 1,
    }


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own use of SQLAlchemy
def test_a_database_takes_the_same(tmp_path):
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client(uri).create_experiment("digits", artifact_location=(tmp_path / "artifacts").as_uri())
    sink = MLflow(uri, experiment="digits")
    configure(sink, {**CONFIG, "long": "x" * 10_000})
    for step in range(2):
        sink.log(step, {"loss": step / 2, "nan": math.nan, "inf": math.inf})
    configure(sink, {**CONFIG, "long": "y" * 10_000})
    sink.log(2, {"t": Text("a")})
    sink.close()
    assert history(uri, sink.run_id, "loss") == [(0, 0.0), (1, 0.5)]
    data = client(uri).get_run(sink.run_id).data
    assert math.isnan(data.metrics["nan"])
    assert data.metrics["inf"] == sys.float_info.max
    assert {name: data.params[name] for name in PARAMS} == PARAMS
    assert data.params["long"].startswith("xxx")
    assert data.tags["long"].startswith("yyy")


def test_a_store_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="file"):
        MLflow((tmp_path / "file" / "store").as_uri()).log(0, {"loss": 1.0})


def test_making_and_closing_begins_no_run(uri, tmp_path):
    MLflow(uri).close()
    assert not any(tmp_path.iterdir())


def test_a_missing_mlflow_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[mlflow\]'"):
        MLflow()


def test_it_loads_on_first_use():
    code = "import sys, lumen.sinks as s; s.MLflow(); assert 'mlflow' not in sys.modules"
    assert zygote.run([sys.executable, "-c", code], bare=True).returncode == 0
