"""The scripts for Ray, where it is installed: a lost worker changes nothing, and a search ends trials."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import lumen as lm

pytest.importorskip("ray.train.torch", reason="the ray extra is not installed")

SCRIPT = Path(__file__).parents[2] / "examples/ray_train.py"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_lost_worker_changes_nothing(tmp_path):
    lost, alone = tmp_path / "lost", tmp_path / "alone"
    command = [sys.executable, str(SCRIPT), "--epochs", "4", "--lose-one-at", "30", "--rundir", str(lost)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after 48 steps on 2 workers" in done.stdout
    assert "resumed from" in done.stdout + done.stderr
    assert (lost / "lost").exists()

    spec = importlib.util.spec_from_file_location("ray_train", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["ray_train"] = script  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(script)
        script.train_loop(asdict(script.Config(epochs=4, rundir=alone)))
    finally:
        del sys.modules["ray_train"]
    found, expected = (lm.checkpoint.load(lm.Checkpointer(each).latest())["params"] for each in (lost, alone))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    steps = [json.loads(line)["step"] for line in (lost / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "the resumed run has removed what the lost one logged after its checkpoint"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_ends_trials_by_their_validation(tmp_path):
    script = SCRIPT.parent / "ray_tune.py"
    settings = ["--trials", "4", "--epochs", "3", "--batch-size", "256", "--rundir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *settings], capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy, stopped = re.search(r"val/accuracy ([\d.]+) with .*; (\d) of 4 trials were stopped", done.stdout).groups()
    logs = [path.read_text().splitlines() for path in tmp_path.glob("trials/*/metrics.jsonl")]
    found = [[row["val/accuracy"] for row in map(json.loads, log) if "val/accuracy" in row] for log in logs]
    assert len(found) == 4
    assert sum(len(values) < 3 for values in found) == int(stopped) > 0
    assert max(values[-1] for values in found) == pytest.approx(float(accuracy), abs=1e-4)
