"""`make test` ends in one line that says what to do where the environment is broken."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from lumen.cli.doctor import packages
from lumen.cli.doctor.report import Finding
from tests import preflight
from tests.preflight import BrokenError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests may have a lock, or be a launcher's child."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_is_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main(["--workers", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{preflight.TESTS} tests on 2 workers, about ")
    assert (out.count("\n"), err) == (1, "")
    assert preflight.main(["--install"]) == 0
    assert capsys.readouterr().out == ""


def test_the_estimate_goes_by_what_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert f"about {preflight.MINUTES} minutes" in preflight.estimate(2)
    assert f"about {preflight.MINUTES} minutes" in preflight.estimate(8)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert f"about {2 * preflight.MINUTES} minutes" in preflight.estimate(2)


def test_the_number_of_tests_is_about_right(request: pytest.FixtureRequest) -> None:
    items = request.session.items
    files = {path.name for path in (ROOT / "tests").glob("*/test_*.py")} - {"test_notebooks.py"}
    if files <= {item.path.name for item in items}:
        assert abs(len(items) - preflight.TESTS) < 0.15 * len(items), f"set TESTS to {len(items)} in preflight.py"


# ------------------------------------------------------------------------------------------------ what is broken


def test_one_line_and_no_tests(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise BrokenError("no luck:\n  try again")

    monkeypatch.setattr(preflight, "BEFORE_TESTS", (broken, pytest.fail))
    assert preflight.main([]) == 1
    assert capsys.readouterr() == ("", "make test cannot start: no luck: try again\n")


def test_an_old_python() -> None:
    with pytest.raises(BrokenError, match=r"this is Python 3\.10\.4, .*3\.11 or newer: make distclean test PYTHON="):
        preflight.python((3, 10, 4, "final", 0))


def test_a_python_without_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BrokenError, match="apt-get install python3-venv"):
        preflight.modules()


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("software", "torch", "broken", "not installed", "pip install 'torch>=2.11'")
    monkeypatch.setattr(packages, "check_packages", lambda quick: iter([finding]))
    with pytest.raises(BrokenError, match=r"torch: not installed: make distclean test, or pip install 'torch>=2\.11'"):
        preflight.packages()
    monkeypatch.setattr(preflight, "ROOT", Path("/elsewhere"))
    with pytest.raises(BrokenError, match=r"lumen is imported from .*, not from /elsewhere: make distclean test"):
        preflight.packages()
    monkeypatch.setitem(sys.modules, "lumen", None)
    with pytest.raises(BrokenError, match=r"`import lumen` fails with ModuleNotFoundError: .*make distclean test"):
        preflight.packages()
    monkeypatch.setattr(preflight, "TOOLS", ("no-such-tool", "pytest"))
    with pytest.raises(BrokenError, match="^no-such-tool not installed: make distclean test"):
        preflight.packages()


def test_a_launchers_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BrokenError, match="unset RANK WORLD_SIZE$"):
        preflight.launcher()


def test_no_compiler_or_one_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(BrokenError, match=r"no C\+\+ compiler no-such-compiler: apt-get install g\+\+, or set CXX"):
        preflight.compiler()
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'a.cpp:2:10: fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BrokenError, match=r"fails \(a\.cpp:2:10: fatal error: Python\.h: No such file\): apt-get"):
        preflight.compiler()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(BrokenError, match=r"headers of this Python are not in .*: apt-get install python3-dev"):
        preflight.compiler()
    compiler.write_text("")
    compiler.chmod(0o644)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with pytest.raises(BrokenError, match=r"does not run \(.*Permission denied.*\): set CXX to another"):
        preflight.compiler()


def test_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BrokenError, match=r"are free in .*, and 4294967296\.0 GiB are needed: make room, or move it"):
        preflight.space([(tmp_path / "runs" / "a", 2**62, "move it")])

    def full(dir: Path) -> None:  # noqa: A002
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(BrokenError, match=r"nothing can be written to .* \(No space left on device\): set TMPDIR"):
        preflight.space()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: full(tmp_path))
    with pytest.raises(BrokenError, match="no directory for temporary files can be written to: set TMPDIR"):
        preflight.space()


def test_a_lock_that_a_killed_build_left(tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "py311_cpu" / "shm comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w"):
        preflight.locks()  # somebody is building
    with pytest.raises(BrokenError, match=rf"a build of a kernel was cut off, .*: rm '{lock}'$"):
        preflight.locks()


# -------------------------------------------------------------------------------------------------- the Makefile


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would run."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    command = ["make", "--no-print-directory", "--dry-run", *arguments]
    environment = {"PATH": os.environ["PATH"]}  # what a make around these tests was told is not for this one
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_make_looks_before_it_tests() -> None:
    before, look, test = make("--assume-old=.venv/.dev", "test").stdout.splitlines()[-3:]
    assert "the Python of .venv is gone" in before
    assert look.split() == [".venv/bin/python", "tests/preflight.py", "--workers", "2"]
    assert test.split()[:6] == [".venv/bin/python", "-m", "pytest", "-n", "2", "--dist"]
    assert "preflight.py --workers 2 --some\n" in make("test", "PYTEST_ARGS=-k laws").stdout


def test_another_torch_has_an_environment_of_its_own() -> None:
    lines = make("test", "TORCH=2.99.0+cpu").stdout
    assert "-m venv .venv-torch-2.99.0+cpu\n" in lines
    assert "grep -vE '^(torch|setuptools)==' constraints.txt > .venv-torch-2.99.0+cpu/constraints.txt\n" in lines
    assert "echo 'torch==2.99.0+cpu' >>" in lines
    assert "install --quiet  -c .venv-torch-2.99.0+cpu/constraints.txt -e '.[dev]'\n" in lines
    assert ".venv/" not in lines
    for wrong in ("newest", "2.14.x y", ">=2.14"):
        found = make("test", f"TORCH={wrong}")
        assert found.returncode
        assert f"TORCH={wrong} is no version of torch. Write one out" in found.stderr
