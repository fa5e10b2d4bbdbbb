"""Checkpoints and sinks on a real S3 server, which moto runs in this process. Skipped where it or s3fs is missing."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.checkpoint import Store
from lumen.core import object_store
from lumen.errors import CheckpointError

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
pytestmark = [
    # Of botocore, aiobotocore and the server, in this process.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def endpoint():
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch, tmp_path):
    import s3fs

    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for name, value in (settings | {"ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "DELAYS", (0.0,))
    s3fs.S3FileSystem.clear_instance_cache()  # each is for the endpoint that it was made for
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield files
    files.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def value_of(number):
    return {"weight": torch.full((3, 2), float(number)), "number": number}


def test_a_store(bucket, tmp_path):
    tree = {"big": torch.randn(1_500_000), **value_of(7)}  # big: more than one part
    lm.checkpoint.save("s3://bucket/one", tree, meta={"lr": 0.1})
    lm.checkpoint.save(tmp_path / "one", tree)
    there, here = (lm.checkpoint.restore(place, tree) for place in ("s3://bucket/one", tmp_path / "one"))
    assert all(torch.equal(there[name], here[name]) for name in ("big", "weight"))
    with Store("s3://bucket/run", keep=2) as store:
        for step in range(3):
            store.save(step, value_of(step))
        store.save(2, value_of(22))
        store.wait()
        assert store.quarantine(store.path(1)) == "s3://bucket/run/damaged-1"
    store = Store("s3://bucket/run")
    assert store.steps() == [2]
    assert store.restore(2, value_of(0))["number"] == 22
    entries = {name.split("/")[2] for name in bucket.find("bucket/run")}
    assert entries == {".lumen-lock", "2.1", "damaged-1"}
    with Store("s3://bucket/run"):
        assert not [name for name in bucket.find("bucket/run") if name.startswith("bucket/run/2/")]


def test_a_run_resumes_on_an_empty_disk_as_from_its_own(bucket, monkeypatch, tmp_path):
    def step(state, batch):
        return {"total": state["total"] * 0.5 + batch.sum()}, {"loss": batch.sum()}

    def run(place, epochs):
        checkpoint = lm.Checkpointer(place, every=lm.Every(steps=2))
        sinks = [lm.sinks.JSONL(f"{place}/metrics.jsonl", time_fn=lambda: 0.0)]
        runner = lm.Runner(step, checkpoint=checkpoint, sinks=sinks, log_every=1, progress=False)
        data = lm.Loader(torch.linspace(0, 1, 8), batch_size=2, seed=0)
        return runner.fit({"total": torch.zeros(())}, data, until=lm.Epochs(epochs), resume="auto")

    for epochs in (1, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{epochs}"))
        there, here = run("s3://bucket/run", epochs), run(str(tmp_path / "run"), epochs)
    assert there.clock.step == 8
    assert torch.equal(there.state["total"], here.state["total"])
    rows = bucket.cat("bucket/run/metrics.jsonl").decode().splitlines()
    assert len(rows) == len((tmp_path / "run/metrics.jsonl").read_text().splitlines())


def test_a_bucket_that_does_not_exist(bucket):
    with pytest.raises(CheckpointError, match=r"cannot be written to s3://another/run: .*(bucket|Bucket)"):
        Store("s3://another/run").open()
