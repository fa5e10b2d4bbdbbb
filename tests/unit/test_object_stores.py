"""URLs of object stores: what works there, equal to what works on a disk, and what is refused by name."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lumen as lm
from lumen.bridges import huggingface
from lumen.checkpoint import Store
from lumen.cli.main import main
from lumen.core import mirror, object_store, urls
from lumen.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    HyperparameterError,
    ObjectStoreError,
    PathError,
)
from tests.object_stores import FaultyFileSystem, installed


@pytest.fixture(autouse=True)
def objects(monkeypatch, tmp_path, tmp_path_factory):
    monkeypatch.setattr(object_store, "DELAYS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))
    with installed(FaultyFileSystem) as files:
        yield files


def content(objects, url):
    return objects().cat_file(url).decode()


# ------------------------------------------------------------------------------------------------- one checkpoint


def test_restored_from_a_url_equals_restored_from_a_disk(tmp_path):
    state = lm.TrainState.create(torch.nn.Linear(3, 2), lm.optim.adamw(1e-2), seed=3)
    tree = {"state": state, "half": torch.randn(5).bfloat16(), "empty": torch.ones(0, 2), "n": [1, None, "x", ()]}
    for location in ("memory://bucket/one", str(tmp_path / "one")):
        lm.checkpoint.save(location, tree, extra={"rng": torch.arange(4)}, meta={"lr": 0.1})
    kinds = [(lm.checkpoint.load(location), location) for location in ("memory://bucket/one", tmp_path / "one")]
    restored = [lm.checkpoint.restore(location, lm.tree.map(lambda leaf: leaf, tree)) for _, location in kinds]
    for (name, remote), (_, local) in zip(*map(lm.tree.named_tensors, restored), strict=True):
        assert remote.dtype == local.dtype, name
        assert torch.equal(remote, local), name
    metadata = [{**lm.checkpoint.metadata(location), "time": "", "digest": ""} for _, location in kinds]
    assert metadata[0] == metadata[1]
    assert lm.checkpoint.load("memory://bucket/one", item="extra")["rng"].tolist() == [0, 1, 2, 3]
    assert lm.checkpoint.load("memory://bucket/one/", under="n/0") == 1
    exported = lm.checkpoint.export("memory://bucket/one", tmp_path / "x.pt", format="torch")
    assert torch.equal(torch.load(exported, weights_only=True)["weight"], state.params["weight"])


def test_one_that_exists_is_not_replaced_and_one_that_does_not_is_not_found():
    lm.checkpoint.save("memory://bucket/one", {"x": 1})
    with pytest.raises(CheckpointExistsError, match="memory://bucket/one exists"):
        lm.checkpoint.save("memory://bucket/one", {"x": 1})
    with pytest.raises(CheckpointNotFoundError, match="memory://bucket/two is no checkpoint: it does not exist"):
        lm.checkpoint.load("memory://bucket/two")


def test_only_the_objects_that_are_needed_are_read(objects):
    lm.checkpoint.save("memory://bucket/one", {"a": torch.ones(3), "b": {"c": torch.ones(3)}})
    reads = []
    objects.fail(lambda operation: reads.append(operation) if operation == "get_file" else None)
    lm.checkpoint.load("memory://bucket/one", under="b")
    assert len(reads) == 2, "the header and one array"


def test_the_command_takes_urls(tmp_path, capsys):
    with Store("memory://bucket/run/checkpoints", keep=2) as store:
        for step in (1, 2, 2):
            store.save(step, {"params": {"w": torch.full((3,), float(step))}}, metrics={"loss": 1 / step})
    assert main(["inspect", "memory://bucket/run/"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["checkpoint", "1", "2.1"]
    assert main(["inspect", "memory://bucket/run", "--best", "--monitor", "loss", "--mode", "max", "--verify"]) == 0
    assert "memory://bucket/run/checkpoints/1\n" in capsys.readouterr().out
    file = tmp_path / "w.safetensors"
    assert main(["export", "memory://bucket/run", "--to", "safetensors", "-o", str(file)]) == 0
    assert load_file(file)["w"].tolist() == [2.0] * 3
    for arguments in (["inspect", "ftp://a/b"], ["export", "runs/a", "--to", "torch", "-o", "s3://a/b.pt"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "a path" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- a run


def step(state, batch):
    def loss_fn(params, x):
        out, _ = state.apply(params, x)
        return lm.Mean.of(out.square().sum(-1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def run(location, epochs, resume="auto", sinks=("metrics.jsonl", "metrics.csv")):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.2))
    checkpoint = lm.Checkpointer(location, every=lm.Every(steps=3), keep=2, monitor="train/loss", keep_every=8)
    kinds = {"metrics.jsonl": lm.sinks.JSONL, "metrics.csv": lm.sinks.CSV}
    writers = [kinds[name](urls.join(urls.parse_location(location), name), time_fn=lambda: 0.0) for name in sinks]
    runner = lm.Runner(step, checkpoint=checkpoint, sinks=writers, log_every=1, progress=False)
    data = torch.linspace(-1, 1, 24).view(8, 3)
    state = lm.TrainState.create(net, lm.optim.adamw(1e-2), seed=0)
    return runner.fit(state, lm.Loader(data, batch_size=2, seed=0), until=lm.Epochs(epochs), resume=resume), checkpoint


def losses(text):
    return [(row["step"], row["train/loss"]) for row in map(json.loads, text.splitlines()) if "train/loss" in row]


def test_a_run_resumes_on_an_empty_disk_as_from_its_own(objects, monkeypatch, tmp_path):
    """Bit for bit, with its rows once each."""
    for epochs in (1, 3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{epochs}"))
        there, remote = run("memory://bucket/run", epochs)
        here, local = run(str(tmp_path / "run"), epochs)
        for name, param in there.state.params.items():
            assert torch.equal(param, here.state.params[name]), name
        assert remote.store.steps() == local.store.steps()
        assert remote.store.best() == local.store.best()
        assert losses(content(objects, "memory://bucket/run/metrics.jsonl")) == losses(
            (tmp_path / "run/metrics.jsonl").read_text()
        )
    assert there.clock.step == 12
    assert there.files["newest checkpoint"] == "memory://bucket/run/checkpoints/12.1" == remote.latest()
    assert there.files["JSONL"] == "memory://bucket/run/metrics.jsonl"
    assert remote.interrupted == "memory://bucket/run/interrupted.json"
    with pytest.raises(CheckpointError, match="memory://bucket/run holds the checkpoints of a run, up to step 12"):
        run("memory://bucket/run", 4, resume="never")
    other, _ = run(str(tmp_path / "other"), 4, resume="memory://bucket/run")
    assert other.clock.step == 16
    assert not Path("memory:").exists()


def test_an_upload_that_is_about_to_start_is_waited_for(objects, monkeypatch):
    """By the thread of a save, while a sink asks for the upload in another."""
    files = mirror.Mirror("memory://bucket/files")
    (files.directory / "rows.txt").write_text("a row")
    begun, start = threading.Event(), threading.Thread.start

    def start_late(thread):
        if thread.name.startswith("lumen upload"):
            begun.set()
            time.sleep(0.2)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_late)
    asking = threading.Thread(target=files.request)
    asking.start()
    assert begun.wait(10)
    files.wait()
    assert content(objects, "memory://bucket/files/rows.txt") == "a row"
    asking.join()


def test_the_rows_that_a_checkpoint_counts_are_there_before_it(objects, monkeypatch):
    """However slow their upload is: a run that is killed then finds each row that it does not log again."""
    upload, counts = mirror.Mirror._upload, []
    monkeypatch.setattr(mirror.Mirror, "_upload", lambda self: (time.sleep(0.05), upload(self)))

    def compare(operation):
        headers = [name for name in objects.store if name.endswith("/meta/metadata")]
        if operation == "pipe_file" and headers:
            newest = json.loads(objects.store[headers[-1]].getvalue())
            rows = objects.store["/bucket/run/metrics.jsonl"].getvalue().count(b"\n")
            counts.append((newest["meta"]["run_log"]["sinks"][0]["position"], rows))

    objects.fail(after=compare)
    run("memory://bucket/run", 2, sinks=("metrics.jsonl",))
    assert max(position for position, _ in counts) == 8
    assert all(position <= rows for position, rows in counts)


# ---------------------------------------------------------------------------------------------------------- sinks


@pytest.mark.parametrize(("kind", "name"), [(lm.sinks.JSONL, "m.jsonl"), (lm.sinks.CSV, "m.csv")])
def test_a_file_of_rows_equals_that_on_a_disk(objects, kind, name, tmp_path):
    """Continued by a second sink, with a new column, and rewound."""
    for _ in range(2):
        for location in (f"memory://bucket/{name}", tmp_path / name):
            sink = kind(location, time_fn=lambda: 1.0)
            sink.config({"lr": 0.1})
            sink.rewind(2)
            for number in range(4):
                sink.log(number, {"loss": 0.5, **({"other": 1} if number == 3 else {})})
            assert sink.position() in (4, 6)
            sink.close()
    assert content(objects, f"memory://bucket/{name}") == (tmp_path / name).read_text()
    assert json.loads(content(objects, "memory://bucket/m.config.json")) == {"lr": 0.1}


def test_tensorboard(objects):
    sink = lm.sinks.TensorBoard("memory://bucket/tb")
    assert sink.position() == -1
    sink.log(1, {"loss": 0.5})
    assert sink.position() == 1
    sink.close()
    written = (sink.logdir / os.listdir(sink.logdir)[0]).read_bytes()
    (name,) = objects.store
    assert bytes(objects.store[name].getvalue()) == written
    assert lm.sinks.TensorBoard("memory://bucket/tb").position() is None, "the files of an earlier run"


def test_a_sink_whose_store_fails_says_so_at_its_next_call_and_keeps_its_file(objects, monkeypatch):
    monkeypatch.setattr(mirror, "INTERVAL", 0.0)
    sink = lm.sinks.JSONL("memory://bucket/m.jsonl")
    sink.log(0, {"loss": 1.0})

    def refuse(operation):
        if operation == "pipe_file":
            raise PermissionError("403 Forbidden")

    sink._location.mirror.wait()
    objects.fail(refuse)
    sink.log(1, {"loss": 1.0})
    sink._location.mirror.wait()
    with pytest.raises(ObjectStoreError, match=r"403 Forbidden.*Nothing is lost: the files are in (\S+)") as info:
        sink.log(2, {"loss": 1.0})
    kept = Path(str(info.value).rpartition(" in ")[2])
    assert len((kept / "m.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ObjectStoreError):
        sink.close()
    objects.heal()
    sink.close()
    assert len(content(objects, "memory://bucket/m.jsonl").splitlines()) == 3


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", [Store, lm.Checkpointer, lm.sinks.JSONL, lm.sinks.CSV, lm.sinks.TensorBoard])
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///data/runs", "write '/data/runs'"),
        ("ftp://host/runs", r"ftp:// is not a store .* s3://, gs:// and memory://"),
        ("simplecache::memory://runs", "not a store"),
        ("s3://bucket/runs", "needs s3fs, and it cannot be imported.*: pip install s3fs"),
        ("gs://bucket/runs", "needs gcsfs, and it cannot be imported.*: pip install gcsfs"),
        ("memory://", "names no bucket: write 'memory://bucket/runs/a'"),
        ("memory://a//b", "single slashes"),
        ("memory://a/../b", "single slashes"),
        (Path("memory://a/b"), "write the text 'memory://a/b'"),
    ],
)
def test_a_url_that_cannot_be_is_refused_at_once(make, url, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)  # as if it were not installed
    with pytest.raises(PathError, match=words):
        make(url)
    assert not list(tmp_path.iterdir())


def locations(url):
    state = lm.TrainState.create(torch.nn.Linear(2, 1), lm.optim.sgd(0.1))
    yield lambda: lm.Profile(url)
    yield lambda: lm.guard("dump", url)
    yield lambda: lm.parallel.setup_logging(url)
    yield lambda: lm.lr_find(step, state, [torch.ones(2, 2)], plot=url)
    yield lambda: lm.checkpoint.export("memory://bucket/one", url)
    yield lambda: Store("memory://bucket/one", staging=url)
    yield lambda: lm.sinks.WandB(dir=url)
    yield lambda: huggingface.save_pretrained(state, url)
    yield lambda: huggingface.save_adapters(state, url)


def test_where_only_a_path_can_be_a_url_is_refused(monkeypatch, tmp_path):
    """Never a local directory that is called `s3:`."""
    monkeypatch.chdir(tmp_path)
    for url, fix in (("s3://bucket/a", "copy it there"), ("file:///data/a", "write '/data/a'")):
        for make in locations(url):
            with pytest.raises(PathError, match=fix):
                make()
    assert not list(tmp_path.iterdir())


def test_staging_is_for_urls():
    with pytest.raises(HyperparameterError, match="staging='here' is where checkpoints wait"):
        Store("runs/a", staging="here")
