"""The example scripts run as their docstrings say, on their real data."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *args: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *args],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def final(path: Path, name: str) -> float:
    return [row[name] for row in rows(path) if name in row][-1]


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path: Path) -> None:
    out = run("digits.py", cwd=tmp_path)
    assert "val/accuracy" in out
    assert final(tmp_path / "runs/digits/metrics.jsonl", "val/accuracy") >= 0.98
    assert list((tmp_path / "runs/digits").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_digits_with_every_transform(tmp_path: Path) -> None:
    names = ("accumulate", "ema", "bf16", "guard", "donate")
    run("digits.py", "--epochs", "6", "--transforms", *names, cwd=tmp_path)
    assert final(tmp_path / "runs/digits/metrics.jsonl", "val/accuracy") >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("names", [("donate",), ("accumulate", "bf16", "compile", "ema", "donate")], ids="-".join)
def test_char_lm_learns(tmp_path: Path, names: tuple[str, ...]) -> None:
    small = ("--steps", "40", "--layers", "2", "--width", "64", "--sample", "20", "--lr", "5e-3")
    out = run("char_lm.py", *small, "--transforms", *names, cwd=tmp_path)
    assert "def " in out
    assert final(tmp_path / "runs/char_lm/metrics.jsonl", "val/loss") < 0.8 * math.log(100)
