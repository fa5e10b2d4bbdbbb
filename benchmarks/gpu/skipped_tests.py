"""The tests that a machine without a GPU skips, run by pytest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import Checks, Setting

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/laws/test_remat_offload.py::test_on_a_gpu",
    "tests/laws/test_metrics.py::test_states_live_where_the_data_are",
    "tests/unit/test_loader.py::test_what_is_on_its_way_to_cuda_arrives_before_it_is_used",
    "tests/unit/test_doctor.py",
    "tests/unit/test_matmul.py",
    "tests/unit/test_cuda_graphs.py",
)
checks = Checks()


class Outcomes:
    """A plugin that records what became of each test."""

    def __init__(self) -> None:
        self.passed = 0
        self.others: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Once for each of a test's phases."""
        if report.passed and report.when == "call":
            self.passed += 1
        elif not report.passed:
            said = report.longreprtext if report.failed else str(report.longrepr[-1])
            self.others.append(f"{report.nodeid} {report.outcome}: {said[-300:]}")


def _add(test: str) -> None:
    @checks(test, seconds=90, needs_gpu=True)
    def run(setting: Setting) -> dict[str, Any]:
        import pytest

        os.chdir(ROOT)
        outcomes = Outcomes()
        # Warnings of another torch and CUDA are no verdict about the test.
        options = ["-q", "-p", "no:cacheprovider", "-W", "default", f"--basetemp={setting.directory}/pytest"]
        code = pytest.main([*options, test], plugins=[outcomes])
        if code or (outcomes.others and "::" in test):
            raise AssertionError(f"pytest ended with {code}: {'; '.join(outcomes.others) or 'see the log'}")
        return {"passed": outcomes.passed, "skipped": len(outcomes.others)}


for _test in TESTS:
    _add(_test)
