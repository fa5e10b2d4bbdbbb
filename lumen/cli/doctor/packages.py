"""`lumen doctor`: Python, torch, Lumen, and the packages that they are to find beside them."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from lumen.cli.doctor.report import Finding
from lumen.cli.subprocesses import alone
from lumen.core._torch_compat import TRIED
from lumen.core.versions import own_version, version_of

# As in pyproject.toml: what Lumen always needs, and what its extras are for.
CORE = (
    "torch>=2.11",
    "numpy>=1.26",
    "optree>=0.14",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.5",
    "torchmetrics>=1.6",
    "tensorboardX>=2.6.2",
    "rich>=13.7",
)
EXTRAS = {
    "deepspeed": ("deepspeed>=0.19",),
    "examples": ("scikit-learn>=1.5", "matplotlib>=3.9", "tyro>=0.9"),
    "hf": ("transformers>=5.20", "datasets>=3.2"),
    "hydra": ("hydra-core>=1.3",),
    "mlflow": ("mlflow>=2.20",),
    "dp-sgd": ("dp-accounting>=0.5",),
    "quant": ("torchao>=0.18",),
    "wandb": ("wandb>=0.19.10", "pillow>=10"),
}
# Where a distribution's module has another name.
MODULES = {
    "dp-accounting": "dp_accounting",
    "hydra-core": "hydra",
    "orbax-checkpoint": "orbax.checkpoint",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
_PRIVATE = """
from lumen.core._torch_compat import missing
if missing():
    raise ImportError(f"torch lacks {', '.join(missing())}")
"""
_SECTION = "software"
_IMPORT = 120.0  # seconds
_PYTHON = (3, 11)


def software(quick: bool) -> Iterator[Finding]:
    """Python and all packages; unless `quick`, each is imported, in a process of its own."""
    yield _python()
    yield Finding(_SECTION, "lumen", "ok", own_version() or "from a source tree, not installed")
    needed = [(requirement, None) for requirement in CORE]
    offered = [(requirement, extra) for extra, requirements in EXTRAS.items() for requirement in requirements]
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda each: package(*each, quick=quick), [*needed, *offered])
    if not quick:
        yield internals()


def package(requirement: str, extra: str | None, *, quick: bool) -> Finding:
    """One package: whether it is there, new enough, and can be imported. `extra` is None for one that must be.

    >>> package("no-such-package>=1.0", "wandb", quick=True).fix
    "pip install 'lumen-torch[wandb]'"
    >>> package("torch>=2.11", None, quick=True).status
    'ok'
    """
    name, _, least = requirement.partition(">=")
    version, label = version_of(name), name if extra is None else f"{name} [{extra}]"
    fix = f"pip install '{requirement}'" if extra is None else f"pip install 'lumen-torch[{extra}]'"
    if version is None:
        return Finding(_SECTION, label, "broken" if extra is None else "missing", "not installed", fix)
    if _parts(version) < _parts(least):
        return Finding(_SECTION, label, "broken", f"{version}, older than {least}", f"pip install '{requirement}'")
    module = MODULES.get(name, name)
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Finding(_SECTION, label, "broken", f"{version} is installed without its module {module}", _again(name))
    wrong = None if quick else alone(f"import {module}", _IMPORT)
    if wrong is not None:
        return Finding(_SECTION, label, "broken", f"{version}, whose import fails: {wrong}", _again(name))
    return Finding(_SECTION, label, "ok", f"{version}{_build()}" if name == "torch" else version)


def internals() -> Finding:
    """Whether torch has what Lumen uses of it beyond what torch promises to keep."""
    name, tried = "torch's internals", f"{TRIED[0]} to {TRIED[-1]}"
    wrong = alone(_PRIVATE, _IMPORT)
    if wrong is None:
        return Finding(_SECTION, name, "ok", f"all that Lumen uses, as in torch {tried}")
    fix = f"install a torch that Lumen is tested with, {tried}: pip install 'torch=={TRIED[-1]}.*'"
    return Finding(_SECTION, name, "broken", wrong, fix)


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < _PYTHON:
        return Finding(_SECTION, "Python", "broken", found, "make an environment with Python 3.11 or newer")
    return Finding(_SECTION, "Python", "ok", found)


def _build() -> str:
    """What torch was built for."""
    for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)):
        if version is not None:
            return f", built for {name} {version}"
    return ", built for CPUs" if not torch.backends.mps.is_built() else ", built for CPUs and MPS"


def _again(name: str) -> str:
    return f"pip install --force-reinstall {name}, or see which other package it does not get on with: pip check"


def _parts(version: str) -> tuple[int, ...]:
    """The numbers at the head of a version; what follows them does not matter to a lower bound."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
        if digits != part:
            break
    return tuple(numbers)
