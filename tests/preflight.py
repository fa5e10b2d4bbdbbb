"""What `make test` looks at before the tests: a broken environment ends in one line that says what to do.

python tests/preflight.py --install     before the environment is made
python tests/preflight.py --workers 2   before the tests; --some when not all of them are to run
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What all tests come to, on two cores that do nothing else.
TESTS = 6630
MINUTES = 30

PYTHON = (3, 11)
TOOLS = ("pytest", "pytest-xdist", "pytest-timeout", "hypothesis")
LITTLE = 2**20
# Free bytes that the tests need, and an environment, at the least.
TEMPORARY, CACHE, SHARED, ENVIRONMENT = 2 * 2**30, 2**28, 2**26, 4 * 2**30
BUILD = 60.0  # seconds that a compiler has for ten lines
PROGRAM = """
#include <Python.h>
#include <vector>
extern "C" long answer() { std::vector<long> some{40, PY_MAJOR_VERSION - 1}; return some[0] + some[1]; }
"""


class BrokenError(Exception):
    """What is wrong, and what to do."""


def python(found: Sequence[int] = sys.version_info) -> None:
    """Whether this Python is new enough."""
    if tuple(found[:2]) < PYTHON:
        version = ".".join(map(str, found[:3]))
        raise BrokenError(
            f"this is Python {version}, and Lumen needs 3.11 or newer: make distclean test PYTHON=python3.11"
        )


def modules() -> None:
    """Whether Python can make an environment: Debian's own has no ensurepip."""
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise BrokenError(
            "this Python cannot make environments: apt-get install python3-venv, or name another: PYTHON=…"
        )


def packages() -> None:
    """Whether Lumen, what it needs and what its tests need can be imported, all from this repository's environment."""
    lacking = [name for name in TOOLS if _version(name) is None]
    if lacking:
        raise BrokenError(f"{', '.join(lacking)} not installed: make distclean test, which makes the environment anew")
    try:
        import lumen
        from lumen.cli.doctor import packages as installed
    except Exception as error:
        said = " ".join(str(error).split())
        raise BrokenError(
            f"`import lumen` fails with {type(error).__name__}: {said}. Make the environment anew: make distclean test"
        ) from error
    home = Path(lumen.__file__).resolve().parents[1]
    if home != ROOT:
        raise BrokenError(f"lumen is imported from {home}, not from {ROOT}: make distclean test (or unset PYTHONPATH)")
    for each in installed.check_packages(quick=True):
        if each.status == "broken":
            raise BrokenError(f"{each.name}: {each.detail}: make distclean test, or {each.fix}")


def launcher() -> None:
    """Whether the tests are no launcher's children: each would take itself for one process of several."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = [name for name in names if name in os.environ]
    if told:
        raise BrokenError(
            f"a launcher's variables are set, and tests start processes of their own: unset {' '.join(told)}"
        )


def compiler() -> None:
    """Whether there is a C++ compiler, with the headers of this Python, as torch.compile and DeepSpeed need them."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    command = shlex.split(name)
    if shutil.which(command[0]) is None:
        raise BrokenError(f"there is no C++ compiler {command[0]}: apt-get install g++, or set CXX to one")
    with tempfile.TemporaryDirectory() as directory:
        source, headers = Path(directory) / "a.cpp", sysconfig.get_paths()["include"]
        source.write_text(PROGRAM)
        out = ["-o", f"{directory}/a.so", "-shared", "-fPIC"]
        out += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        try:
            done = subprocess.run(
                [*command, "-std=c++17", f"-I{headers}", str(source), *out],
                capture_output=True,
                text=True,
                timeout=BUILD,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BrokenError(f"the C++ compiler {name} does not run ({error}): set CXX to another") from error
    if done.returncode == 0:
        return
    if "Python.h" in done.stderr and not (Path(headers) / "Python.h").exists():
        raise BrokenError(f"the headers of this Python are not in {headers}: apt-get install python3-dev")
    said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
    raise BrokenError(f"the C++ compiler {name} fails ({said.strip()}): apt-get install g++, or set CXX to another")


def space(places: Iterable[tuple[Path, int, str]] | None = None) -> None:
    """Whether the tests can write what they write, and there is room for it."""
    for directory, need, fix in _places() if places is None else places:
        there = next(each for each in (directory, *directory.parents) if each.exists())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(LITTLE))
            free = shutil.disk_usage(there).free
        except OSError as error:
            raise BrokenError(f"nothing can be written to {there} ({error.strerror}): {fix}") from error
        if free < need:
            raise BrokenError(f"{_size(free)} are free in {there}, and {_size(need)} are needed: make room, or {fix}")


def locks() -> None:
    """Whether a build of a kernel that was cut off has left a lock, for which tests would wait without end."""
    from lumen.parallel.deepspeed.engine import stale_locks

    left = stale_locks()
    if left:
        names = " ".join(shlex.quote(str(lock)) for lock in left)
        raise BrokenError(f"a build of a kernel was cut off, and others wait for its lock: rm {names}")


def _places() -> Iterator[tuple[Path, int, str]]:
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError as error:
        raise BrokenError("no directory for temporary files can be written to: set TMPDIR to one that can") from error
    yield temporary, TEMPORARY, "set TMPDIR to another directory"
    yield ROOT, LITTLE, "move the repository"
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    yield Path(cache).expanduser(), CACHE, "set XDG_CACHE_HOME to another directory"
    if Path("/dev/shm").is_dir():  # through which a loader's workers hand batches on
        yield Path("/dev/shm"), SHARED, "give a container more: docker run --shm-size=1g"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def estimate(workers: int) -> str:
    """What lies ahead, in a line.

    >>> "3400 tests" in estimate(2)
    True
    """
    minutes = max(1, round(MINUTES * 2 / min(workers, os.cpu_count() or 1)))
    return (
        f"{TESTS} tests on {workers} workers, about {minutes} minutes here where nothing else runs."
        ' Some of them alone: make test PYTEST_ARGS="-k laws"'
    )


BEFORE_TESTS: tuple[Callable[[], None], ...] = (python, packages, launcher, compiler, space, locks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Look, and say what lies ahead, or the first thing that is wrong; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--some", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    install = (python, modules, lambda: space([(ROOT, ENVIRONMENT, "move the repository")]))
    try:
        for check in install if options.install else BEFORE_TESTS:
            check()
    except BrokenError as broken:
        print("make test cannot start:", " ".join(str(broken).split()), file=sys.stderr)
        return 1
    if not options.install and not options.some:
        print(estimate(options.workers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
