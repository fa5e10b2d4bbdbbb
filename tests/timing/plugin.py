"""For pytest, while `make test-times` runs: writes down how long each test took."""

from __future__ import annotations

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Once for each of a test's three phases; under xdist in the process that hands tests out."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        line = {"kind": "test", "test": report.nodeid, "seconds": report.duration, "phase": report.when}
        with open(os.environ["LUMEN_TIMES"], "a") as file:
            file.write(json.dumps(line) + "\n")
