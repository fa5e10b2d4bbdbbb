"""`make gpu` without a GPU: the dry run passes, and a check that fails, dies or hangs fails alone."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report, skipped_tests
from benchmarks.gpu.check import GROUPS, Check, Group, Setting, agree
from benchmarks.gpu.supervise import Supervisor
from lumen.errors import HyperparameterError
from tests import zygote
from tests.tiers import pick

ROOT = Path(__file__).parents[2]
# `make test` leaves out the groups whose checks the suite makes on the CPU at length.
OWN = [group.name for group in GROUPS if group.name not in ("graphs", "runs", "laws")]
DRY = pick(OWN, [group.name for group in GROUPS])


def test_the_dry_run_passes(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["--dry-run", "--output", str(tmp_path)]
    done = zygote.run([sys.executable, "-m", "benchmarks.gpu", *DRY, *options], cwd=tmp_path, env=env, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    names = [(group.name, check.name) for group in GROUPS if group.name in DRY for check in group.checks()]
    assert [(result["group"], result["name"]) for result in found["checks"]] == names
    assert {result["status"] for result in found["checks"]} <= {"passed", "needs a GPU", "missing"}
    assert [result["status"] for result in found["checks"]].count("passed") > 40
    assert (tmp_path / "gpu.md").read_text().count("\n| ") == len(names) + 2


def passes(setting: Setting) -> dict[str, Any]:
    return {"answer": 42, "directory": len(list(setting.directory.iterdir()))}


def fails(setting: Setting) -> None:
    raise ValueError("no such kernel")


def refuses(setting: Setting) -> None:
    raise HyperparameterError("fp8 needs another GPU")


def dies(setting: Setting) -> None:
    os.write(2, b"CUDA error: device-side assert")
    os._exit(134)


def hangs(setting: Setting) -> None:
    time.sleep(60)


class Fake(Group):
    """A group that is no module."""

    def checks(self) -> list[Check]:
        return [
            Check("passes", passes),
            Check("dies", dies),
            Check("fails", fails),
            Check("hangs", hangs, seconds=0.5),
            Check("refuses", refuses, may_refuse=True),
            Check("refuses what it should do", refuses),
            Check("needs a GPU", fails, needs_gpu=True),
            Check("needs a package", fails, packages=("no_such_package",)),
            Check("passes too", passes),
        ]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_one_check_fails_alone() -> None:
    results = Supervisor("cpu", time.monotonic() + 60).results(Fake("fake"))
    statuses = {result["name"]: (result["status"], result["message"]) for result in results}
    assert [*statuses] == [check.name for check in Fake("fake").checks()]
    assert statuses["passes"] == statuses["passes too"] == ("passed", "")
    assert statuses["dies"] == ("failed", "its process ended with exit code 134")
    assert "device-side assert" in results[1]["log"]
    assert statuses["fails"] == ("failed", "ValueError: no such kernel")
    assert "in fails" in results[2]["traceback"]
    assert statuses["hangs"] == ("failed", "took longer than 0 s")
    assert "in hangs" in results[3]["log"]  # its stack
    assert statuses["refuses"] == ("refused", "HyperparameterError: fp8 needs another GPU")
    assert statuses["refuses what it should do"][0] == "failed"
    assert statuses["needs a GPU"][0] == "needs a GPU"
    assert statuses["needs a package"] == ("missing", "needs the package no_such_package")
    assert results[0]["figures"] == {"answer": 42, "directory": 0}
    assert report.has_failed(results)
    assert not report.has_failed([result for result in results if result["status"] != "failed"])


def test_what_is_not_reached_is_a_failure() -> None:
    results = Supervisor("cpu", time.monotonic() - 1).results(Fake("fake"))
    assert {result["status"] for result in results} == {"not run"}
    assert report.has_failed(results)


def test_a_group_without_its_packages_is_named() -> None:
    (result,) = Supervisor("cpu", time.monotonic() + 60).results(Fake("fake", packages=("no_such_package",)))
    assert (result["status"], result["message"]) == ("missing", "needs the package no_such_package")


def test_what_keeps_all_from_running_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "finds no GPU here" in capsys.readouterr().err
    assert command.main(["--dry-run", "lawz"]) == 2
    assert "no group lawz; there are: pretraining, " in capsys.readouterr().err
    monkeypatch.setattr(command, "REQUIRED", ("torch", "no_such_package"))
    assert command.main(["--dry-run"]) == 2
    assert "lacks no_such_package" in capsys.readouterr().err


def test_every_test_that_needs_a_gpu_is_run_on_one() -> None:
    skipped = re.compile(r"@pytest\.mark\.skipif\(not torch\.cuda\.is_available\(\)[^\n]*\n(?:@[^\n]*\n)*def (\w+)")
    named = {
        f"{path.relative_to(ROOT)}::{name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in skipped.findall(path.read_text())
    }
    assert named
    assert named <= set(skipped_tests.TESTS)
    assert all((ROOT / test.partition("::")[0]).exists() for test in skipped_tests.TESTS)


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.1]), torch.tensor([1.0]), torch.tensor([1.0, float("nan")])])
def test_what_differs_is_found(wrong: torch.Tensor) -> None:
    right = torch.tensor([1.0, 2.0])
    assert agree({"a": right}, {"a": right.clone()}) == 0.0
    assert agree({"a": right}, {"a": right + 1e-3}, 1e-2) > 0
    with pytest.raises(AssertionError, match="a"):
        agree({"a": wrong}, {"a": right}, 1e-2)
