"""Comet, offline: what is logged is in the archive that `comet upload` would send."""

import json
import math
import signal
import sys
import zipfile

import pytest
import torch

from lumen.errors import PathError, SinkError
from lumen.sinks import Comet, Histogram, Image, Text, configure, position

pytest.importorskip("comet_ml")
comets = pytest.importorskip("comet_ml.data_structure")

QUIET = {
    **dict.fromkeys(("log_code", "log_env_details", "log_git_metadata", "log_graph", "parse_args"), False),
    "auto_output_logging": False,
    "display_summary_level": 0,
}
OWN = ("process duration",)  # of Comet's, in each archive


@pytest.fixture
def make(tmp_path):
    def make(**arguments):
        return Comet("digits", online=False, dir=tmp_path / "new" / "runs", **{**QUIET, **arguments})

    return make


class Archive:
    """The messages of an archive, in order."""

    def __init__(self, path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.about = json.loads(archive.read("experiment.json"))
            lines = archive.read("messages.json").splitlines()
            self.files = {name: archive.read(name) for name in archive.namelist()}
        self.messages = [(message["type"], message["payload"]) for message in map(json.loads, lines)]

    def metrics(self):
        found = [payload["metric"] for kind, payload in self.messages if kind == "metric_msg"]
        return [(row["step"], row["metricName"], row["metricValue"]) for row in found if row["metricName"] not in OWN]

    def parameters(self):
        found = [payload["param"] for kind, payload in self.messages if kind == "parameter_msg"]
        return {row["paramName"]: row["paramValue"] for row in found if row["source"] == "manual"}

    def uploads(self):
        found = [payload for kind, payload in self.messages if kind == "file_upload"]
        return {row["upload_type"]: (row, self.files[row["file_path"]]) for row in found}


def archives(folder):
    return sorted(map(Archive, folder.rglob("*.zip")), key=lambda archive: archive.about["start_time"])


def test_numbers_and_the_configuration_are_read_back_exactly(tmp_path, make):
    sink = make()
    configure(sink, {"model": {"width": 64, "norm": None}, "betas": (0.9, 0.95), "lr": 0.1})
    sink.log(3, {"train/loss": 0.1, "n": 2**53, "nan": math.nan, "inf": math.inf, "low": -math.inf})
    configure(sink, {"lr": 0.5})
    sink.log(10, {"train/loss": torch.tensor(0.25), "f1": [0.5, 1.0]})
    sink.close()
    sink.close()
    (archive,) = archives(tmp_path)
    assert sorted(archive.metrics()) == [
        (3, "inf", "Infinity"),
        (3, "low", "-Infinity"),
        (3, "n", 2**53),
        (3, "nan", "NaN"),
        (3, "train/loss", 0.1),
        (10, "f1/0", 0.5),
        (10, "f1/1", 1.0),
        (10, "train/loss", 0.25),
    ]
    assert archive.parameters() == {"model.width": 64, "model.norm": None, "betas": "[0.9, 0.95]", "lr": 0.5}
    assert archive.about["project_name"] == "digits"


def test_each_part_of_a_run_is_an_archive_of_the_same_experiment(tmp_path, make):
    sink = make()
    for begin in (0, 2):
        for step in range(begin, begin + 2):
            sink.log(step, {"loss": step / 2})
        sink.close()
    other = make(experiment_key=sink.experiment_key)
    other.log(4, {"loss": 2.0})
    other.close()
    found = archives(tmp_path)
    assert {archive.about["offline_id"] for archive in found} == {sink.experiment_key}
    assert {archive.about["resume_strategy"] for archive in found} == {"get_or_create"}
    assert [row for archive in found for row in archive.metrics()] == [(step, "loss", step / 2) for step in range(5)]
    assert position(sink) is None


def test_a_second_experiment_is_refused_and_the_first_goes_on(tmp_path, make):
    import comet_ml

    first, second = make(), make()
    first.log(0, {"loss": 0.0})
    with pytest.raises(SinkError, match=f"already has the Comet experiment {first.experiment_key}"):
        second.log(0, {"loss": 5.0})
    first.log(1, {"loss": 0.5})
    own = comet_ml.OfflineExperiment(offline_directory=str(tmp_path / "own"), **QUIET)
    with pytest.raises(SinkError, match=f"has ended the experiment {first.experiment_key}"):
        first.log(2, {"loss": 1.0})
    own.log_metric("x", 1.0, step=0)
    own.end()
    second.log(0, {"loss": 5.0})
    second.close()
    (found,) = archives(tmp_path / "own")
    assert found.metrics() == [(0, "x", 1.0)]
    assert [archive.metrics() for archive in archives(tmp_path / "new")][-1] == [(0, "loss", 5.0)]


def test_pictures_histograms_and_texts_are_comets_own(tmp_path, make):
    image = Image(torch.rand(3, 4, 5))
    sink = make()
    sink.log(7, {"i": image, "h": Histogram([0.0, 1.0, 1.0, 4.0], bins=2), "t": Text("a < b")})
    sink.close()
    (archive,) = archives(tmp_path)
    uploads = archive.uploads()
    about, png = uploads["visualization"]
    assert (about["additional_params"]["figName"], about["additional_params"]["step"]) == ("i", 7)
    assert png == image.png()
    about, text = uploads["text-sample"]
    assert (text, about["metadata"], about["additional_params"]["step"]) == (b"a < b", {"name": "t"}, 7)
    about, histogram = uploads["histogram3d"]
    assert (about["additional_params"]["fileName"], about["additional_params"]["step"]) == ("h", 7)
    bins = comets.Histogram().values
    found = [(bins[index], bins[index + 1], count) for index, count in json.loads(histogram)["index_values"]]
    (low, high, count), (lower, upper, one) = sorted(found)  # of the centers 1 and 3
    assert (low <= 1 < high, count, lower <= 3 < upper, one) == (True, 3, True, 1)


def test_it_changes_nothing_that_a_run_depends_on(make):
    before, handlers = torch.get_rng_state(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    sink = make()
    sink.log(0, {"loss": 1.0})
    sink.close()
    assert before.equal(torch.get_rng_state())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_making_and_closing_begins_no_experiment(tmp_path, make):
    make().close()
    assert not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Comet(online=False, dir=tmp_path / "file" / "runs", **QUIET).log(0, {"loss": 1.0})
    with pytest.raises(PathError, match="the dir of Comet"):
        Comet(online=False, dir="s3://bucket/runs")
    with pytest.raises(SinkError, match="add online=False"):
        Comet(dir="runs")


def test_it_loads_on_first_use(monkeypatch):
    monkeypatch.delitem(sys.modules, "comet_ml", raising=False)
    Comet("p", online=False)
    assert "comet_ml" not in sys.modules
