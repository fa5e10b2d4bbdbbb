"""Checkpoints and sinks through the clients of S3 and of Google's store, on servers that this process runs."""

from __future__ import annotations

import socket

import fsspec
import pytest
import torch

import lumen as lm
from lumen.checkpoint import Store
from lumen.core import object_store
from lumen.errors import CheckpointError

pytestmark = [
    # Of botocore, aiobotocore, google's packages and the servers.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

S3 = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
# The second: without the look at the kind of the bucket, for which the emulator has no answer.
GS = {"NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@pytest.fixture(scope="module")
def s3_endpoint():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="module")
def gs_endpoint():
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with create_server("127.0.0.1", port, in_memory=True):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def bucket(request, monkeypatch, tmp_path):
    """The URL of an empty bucket, and its file system. The parameter is the protocol."""
    protocol = request.param
    endpoint = request.getfixturevalue(f"{protocol}_endpoint")
    settings = {"s3": S3 | {"AWS_ENDPOINT_URL": endpoint}, "gs": GS | {"STORAGE_EMULATOR_HOST": endpoint}}
    for name, value in settings[protocol].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "DELAYS", (0.0,))
    files = fsspec.filesystem(protocol)
    files.clear_instance_cache()  # each is for the endpoint that it was made for
    files = fsspec.filesystem(protocol)
    files.mkdir("bucket")
    yield f"{protocol}://bucket", files
    files.rm("bucket", recursive=True)
    files.clear_instance_cache()


def value_of(number):
    return {"weight": torch.full((3, 2), float(number)), "number": number}


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_a_store(bucket, tmp_path):
    url, files = bucket
    tree = {"big": torch.randn(1_500_000), **value_of(7)}  # big: more than one part
    lm.checkpoint.save(f"{url}/one", tree, meta={"lr": 0.1})
    restored = lm.checkpoint.restore(f"{url}/one", tree)
    assert all(torch.equal(restored[name], tree[name]) for name in ("big", "weight"))
    with Store(f"{url}/run", keep=2) as store:
        for number in (1, 2, 22):
            store.save(min(number, 2), value_of(number))
        store.wait()
        assert store.quarantine(store.path(1)) == f"{url}/run/damaged-1"
    store = Store(f"{url}/run")
    assert store.steps() == [2]
    assert store.restore(2, value_of(0))["number"] == 22
    entries = {name.split("/")[2] for name in files.find("bucket/run")}
    assert entries == {".lumen-lock", "2.1", "damaged-1"}


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)  # of the two the faster server
def test_a_run_resumes_on_an_empty_disk_as_from_its_own(bucket, monkeypatch, tmp_path):
    url, files = bucket

    def step(state, batch):
        return {"total": state["total"] * 0.5 + batch.sum()}, {"loss": batch.sum()}

    def run(place, epochs):
        checkpoint = lm.Checkpointer(place, every=lm.Every(steps=3))
        sinks = [lm.sinks.JSONL(f"{place}/metrics.jsonl", time_fn=lambda: 0.0)]
        runner = lm.Runner(step, checkpoint=checkpoint, sinks=sinks, log_every=1, progress=False)
        data = lm.Loader(torch.linspace(0, 1, 4), batch_size=2, seed=0)
        return runner.fit({"total": torch.zeros(())}, data, until=lm.Epochs(epochs), resume="auto")

    for epochs in (1, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{epochs}"))
        there, here = run(f"{url}/run", epochs), run(str(tmp_path / "run"), epochs)
    assert there.clock.step == 4
    assert torch.equal(there.state["total"], here.state["total"])
    rows = files.cat("bucket/run/metrics.jsonl").decode().splitlines()
    assert len(rows) == len((tmp_path / "run/metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_a_bucket_that_does_not_exist(bucket):
    url = bucket[0].replace("bucket", "another")
    with pytest.raises(CheckpointError, match=rf"cannot be written to {url}/run: .*(another|bucket|Bucket)"):
        Store(f"{url}/run").open()
