"""The example scripts run as their docstrings say, on their real data."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import TextIO

import pytest
import safetensors.torch

import lumen as lm
from lumen.core.versions import version_of
from tests import zygote

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *args: str, cwd: Path, processes: int = 1) -> str:
    """What the script prints, from as many processes as torchrun would start (which has tests of its own)."""
    command = [sys.executable, str(EXAMPLES / script), *args]
    if processes == 1:
        done = zygote.run(command, cwd=cwd, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    jobs = zygote.launch(command, processes, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = ""
    try:
        for job in jobs:
            out, err = job.communicate(timeout=280)
            assert job.returncode == 0, err[-3000:]
            said += out
    finally:
        for job in jobs:
            job.kill()
    return said


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def final(path: Path, name: str) -> float:
    return [row[name] for row in rows(path) if name in row][-1]


def test_the_pictures_of_the_documentation_are_made_by_their_script(tmp_path: Path) -> None:
    def trained(rundir: Path, lr: float, epochs: int) -> Path:
        """What a run of the example leaves, whose training has tests of its own."""
        sink = lm.sinks.JSONL(rundir / "metrics.jsonl")
        for epoch in range(epochs):
            names = ("train/loss", "val/loss", "train/accuracy", "val/accuracy")
            sink.log(epoch, {"epoch": epoch, **dict.fromkeys(names, lr)})
        sink.close()
        return rundir

    script = EXAMPLES.parent / "docs/images/make.py"
    main = runpy.run_path(str(script))["main"]
    main.__globals__["train"] = trained
    assert main(3, tmp_path / "run.png") == 0
    made, kept = (tmp_path / "run.png").read_bytes(), (script.parent / "run.png").read_bytes()
    assert made[:24] == kept[:24], "a PNG of the same size"
    assert len(kept) < 100_000
    assert "docs/images/run.png" in (EXAMPLES.parent / "README.md").read_text()


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path: Path) -> None:
    out = run("digits.py", cwd=tmp_path)
    assert "val/accuracy" in out
    assert final(tmp_path / "runs/digits/metrics.jsonl", "val/accuracy") >= 0.98
    assert list((tmp_path / "runs/digits").glob("events.out.tfevents.*"))
    best = Path(re.search(r"best checkpoint, accuracy [\d.]+: (\S+)", out)[1])
    assert (tmp_path / best / "meta/metadata").exists()
    before = rows(tmp_path / "runs/digits/metrics.jsonl")
    assert str(best) in run("digits.py", cwd=tmp_path)  # it is through: nothing is trained again
    assert rows(tmp_path / "runs/digits/metrics.jsonl") == before


@pytest.mark.slow
def test_digits_with_every_transform(tmp_path: Path) -> None:
    names = ("accumulate", "ema", "bf16", "guard", "donate")
    run("digits.py", "--epochs", "6", "--transforms", *names, cwd=tmp_path)
    assert final(tmp_path / "runs/digits/metrics.jsonl", "val/accuracy") >= 0.85


def forked(command: list[str], stdout: TextIO, stderr: int) -> zygote.Process:
    """In place of `subprocess.Popen`: as real a process, without the seconds of its imports."""
    return zygote.start(command, stdout=stdout.fileno(), stderr=stderr)


@pytest.mark.slow
def test_resume_proves_itself(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(EXAMPLES / "resume.py"))
    started = script["prove"].__globals__
    started["subprocess"] = types.SimpleNamespace(Popen=forked, STDOUT=subprocess.STDOUT)
    script["main"](script["Config"](prove=True, epochs=4))
    out = capsys.readouterr().out
    assert out.count("SIGKILL") == 3
    assert out.count("SIGTERM") == 1
    tensors, equal = re.search(r"(\d+) tensors, (\d+) of them bitwise", out).groups()
    assert int(tensors) == int(equal) > 40
    rows, same, wanted = re.search(r"(\d+) rows, (\d+) of the (\d+)", out).groups()
    assert int(rows) == int(same) == int(wanted) > 20


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_resume_goes_on_after_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "resume.py"), "--epochs", "12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = zygote.start(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    log = tmp_path / "runs/resume/metrics.jsonl"
    while job.poll() is None and not (log.exists() and len(rows(log)) > 4):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate()
    assert job.returncode == 75
    saved = int(re.search(r"saved at step (\d+): start me again", said)[1])
    assert (tmp_path / f"runs/resume/checkpoints/{saved}").is_dir()
    out = run("resume.py", "--epochs", "12", cwd=tmp_path)
    assert "Epochs(12), after 276 steps" in out
    # The steps before are not made again: the file has each of them once.
    trained = [row["step"] for row in rows(log) if "train/loss" in row]
    assert trained == sorted(set(trained))
    assert final(log, "val/accuracy") >= 0.95
    exported = safetensors.torch.load_file(tmp_path / "runs/resume/best.safetensors")
    assert exported["10.weight"].shape == (10, 256)


@pytest.mark.slow
@pytest.mark.parametrize("names", [("donate",), ("accumulate", "bf16", "compile", "ema", "donate")], ids="-".join)
def test_char_lm_learns(tmp_path: Path, names: tuple[str, ...]) -> None:
    size = (
        ("--layers", "1", "--width", "32", "--heads", "2") if "compile" in names else ("--layers", "2", "--width", "64")
    )
    small = ("--steps", "40", *size, "--sample", "20", "--lr", "5e-3")
    out = run("char_lm.py", *small, "--transforms", *names, cwd=tmp_path)
    assert "def " in out
    assert final(tmp_path / "runs/char_lm/metrics.jsonl", "val/loss") < 0.8 * math.log(100)


def test_hydra_composes_what_is_named(tmp_path: Path) -> None:
    settings = ("steps=20", "warmup=4", "progress=false", "lr=3e-3")
    choices = ("optimizer=lion", "transforms=mixed", "strategy=fsdp")
    out = run("hydra/train.py", *choices, *settings, cwd=tmp_path, processes=2)
    rundir = tmp_path / "runs/hydra/convnet-lion-mixed-fsdp"
    assert re.search(r"val/accuracy 0\.\d+ after 20 steps: (\S+)", out)[1] == str(rundir)
    assert final(rundir / "metrics.jsonl", "val/accuracy") > 0.3
    kept = lm.checkpoint.metadata(rundir / "checkpoints/20")["meta"]
    assert kept["config"]["optimizer"]["_target_"] == "lumen.optim.lion"
    assert (kept["config"]["model"]["width"], kept["config"]["lr"]) == (32, 3e-3)
    for name in ("lm.guard", "lm.ema(0.98", "lm.donate()", "lm.fsdp(", "lm.accumulate(2)", "lm.precision('bf16')"):
        assert name in kept["step"], name
    assert "lr: 0.003" in (rundir / ".hydra/config.yaml").read_text()


def test_hydra_sweeps(tmp_path: Path) -> None:
    choices = ("model=mlp,convnet", "optimizer=adamw,sgd", "transforms=plain")
    out = run("hydra/train.py", "--multirun", *choices, "steps=20", "warmup=4", "progress=false", cwd=tmp_path)
    assert out.count("after 20 steps") == 4
    runs = sorted(each.parent for each in (tmp_path / "runs/hydra/sweep").glob("*/metrics.jsonl"))
    assert len(runs) == 4
    assert len({final(each / "metrics.jsonl", "val/loss") for each in runs}) == 4


@pytest.mark.slow
def test_digits_on_two_processes(tmp_path: Path) -> None:
    out = run("digits.py", "--epochs", "6", cwd=tmp_path, processes=2)
    assert out.count("best checkpoint") == 1, "one of them speaks"
    log = rows(tmp_path / "runs/digits/metrics.jsonl")
    steps = [row["step"] for row in log if "train/loss" in row]
    assert steps == sorted(set(steps))
    assert final(tmp_path / "runs/digits/metrics.jsonl", "val/accuracy") >= 0.9


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_char_lm_goes_on_under_every_strategy(tmp_path: Path) -> None:
    small = ("--layers", "1", "--width", "32", "--context", "32", "--sample", "20", "--checkpoint")
    ways = [("fsdp", 2), ("hsdp", 4), ("fsdp-tensor", 4), ("tensor", 2), ("ddp-tensor", 4), ("ddp", 1)]
    for number, (strategy, processes) in enumerate(ways, 1):
        steps = str(10 * number)
        out = run("char_lm.py", *small, "--steps", steps, "--strategy", strategy, cwd=tmp_path, processes=processes)
        assert out.count("nats per character") == 1
    trained = [row["step"] for row in rows(tmp_path / "runs/char_lm/metrics.jsonl") if "train/loss" in row]
    assert trained == sorted(set(trained))
    assert trained[-1] == 60
    assert final(tmp_path / "runs/char_lm/metrics.jsonl", "val/loss") < 0.8 * math.log(100)


@pytest.mark.skipif(version_of("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_goes_on_alone_under_another_stage(tmp_path: Path) -> None:
    common = ("--no-progress", "--rundir", "run")
    out = run("zero.py", *common, "--steps", "50", "--stage", "3", "--accumulate", "2", cwd=tmp_path, processes=2)
    assert '"gradient_accumulation_steps": 2' in out
    run("zero.py", *common, "--steps", "100", "--stage", "1", cwd=tmp_path)
    assert rows(tmp_path / "run/metrics.jsonl")[-1]["step"] == 100
    assert final(tmp_path / "run/metrics.jsonl", "val/accuracy") > 0.94


@pytest.mark.parametrize("script", sorted(each.name for each in EXAMPLES.glob("*.py")))
def test_each_script_says_how_it_is_run_and_what_comes_out(script: str) -> None:
    text = (EXAMPLES / script).read_text()
    assert f"    python examples/{script}" in text
    assert re.search(r"\bExpected: ", text)
    assert "tyro.cli(Config, description=__doc__)" in text
