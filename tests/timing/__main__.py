"""Where the time of the tests goes: `make test-times`, or `python -m tests.timing PYTEST-ARGUMENTS`.

Runs pytest with every Python process, every call of the C++ compiler and every test written down, and prints tables.
With COVERAGE=1 the lines and branches of lumen/ that ran in any process are counted too.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SLOWEST = 15


def main(arguments: list[str]) -> int:
    """Run, and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.jsonl")
        environment = _environment(log, Path(folder))
        began = time.monotonic()
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "tests.timing.plugin", *arguments], cwd=ROOT, env=environment
        ).returncode
        wall = time.monotonic() - began
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        sys.stdout.write("\n".join([*_tables(rows, wall), ""]))
        sys.stdout.flush()
        if "COVERAGE_PROCESS_START" in environment:
            _covered(Path(folder))
    return code


def _environment(log: Path, folder: Path) -> dict[str, str]:
    environment = {**os.environ, "LUMEN_TIMES": str(log)}
    environment["PATH"] = f"{HERE / 'bin'}:{os.environ['PATH']}"
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])])
    if os.environ.get("COVERAGE"):
        options = ["branch = true", "parallel = true", f"source = {ROOT / 'lumen'}", "sigterm = true"]
        options.append("patch = _exit, fork")  # forks end without Python's exit handlers
        settings = folder / "coveragerc"
        settings.write_text("\n".join(["[run]", *options, f"data_file = {folder / '.coverage'}"]))
        environment["COVERAGE_PROCESS_START"] = str(settings)
    return environment


def _tables(rows: list[dict[str, Any]], wall: float) -> Iterable[str]:
    seconds: dict[str, float] = collections.defaultdict(float)
    for row in rows:
        if row["kind"] == "test":
            seconds[row["test"]] += row["seconds"]
    folders: dict[str, list[float]] = collections.defaultdict(list)
    for test, took in seconds.items():
        folders["/".join(test.split("/")[:2])].append(took)
    kinds = collections.Counter(row["kind"] for row in rows)
    cpu = sum(row["cpu"] for row in rows if row["kind"] == "end")
    yield "\n| | |\n|---|---|"
    yield f"| wall time | {wall:.0f} s |"
    yield f"| tests | {len(seconds)}, {sum(seconds.values()):.0f} s in all workers together |"
    yield f"| Python processes started | {kinds['start']}; {cpu:.0f} s of processor time where not killed |"
    yield f"| processes forked from one that is loaded | {kinds['fork']} |"
    yield f"| calls of the C++ compiler | {kinds['g++']} |"
    yield "\n| folder | tests | seconds |\n|---|---|---|"
    for folder, took in sorted(folders.items(), key=lambda item: -sum(item[1])):
        yield f"| {folder} | {len(took)} | {sum(took):.0f} |"
    yield f"\n| the {SLOWEST} slowest tests | seconds |\n|---|---|"
    for test, took in sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]:
        yield f"| {test} | {took:.1f} |"


def _covered(folder: Path) -> None:
    settings = f"--rcfile={folder / 'coveragerc'}"
    subprocess.run([sys.executable, "-m", "coverage", "combine", settings, "--quiet"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "coverage", "report", settings, "--skip-covered"], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
