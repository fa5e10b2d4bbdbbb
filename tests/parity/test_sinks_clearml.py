"""ClearML, offline: what is logged is in the session's folder, which `Task.import_offline_session` would send."""

import json
import math
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lumen.errors import SinkError
from lumen.sinks import ClearML, Histogram, Image, Text, configure, position

pytest.importorskip("clearml")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ClearML's own use of pyparsing and utcnow

# Looking for the script's repository and packages takes seconds.
FRAMEWORKS = (
    "detect_repository", "hydra", "scikit", "joblib", "matplotlib", "tensorflow", "tensorboard", "pytorch",
    "megengine", "xgboost", "catboost", "fastai", "lightgbm", "gradio",
)  # fmt: skip
QUIET = {
    "auto_connect_frameworks": dict.fromkeys(FRAMEWORKS, False),
    "auto_connect_streams": False,
    "auto_resource_monitoring": False,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path))
    return tmp_path


def make(name="first", **arguments):
    return ClearML("digits", name, offline=True, **{**QUIET, **arguments})


def events(folder, kind, file="metrics.jsonl"):
    """The events of a type in a session's folder, in order."""
    lines = (folder / file).read_text().splitlines()
    return [event for line in lines for event in json.loads(line) if event["type"] == kind]


def numbers(folder):
    found = events(folder, "training_stats_scalar")
    return [(event["iter"], event["variant"], event["metric"], event["value"]) for event in found]


def parameters(folder):
    section = json.loads((folder / "task.json").read_text())["hyperparams"]["General"]
    return {name: item["value"] for name, item in section.items()}


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGQUIT)]


def test_numbers_and_the_configuration_are_read_back_and_nothing_else_changes():
    before, signals = torch.get_rng_state(), handlers()
    sink = make()
    configure(sink, {"model": {"width": 64, "norm": None}, "betas": (0.9, 0.95), "lr": 0.1})
    sink.log(3, {"train/loss": 0.1, "n": 2**53, "nan": math.nan, "low": -math.inf})
    configure(sink, {"lr": 0.5})
    sink.log(10, {"train/loss": torch.tensor(0.25), "val/f1": [0.5, 1.0]})
    assert before.equal(torch.get_rng_state())
    assert handlers() == signals
    sink.close()
    sink.close()
    assert before.equal(torch.get_rng_state())
    assert handlers() == signals
    folder = sink.offline_folder
    assert numbers(folder) == [
        (3, "train", "loss", 0.1),
        (3, "n", "n", float(2**53)),
        (10, "train", "loss", 0.25),
        (10, "val", "f1/0", 0.5),
        (10, "val", "f1/1", 1.0),
    ]
    assert parameters(folder) == {"model.width": "64", "model.norm": "", "betas": "[0.9, 0.95]", "lr": "0.5"}
    lines = "\n".join(event["msg"] for event in events(folder, "log", "log.jsonl"))
    assert "nan is nan at step 3" in lines
    assert "low is -inf at step 3" in lines
    about = json.loads((folder / "task.json").read_text())
    assert (about["name"], about["project_name"]) == ("first", "digits")
    with zipfile.ZipFile(f"{folder}.zip") as archive:
        assert archive.read("metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()


def test_each_part_of_a_run_is_a_session_of_its_own_with_the_same_steps():
    sink, folders = make(), []
    for begin in (0, 2):
        for step in range(begin, begin + 2):
            sink.log(step, {"loss": step / 2})
        sink.close()
        folders.append(sink.offline_folder)
    assert folders[0] != folders[1]
    assert [row for folder in folders for row in numbers(folder)] == [
        (step, "loss", "loss", step / 2) for step in range(4)
    ]
    assert position(sink) is None
    with pytest.raises(SinkError, match="previous_task_id"):
        make(task_id="abc")


def test_a_second_task_is_refused_and_the_first_goes_on():
    first, second = make("first"), make("second")
    first.log(0, {"loss": 0.0})
    with pytest.raises(SinkError, match="already has the ClearML task 'first'"):
        second.log(0, {"loss": 5.0})
    first.log(1, {"loss": 0.5})
    first.close()
    second.log(0, {"loss": 5.0})
    second.close()
    assert numbers(first.offline_folder) == [(0, "loss", "loss", 0.0), (1, "loss", "loss", 0.5)]
    assert numbers(second.offline_folder) == [(0, "loss", "loss", 5.0)]


def test_all_pictures_are_kept_and_histograms_and_texts_are_clearmls_own():
    images = [Image(torch.rand(3, 4, 5)) for _ in range(7)]
    sink = make()
    for step, image in enumerate(images):
        sink.log(step, {"val/i": image})
    sink.log(7, {"h": Histogram([0, 1, 1, 4], bins=2), "t": Text("“a”")})
    sink.close()
    samples = events(sink.offline_folder, "training_debug_image")
    pictures = [event for event in samples if event["metric"] == "i"]
    assert [Path(event["url"]).read_bytes() for event in pictures] == [image.png() for image in images]
    assert {event["variant"] for event in pictures} == {"val"}
    (text,) = [event for event in samples if event["metric"] == "t"]
    assert (text["iter"], Path(text["url"]).read_text(encoding="utf-8")) == (7, "“a”")
    (plot,) = events(sink.offline_folder, "plot")
    (bars,) = json.loads(plot["plot_str"])["data"]
    assert (plot["iter"], bars["x"], bars["y"]) == (7, ["0", "2"], [3, 1])


def test_making_and_closing_begins_no_task(folder):
    make().close()
    assert not any(folder.iterdir())


def test_it_loads_on_first_use(monkeypatch):
    monkeypatch.delitem(sys.modules, "clearml", raising=False)
    ClearML("p", "t", offline=True)
    assert "clearml" not in sys.modules
