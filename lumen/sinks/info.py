"""The environment of a run: versions, the commit of the user's code and the command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumen.core.versions import own_version

_GIT_TIMEOUT = 5.0  # seconds: a work tree on a slow disk must not delay the run


def run_info(directory: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Versions, git commit and command line of this process, as JSON values.

    `git` is the `commit` of the repository that contains `directory` (default: that of the running script, or the
    working directory in a notebook) and whether tracked files have changed since (`dirty`); None without git or a
    repository. The result contains no machine or user name, and no paths except those of the command line.

    >>> import lumen as lm
    >>> info = lm.sinks.run_info()
    >>> sorted(info), sorted(info["versions"])
    (['command', 'git', 'versions'], ['cuda', 'lumen', 'numpy', 'python', 'torch'])
    """
    return {
        "versions": {
            "lumen": own_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "git": _git_state(Path(directory) if directory is not None else _script_directory()),
        "command": list(sys.argv),
    }


def _script_directory() -> Path:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(script).absolute().parent if script else Path.cwd()


def _git_state(directory: Path) -> dict[str, Any] | None:
    commit = _git(directory, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    # Otherwise git status refreshes the index, under a lock that may block the user's own git.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(directory), *arguments]
    try:
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT,
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return process.stdout.strip()
