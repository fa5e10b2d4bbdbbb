"""What a run says of itself: versions, commit and command line, and nothing of the machine."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lumen.sinks import run_info
from tests import zygote

ROOT = Path(__file__).parents[2]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(
        "import json\nfrom lumen.sinks import run_info\nprint(json.dumps(run_info()))\n"
    )
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    return tmp_path


def test_versions_and_command_are_plain_data(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.1"])
    info = run_info(tmp_path)
    assert json.loads(json.dumps(info)) == info
    assert info["command"] == ["train.py", "--lr", "0.1"]
    versions = info["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == np.__version__
    assert versions["torch"] == str(torch.__version__)
    assert versions["cuda"] == torch.version.cuda
    text = json.dumps(info)
    assert str(tmp_path) not in text
    assert os.getcwd() not in text


@needs_git
def test_commit_and_changes(repository):
    commit = git(repository, "rev-parse", "HEAD").strip()
    assert run_info(repository / "code")["git"] == {"commit": commit, "dirty": False}
    (repository / "outputs.txt").write_text("untracked files are what a run writes")
    assert run_info(repository / "code")["git"] == {"commit": commit, "dirty": False}
    (repository / "code" / "train.py").write_text("changed")
    assert run_info(repository / "code")["git"] == {"commit": commit, "dirty": True}


@needs_git
def test_it_is_the_commit_of_the_script(repository, tmp_path_factory):
    commit = git(repository, "rev-parse", "HEAD").strip()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    script = repository / "code" / "train.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = zygote.run([sys.executable, str(script)], cwd=elsewhere, env=environment)
    info = json.loads(done.stdout)
    assert info["git"] == {"commit": commit, "dirty": False}
    assert info["command"] == [str(script)]


@needs_git
def test_no_commit_yet_or_no_repository_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_info(tmp_path)["git"] is None
    assert run_info(tmp_path / "missing")["git"] is None
    git(tmp_path, "init")
    assert run_info(tmp_path)["git"] is None


def test_no_git_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_info()["git"] is None


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_a_git_that_hangs_is_none(tmp_path, monkeypatch):
    script = tmp_path / "git"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("lumen.sinks.info._GIT_TIMEOUT", 0.1)
    assert run_info()["git"] is None
