"""Data loading: lm.Loader beside torch's DataLoader, with the same number of workers, over the same data set.

There are four data sets: tensors in memory; rows of a memory-mapped array; ready samples, where the work is to collate
them; and samples that take some hundred microseconds of Python each. Both loaders shuffle and keep their workers. A
timed section is an epoch, with the workers started before; a ratio of 1 or more means that Loader is at least as fast.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lumen as lm
from benchmarks import timing
from benchmarks.options import Options
from benchmarks.rows import Row, throughput

BATCH = 64
FEATURES = 64
WORK = 2000  # additions in Python for a sample, 50 to 100 µs
TORCH, LUMEN = "torch DataLoader", "Lumen: Loader"


class Ready(Dataset[Any]):
    """Ready samples."""

    def __init__(self, rows: int) -> None:
        self.x, self.y = columns(rows)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index], index % 10


class Mapped(Dataset[Any]):
    """Rows of a memory-mapped array, for a loader that reads samples; `columns` for one that reads columns."""

    def __init__(self, rows: int) -> None:
        x, y = columns(rows)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "x.npy"
            np.save(path, x.numpy())
            self.columns = np.load(path, mmap_mode="r+"), y.numpy()

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = self.columns
        return x[index], y[index]


class Worked(Ready):
    """Samples that Python computes."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        total = 0
        for i in range(WORK):
            total += i ^ index
        return self.x[index], total % 10


def columns(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, FEATURES, generator=generator), torch.randint(0, 10, (rows,), generator=generator)


SETS: dict[str, tuple[Callable[[int], Dataset[Any]], int]] = {
    "tensors": (lambda rows: TensorDataset(*columns(rows)), 64_000),
    "a memory map": (Mapped, 64_000),
    "ready samples": (Ready, 16_000),
    "samples of Python work": (Worked, 8_000),
}
WORKERS = (0, 2, 4)


def measure(options: Options) -> list[Row]:
    """Each data set and number of workers."""
    rows: list[Row] = []
    for name, (make, full) in SETS.items():
        for workers in WORKERS:
            case = f"{name}, {workers} workers"
            if options.wants(case):
                rows += _compared(case, make(full // options.pick(1, 8)), workers, options.times(9))
    return rows


def _compared(case: str, dataset: Dataset[Any], workers: int, rounds: int) -> list[Row]:
    loaders = {
        TORCH: DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0),
        LUMEN: lm.Loader(getattr(dataset, "columns", dataset), batch_size=BATCH, seed=0, workers=workers),
    }
    count = len(dataset)  # type: ignore[arg-type]
    measures = {label: _epoch(loader, count) for label, loader in loaders.items()}
    times = timing.take_turns(measures, rounds)
    return throughput("loading", case, times, TORCH, unit="rows/s", amount=count)


def _epoch(loader: Iterable[Any], wanted: int) -> Callable[[], float]:
    def run() -> float:
        return timing.seconds(lambda: _read(loader, wanted))

    return run


def _read(loader: Iterable[Any], wanted: int) -> None:
    seen = sum(len(x) for x, _ in loader)
    if seen != wanted:
        raise AssertionError(f"an epoch gave {seen} rows instead of {wanted}")
