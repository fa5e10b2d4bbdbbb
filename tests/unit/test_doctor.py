"""`lumen doctor`: each finding is what is there, and says how to mend it where it is not."""

from __future__ import annotations

import json
import tomllib
import types
from pathlib import Path
from typing import IO

import pytest
import torch

from lumen.cli import subprocesses
from lumen.cli.doctor import machine, packages, storage
from lumen.cli.doctor.processes import check_environment, check_processes
from lumen.cli.doctor.report import Finding, print_report, summarize
from lumen.cli.main import main
from lumen.cli.subprocesses import run_all, run_program
from lumen.core.versions import version_of
from tests import zygote

ROOT = Path(__file__).parents[2]
WORLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
DEVELOPERS = {"bench", "dev", "docs"}


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in forks that have torch loaded. Other tests show that they run in processes that begin afresh."""

    def start(command: list[str], env: dict[str, str], stdout: IO[bytes], stderr: IO[bytes]) -> zygote.Process:
        return zygote.start(command, env=env, stdout=stdout.fileno(), stderr=stderr.fileno())

    monkeypatch.setattr(subprocesses, "subprocess", types.SimpleNamespace(Popen=start))


# ---------------------------------------------------------------------------------------------- software


def test_the_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(packages.CORE) == sorted(project["dependencies"])
    extras = {name: tuple(each) for name, each in project["optional-dependencies"].items() if name not in DEVELOPERS}
    assert extras == packages.EXTRAS


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of packages on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def put(shelf: Path, name: str, version: str, code: str | None = "") -> None:
    """A distribution with metadata, and (unless `code` is None) its module."""
    meta = shelf / f"{name}-{version}.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if code is not None:
        (shelf / f"{name}.py").write_text(code)


def look(requirement: str, extra: str | None = None, quick: bool = False) -> tuple[str, str, str]:
    found = packages.check_package(requirement, extra, quick=quick)
    return found.status, found.detail, found.fix


def test_a_package_that_works_and_four_that_do_not(shelf: Path) -> None:
    put(shelf, "sound", "1.10.0rc1")
    put(shelf, "old", "1.9.4")
    put(shelf, "hollow", "2.0", code=None)
    put(shelf, "torn", "2.0", code="import sound\nraise ImportError('libtorn.so is not there')")
    put(shelf, "deadly", "2.0", code="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert look("sound>=1.9") == ("ok", "1.10.0rc1", "")
    assert look("old>=1.10") == ("broken", "1.9.4, older than 1.10", "pip install 'old>=1.10'")
    assert look("hollow>=1")[:2] == ("broken", "2.0 is installed, but its module hollow is not")
    status, found, fix = look("torn>=1", "extra")
    assert (status, found) == ("broken", "2.0, but the import fails: ImportError: libtorn.so is not there")
    assert "pip install --force-reinstall torn" in fix
    assert look("torn>=1", "extra", quick=True)[0] == "ok"
    assert look("deadly>=1")[:2] == ("broken", "2.0, but the import fails: was killed by SIGSEGV")
    assert look("absent>=1") == ("broken", "not installed", "pip install 'absent>=1'")
    assert look("absent>=1", "extra") == ("missing", "not installed", "pip install '.[extra]' in the clone of Lumen")


def test_all_that_is_installed_here_is_found() -> None:
    found = {each.name: each for each in packages.check_packages(quick=True)}
    assert found["torch"].detail.startswith(f"{version_of('torch')}, built for ")
    assert [found[name].status for name in ("Python", "torch", "orbax-checkpoint", "tyro [examples]")] == ["ok"] * 4


def test_what_torch_lacks_is_told(monkeypatch: pytest.MonkeyPatch, forks: None) -> None:
    gone = "torch._gone (for it; found in torch 2.11)"
    lacking = f"from lumen.core import _torch_compat\n_torch_compat.missing = lambda: [{gone!r}]\n"
    monkeypatch.setattr(packages, "_INTERNALS_PROGRAM", lacking + packages._INTERNALS_PROGRAM)
    found = packages.check_internals()
    assert (found.status, found.detail) == ("broken", f"ImportError: torch lacks {gone}")
    assert "pip install 'torch==2." in found.fix


# ---------------------------------------------------------------------------------------------- children


def test_one_that_fails_ends_the_one_that_waits_for_it() -> None:
    program = "import os, time\nif os.environ['WHO'] == 'b': raise OSError('gone')\ntime.sleep(600)"
    assert run_all(program, [{"WHO": "a"}, {"WHO": "b"}], timeout=60.0) == "OSError: gone"
    assert run_all("print(1)", [{}, {}], timeout=60.0) is None


def test_a_child_is_none_of_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("KEPT", "1")
    names = ("RANK", "TORCHELASTIC_RUN_ID", "KEPT")
    assert run_program(f"import os; raise SystemExit(str([n for n in {names} if n in os.environ]))", 60.0) == "['KEPT']"
    assert run_program("import time; time.sleep(60)", 0.1) == "did not finish within 0 s"


# --------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({}, "no launcher"),
        (WORLD, "torchrun: RANK=1, WORLD_SIZE=2, MASTER_ADDR=127.0.0.1, MASTER_PORT=29500"),
        ({"MASTER_ADDR": "there"}, "no launcher"),
    ],
)
def test_a_whole_environment_or_none_is_ok(told: dict[str, str], found: str) -> None:
    answer = check_environment(told)
    assert (answer.status, answer.fix) == ("ok", "")
    assert answer.detail.startswith(found)


@pytest.mark.parametrize(
    ("told", "found", "fix"),
    [
        ({"WORLD_SIZE": "2"}, "but RANK is not set", "env -u WORLD_SIZE"),
        ({**WORLD, "RANK": "two"}, "RANK='two' must be a number", "env -u RANK"),
        ({**WORLD, "RANK": "2"}, "RANK=2 must be less than WORLD_SIZE=2", "env -u RANK"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, "SLURM_STEP_NUM_TASKS is not set", "env -u SLURM_PROCID"),
    ],
)
def test_half_an_environment_is_told(told: dict[str, str], found: str, fix: str) -> None:
    answer = check_environment(told)
    assert answer.status == "broken"
    assert found in answer.detail
    assert fix in answer.fix


def test_more_processes_than_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check_environment({**WORLD, "LOCAL_RANK": "0"}).status == "ok"
    assert "there are 1 GPUs" in check_environment({**WORLD, "LOCAL_RANK": "1"}).detail


@pytest.mark.distributed
def test_two_processes_meet_or_say_why_not(monkeypatch: pytest.MonkeyPatch, forks: None) -> None:
    names = [each.name for each in check_processes(quick=True)]
    assert names[:3] == ["environment", "gloo", "nccl"]
    assert "two processes" not in names
    met = {each.name: each for each in check_processes(quick=False)}["two processes"]
    assert (met.status, met.detail) == ("ok", "an all-reduce over Gloo succeeds")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    met = {each.name: each for each in check_processes(quick=False)}["two processes"]
    assert met.status == "broken"
    assert "nosuch0" in met.detail
    assert "GLOO_SOCKET_IFNAME" in met.fix


# ----------------------------------------------------------------------------------------------- machine


def test_devices_are_tried() -> None:
    found = {each.name: each for each in machine.check_devices()}
    assert found["CPU"].status == "ok"
    assert torch.backends.cpu.get_cpu_capability() in found["CPU"].detail
    assert found["float32 products"].detail == "computed in float32 ('highest')"
    cuda = [name for name in found if name.startswith("CUDA")]
    assert cuda == ([f"CUDA {i}" for i in range(torch.cuda.device_count())] or ["CUDA"])


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
def test_a_device_that_does_not_work_is_told() -> None:
    status, said, fix = machine._test_device("mps", "a GPU")
    assert status == "broken"
    assert said.startswith("a GPU: ")
    assert "pytorch.org" in fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host compiler is not what is tried on a GPU")
def test_a_compiler_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by a fork: its settings of the compiler are those of when it was loaded.
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = machine.check_compiler()
    assert (found.status, found.name) == ("broken", "torch.compile")
    assert "C++ compiler" in found.detail
    assert "apt-get install g++" in found.fix
    monkeypatch.delenv("CXX")
    found = machine.check_compiler()
    assert (found.status, found.detail) == ("ok", "compiles for cpu")


# ----------------------------------------------------------------------------------------------- storage


def statuses(directory: Path) -> dict[str, Finding]:
    return {each.name: each for each in storage.check_directory(directory)}


def test_a_directory_that_takes_checkpoints(tmp_path: Path) -> None:
    found = statuses(tmp_path)
    assert [each.status for each in found.values()] == ["ok"] * 3
    assert found[str(tmp_path)].detail.startswith("writable; 1 MiB was synced to disk in ")
    deeper = tmp_path / "runs" / "a"
    assert f"can be created in {tmp_path};" in statuses(deeper)[str(deeper)].detail
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_directories_that_take_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (finding,) = statuses(tmp_path / "file" / "runs").values()
    assert (finding.status, finding.detail) == ("broken", f"{tmp_path / 'file'} is not a directory")
    (finding,) = statuses(Path("/proc/lumen")).values()
    assert finding.status == "broken"
    assert finding.detail.startswith("cannot write to /proc: ")
    monkeypatch.setattr(storage, "_MIN_FREE", 2**62)
    assert statuses(tmp_path)["space"].status == "broken"


# ----------------------------------------------------------------------------------------------- reports


def test_a_report_has_a_line_for_each_and_the_fix_below(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("a", "one", "ok", "1.0"), Finding("b", "two", "broken", "\x1b[31mno", "do this\nor that")]
    print_report(findings)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["a"],
        ["ok", "one", "1.0"],
        [],
        ["b"],
        ["broken", "two", "\\x1b[31mno"],
        ["fix:", "do", "this"],
        ["or", "that"],
        [],
    ]
    assert summarize(findings) == "1 thing is broken: see above."
    assert summarize(findings[:1]) == "Nothing is broken."


def test_doctor_ends_with_1_where_something_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--quick", "--checkpoints", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Nothing is broken." in out
    assert f"  ok       {tmp_path}" in out
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor", "--quick", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert list(dict.fromkeys(each["section"] for each in answer["findings"])) == ["software", "devices", "processes"]
    (broken,) = [each for each in answer["findings"] if each["status"] == "broken"]
    assert (broken["section"], broken["name"]) == ("processes", "environment")
    assert "torchrun --nproc-per-node=2" in broken["fix"]
