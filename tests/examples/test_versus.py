"""Two checkouts beside each other: what is compared with what, and that counted instructions repeat."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import instructions, versus
from tests import zygote

ROOT = Path(__file__).parents[2]

COUNTED = """
import json
from benchmarks.instructions import Counter

def work(repeats):
    total = 0
    for i in range(repeats):
        total += i & 7
    return total

counter, counts = Counter(), []
counter()
for repeats in (1000, 1000, 2000, 4000, 1000, 2000):  # the first one is for Python's own caches
    before = counter()
    work(repeats)
    counts.append(counter() - before)
print(json.dumps(counts[1:]))
"""


class Recorded:
    """A checkout whose figures are known."""

    def __init__(self, *figures):
        self.figures = iter(figures)
        self.asked = []

    def ask(self, case, steps):
        self.asked.append((case, steps))

    def figure(self):
        return next(self.figures)


def row(count, this, other, **options):
    given = argparse.Namespace(**({"task": "mlp", "count": count, "rounds": 0, "steps": 0} | options))
    return versus.compared((this, other), "donate", given)


def test_a_ratio_is_the_median_over_pairs_after_the_first_round():
    this, other = Recorded(9.0, 1.0, 3.0, 8.0), Recorded(1.0, 1.0, 2.0, 2.0)
    assert row("seconds", this, other, rounds=3, steps=5).split(" | ")[4:] == ["1.500", "1.250–2.750 |"]
    assert this.asked == other.asked == [("donate", 5)] * 4


def test_instructions_are_counted_in_few_steps_and_both_at_once():
    this, other = Recorded(*[3e6] * 9), Recorded(*[2e6] * 9)
    assert "| 3,000,000 | 2,000,000 | 1.500 |" in row("instructions", this, other)
    assert this.asked == other.asked == [("donate", versus.STEPS["instructions", "mlp"])]


def test_counting_needs_valgrind(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="does not run under valgrind"):
        instructions.Counter()
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(RuntimeError, match="apt-get install valgrind"):
        instructions.command(tmp_path)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.timeout(240)
def test_counted_instructions_repeat_and_grow_with_the_work(tmp_path):
    before, environment = instructions.command(tmp_path)
    command = [*before, sys.executable, "-c", COUNTED]  # a process of its own, which valgrind starts
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    once, twice, four, once_again, twice_again = json.loads(done.stdout)
    assert once_again == pytest.approx(once, rel=0.005)
    assert twice_again == pytest.approx(twice, rel=0.005)
    assert (four - twice) == pytest.approx(2 * (twice - once), rel=0.02)


@pytest.mark.timeout(240)
def test_a_checkout_beside_itself():
    command = [sys.executable, "-m", "benchmarks.versus", str(ROOT)]
    options = ["--cases", "runner-nothing", "--rounds", "1", "--steps", "8"]
    done = zygote.run([*command, *options], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, last = done.stdout.splitlines()
    assert float(last.split(" | ")[4]) > 0
    assert last.startswith("| mlp | runner-nothing |")
