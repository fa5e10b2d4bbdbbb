"""`lumen doctor`: check Python, torch, Lumen, and the packages they depend on."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from lumen.cli.doctor.report import Finding
from lumen.cli.subprocesses import run_program
from lumen.core._torch_compat import TRIED
from lumen.core.versions import install_extra, own_version, version_of

# As in pyproject.toml: the dependencies of Lumen, and those of its extras.
CORE = (
    "torch>=2.11",
    "fsspec>=2024.6",
    "numpy>=1.26",
    "optree>=0.14",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.5",
    "torchmetrics>=1.6",
    "tensorboardX>=2.6.2",
    "rich>=13.7",
)
EXTRAS = {
    "aim": ("aim>=3.29",),
    "clearml": ("clearml>=2.1",),
    "comet": ("comet-ml>=3.58",),
    "deepspeed": ("deepspeed>=0.19",),
    "examples": ("scikit-learn>=1.5", "matplotlib>=3.9", "tyro>=0.9"),
    "hf": ("transformers>=5.20", "datasets>=3.2"),
    "hydra": ("hydra-core>=1.3",),
    "gcs": ("gcsfs>=2024.6",),
    "mlflow": ("mlflow>=2.20",),
    "dp-sgd": ("dp-accounting>=0.5",),
    "quant": ("torchao>=0.18",),
    "ray": ("ray[train,tune]>=2.60",),
    "s3": ("s3fs>=2024.6",),
    "trackio": ("trackio>=0.43",),
    "wandb": ("wandb>=0.19.10", "pillow>=10"),
}
# Distributions whose module has another name.
MODULES = {
    "comet-ml": "comet_ml",
    "dp-accounting": "dp_accounting",
    "hydra-core": "hydra",
    "orbax-checkpoint": "orbax.checkpoint",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
_INTERNALS_PROGRAM = """
from lumen.core._torch_compat import missing
if missing():
    raise ImportError(f"torch lacks {', '.join(missing())}")
"""
_SECTION = "software"
_IMPORT_TIMEOUT = 120.0  # seconds
_PYTHON = (3, 11)


def check_packages(quick: bool) -> Iterator[Finding]:
    """Check Python and all packages; unless `quick`, import each in a subprocess."""
    yield _check_python()
    yield Finding(_SECTION, "lumen", "ok", own_version() or "from a source tree, not installed")
    required = [(requirement, None) for requirement in CORE]
    optional = [(requirement, extra) for extra, requirements in EXTRAS.items() for requirement in requirements]
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda row: check_package(*row, quick=quick), [*required, *optional])
    if not quick:
        yield check_internals()


def check_package(requirement: str, extra: str | None, *, quick: bool) -> Finding:
    """Check that one package is installed, recent enough, and importable. `extra` is None if it is required.

    >>> check_package("no-such-package>=1.0", "wandb", quick=True).fix
    "pip install '.[wandb]' in the clone of Lumen"
    >>> check_package("torch>=2.11", None, quick=True).status
    'ok'
    """
    name, _, minimum = requirement.partition(">=")
    name = name.partition("[")[0]
    version, label = version_of(name), name if extra is None else f"{name} [{extra}]"
    fix = f"pip install '{requirement}'" if extra is None else install_extra(extra)
    if version is None:
        return Finding(_SECTION, label, "broken" if extra is None else "missing", "not installed", fix)
    if _version_numbers(version) < _version_numbers(minimum):
        return Finding(_SECTION, label, "broken", f"{version}, older than {minimum}", f"pip install '{requirement}'")
    module = MODULES.get(name, name)
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Finding(
            _SECTION, label, "broken", f"{version} is installed, but its module {module} is not", _reinstall(name)
        )
    failure = None if quick else run_program(f"import {module}", _IMPORT_TIMEOUT)
    if failure is not None:
        return Finding(_SECTION, label, "broken", f"{version}, but the import fails: {failure}", _reinstall(name))
    return Finding(_SECTION, label, "ok", f"{version}{_build()}" if name == "torch" else version)


def check_internals() -> Finding:
    """Check that torch has the private functions that Lumen uses."""
    name, tried = "torch's internals", f"{TRIED[0]} to {TRIED[-1]}"
    failure = run_program(_INTERNALS_PROGRAM, _IMPORT_TIMEOUT)
    if failure is None:
        return Finding(_SECTION, name, "ok", f"everything that Lumen uses, as in torch {tried}")
    fix = f"install a torch that Lumen is tested with, {tried}: pip install 'torch=={TRIED[-1]}.*'"
    return Finding(_SECTION, name, "broken", failure, fix)


def _check_python() -> Finding:
    version = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < _PYTHON:
        return Finding(_SECTION, "Python", "broken", version, "create an environment with Python 3.11 or newer")
    return Finding(_SECTION, "Python", "ok", version)


def _build() -> str:
    """The platform that torch was built for."""
    for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)):
        if version is not None:
            return f", built for {name} {version}"
    return ", built for CPUs" if not torch.backends.mps.is_built() else ", built for CPUs and MPS"


def _reinstall(name: str) -> str:
    return f"pip install --force-reinstall {name}, or find the conflicting package: pip check"


def _version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; a suffix does not matter to a lower bound."""
    numbers = []
    for component in version.split("."):
        digits = component[: len(component) - len(component.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
        if digits != component:
            break
    return tuple(numbers)
