"""A check: a function of a `Setting` that fails by an exception, and returns figures for the table."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import lumen as lm

T = TypeVar("T")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where a check runs: on `device`, which is the CPU in a dry run; `directory` is empty, and its own."""

    device: torch.device
    directory: Path

    @property
    def on_gpu(self) -> bool:
        """Whether this is no dry run."""
        return self.device.type == "cuda"

    def pick(self, gpu: T, dry: T) -> T:
        """A size for the GPU, or one for the dry run."""
        return gpu if self.on_gpu else dry

    def compile(self, **options: Any) -> lm.Transform:
        """`lm.compile`; a dry run only traces, since compiling takes half a minute on a CPU."""
        return lm.compile(**options) if self.on_gpu else lm.compile(**{**options, "backend": "eager"})

    def moved(self, values: T) -> T:
        """A tree with its tensors on the device."""
        return lm.tree.map(lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x, values)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def missing(packages: Iterable[str]) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Check:
    """One check, with the `seconds` after which its process is killed.

    `may_refuse` says that an error of Lumen is an answer too: this GPU, or a library, cannot do it.
    """

    name: str
    run: Callable[[Setting], Figures | None]
    seconds: float = 60.0
    needs_gpu: bool = False
    packages: Sequence[str] = ()
    may_refuse: bool = False


@dataclass
class Checks:
    """The checks of one module, in order; `@checks("name")` adds one."""

    checks: list[Check] = field(default_factory=list)

    def __call__(self, name: str, **options: Any) -> Callable[[Callable[[Setting], Any]], Callable[[Setting], Any]]:
        def add(run: Callable[[Setting], Any]) -> Callable[[Setting], Any]:
            self.checks.append(Check(name, run, **options))
            return run

        return add


@dataclass(frozen=True)
class Group:
    """Checks that share a process, in the module `benchmarks.gpu.NAME`; one that is `alone` measures time."""

    name: str
    packages: Sequence[str] = ()
    alone: bool = False

    def checks(self) -> list[Check]:
        """Its checks; imports the module."""
        return list(importlib.import_module(f"benchmarks.gpu.{self.name}").checks.checks)


GROUPS = (
    Group("pretraining", alone=True),
    Group("transfers", alone=True),
    Group("optimizers", alone=True),
    Group("memory", alone=True),
    Group("precision"),
    Group("graphs"),
    Group("processes"),
    Group("runs"),
    Group("laws", packages=("hypothesis", "pytest")),
    Group("skipped_tests", packages=("hypothesis", "pytest", "pytest_timeout")),
)


def agree(found: Any, expected: Any, tolerance: float = 0.0) -> float:
    """The largest difference of two trees of tensors; fails if it is above `tolerance`, by default if any bit differs.

    Differences are relative to the largest entry of a tensor, and at least to one.
    """
    worst = 0.0
    pairs = zip(lm.tree.named_tensors(found), lm.tree.named_tensors(expected), strict=True)
    for (path, a), (_, b) in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"{path}: {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")
        if not a.numel() or torch.equal(a, b):
            continue
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
        worst = max(worst, error if error == error else float("inf"))
        if not worst <= tolerance:
            raise AssertionError(f"{path}: off by {worst:.2e}, and {tolerance:.0e} is allowed")
    return worst
