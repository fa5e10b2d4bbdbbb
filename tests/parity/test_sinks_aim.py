"""Aim, in a directory: what is logged is what its own objects read back."""

import math
import signal
import sys

import numpy as np
import pytest
import torch

from lumen.errors import PathError
from lumen.sinks import Aim, Histogram, Image, Text, configure, position

pytest.importorskip("aim")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Aim's own

QUIET = {"system_tracking_interval": None, "capture_terminal_logs": False}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """One for all tests: Aim takes seconds to make its database."""
    return tmp_path_factory.mktemp("aim") / "new" / "runs"


@pytest.fixture
def make(repo):
    def make(**arguments):
        return Aim(repo, **{**QUIET, **arguments})

    return make


@pytest.fixture
def reopened(repo):
    """Aim's own run of a hash: its index, which read-only access needs, is made by `aim up`."""
    sinks = []

    def reopen(run_hash):
        sinks.append(Aim(repo, run_hash=run_hash, **QUIET))
        return sinks[-1]._open()

    yield reopen
    for sink in sinks:
        sink.close()


def numbers(run):
    """By name, the steps and values."""
    found = {metric.name: metric.data.items_list() for metric in run.metrics()}
    return {name: list(zip(steps, values, strict=True)) for name, (steps, (values, *_)) in found.items()}


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_numbers_and_the_configuration_are_read_back_exactly(make, reopened):
    before, signals = torch.get_rng_state(), handlers()
    sink = make(experiment="digits")
    configure(sink, {"model": {"width": 64, "norm": None}, "betas": (0.9, 0.95), "lr": 0.1})
    sink.log(3, {"train/loss": 0.1, "n": 2**53, "nan": math.nan, "inf": math.inf, "low": -math.inf})
    configure(sink, {"lr": 0.5})
    sink.log(10, {"train/loss": torch.tensor(0.25), "f1": [0.5, 1.0]})
    sink.close()
    sink.close()
    assert before.equal(torch.get_rng_state())
    assert signals == handlers()
    run = reopened(sink.run_hash)
    found = numbers(run)
    ((step, value),) = found.pop("nan")
    assert step == 3
    assert math.isnan(value)
    assert found == {
        "train/loss": [(3, 0.1), (10, 0.25)],
        "n": [(3, float(2**53))],
        "inf": [(3, math.inf)],
        "low": [(3, -math.inf)],
        "f1/0": [(10, 0.5)],
        "f1/1": [(10, 1.0)],
    }
    assert run[...] == {"model": {"width": 64, "norm": None}, "betas": [0.9, 0.95], "lr": 0.5}
    assert run.experiment == "digits"


def test_a_resumed_run_replaces_the_values_of_the_same_steps(make, reopened):
    sink = make()
    for step in range(3):
        sink.log(step, {"loss": step / 2})
    sink.close()
    resumed = make(run_hash=sink.run_hash)
    configure(resumed, {"lr": 0.5})
    for step in range(2, 5):
        resumed.log(step, {"loss": step / 2})
    resumed.close()
    resumed.log(5, {"loss": 2.5})
    resumed.close()
    run = reopened(sink.run_hash)
    assert numbers(run) == {"loss": [(step, step / 2) for step in range(6)]}
    assert run[...] == {"lr": 0.5}
    assert position(sink) is None


def test_two_sinks_write_two_runs(make, reopened):
    first, second = make(), make()
    for step in range(2):
        first.log(step, {"loss": float(step)})
        second.log(step, {"loss": step / 2})
    first.close()
    second.close()
    assert numbers(reopened(first.run_hash)) == {"loss": [(0, 0.0), (1, 1.0)]}
    assert numbers(reopened(second.run_hash)) == {"loss": [(0, 0.0), (1, 0.5)]}


def test_pictures_histograms_and_texts_are_aims_own(make, reopened):
    from aim.storage.context import Context

    images = {"i": Image(torch.rand(3, 4, 5)), "g": Image(torch.rand(4, 5))}
    sink = make()
    sink.log(7, {**images, "h": Histogram([0, 1, 1, 4], bins=2), "t": Text("a < b")})
    sink.close()
    run, context = reopened(sink.run_hash), Context({})
    for name, logged in images.items():
        (step,), (found,) = run.get_image_sequence(name, context).values.sparse_list()
        pixels = np.asarray(found.to_pil_image())
        assert step == 7
        assert (pixels.reshape(logged.pixels.shape) == logged.pixels).all()
    (step,), (found,) = run.get_distribution_sequence("h", context).values.sparse_list()
    assert (step, found.weights.tolist(), found.ranges.tolist()) == (7, [3, 1], [0.0, 2.0, 4.0])
    (step,), (found,) = run.get_text_sequence("t", context).values.sparse_list()
    assert (step, found.data) == (7, "a < b")


def test_making_and_closing_begins_no_run(tmp_path):
    Aim(tmp_path / "runs").close()
    assert not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Aim(tmp_path / "file" / "runs").log(0, {"loss": 1.0})
    with pytest.raises(PathError, match="the repo of Aim"):
        Aim("s3://bucket/runs")


def test_it_loads_on_first_use(monkeypatch):
    monkeypatch.delitem(sys.modules, "aim", raising=False)
    Aim("aim://localhost:53800")
    assert "aim" not in sys.modules
