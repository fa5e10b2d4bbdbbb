"""Which rows a batch has: Lumen beside what torch and Grain have for it, and a data set of 50 million rows.

Rows per second of an epoch with batches of 64 rows: a `grain.MapDataset` that a run reads, beside Grain's own iterator
(expected: at least 0.95), ways to choose ready samples beside `WeightedRandomSampler`, and batches by tokens beside a
`batch_sampler` of lists made before; these two without workers, and with two and four. Then, for a memory map of 50
million rows, the seconds to the first batch (expected: at most 1) and how much memory a thousand later batches add.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler

import lumen as lm
from benchmarks import timing
from benchmarks.loading import TORCH, Ready
from benchmarks.options import Options
from benchmarks.rows import Row, throughput
from lumen.data.adapters import make_feed

BATCH, TOKENS, LONGEST = 64, 8192, 512
WORKERS = (0, 2, 4)
PART = "sampling"


def measure(options: Options) -> list[Row]:
    """Each comparison, then the large data set."""
    rows: list[Row] = []
    for case, compare in _cases().items():
        if options.wants(case):
            count = options.pick(32_000, 2_000)
            base, measures = compare(count)
            times = timing.take_turns({label: _timed(read) for label, read in measures.items()}, options.times(9))
            rows += throughput(PART, case, times, base, unit="rows/s", amount=count)
    return rows + (_large(options.pick(50_000_000, 500_000)) if options.wants("memory map") else [])


def _cases() -> dict[str, Callable[[int], tuple[str, Reads]]]:
    cases: dict[str, Callable[[int], tuple[str, Reads]]] = {"Grain": _grain}
    for workers in WORKERS:
        cases[f"ready samples, {workers} workers"] = functools.partial(_samples, workers=workers)
        cases[f"tokens, {workers} workers"] = functools.partial(_tokens, workers=workers)
    return cases


Reads = dict[str, Callable[[], Iterable[Any]]]


def _grain(count: int) -> tuple[str, Reads]:
    import grain

    x = np.random.default_rng(0).standard_normal((count, 64), np.float32)
    rows = grain.MapDataset.source(x).seed(0).shuffle().batch(BATCH)
    feed = make_feed(rows)
    return "Grain", {"Grain": lambda: rows, "Lumen: a run's batches of it": lambda: feed.epoch(0)}


def _samples(count: int, workers: int) -> tuple[str, Reads]:
    rows, weights = Ready(count), torch.rand(count, dtype=torch.float64)
    sampler = WeightedRandomSampler(weights, count)  # type: ignore[arg-type]
    halves = {"a": Subset(rows, range(count // 2)), "b": Subset(rows, range(count // 2, count))}
    loaders: dict[str, Iterable[Any]] = {
        TORCH: DataLoader(rows, batch_size=BATCH, sampler=sampler, **_torch_workers(workers)),
        "Lumen: each row once": lm.Loader(rows, BATCH, workers=workers),
        "Lumen: weights": lm.Loader(rows, BATCH, weights=weights, workers=workers),
        "Lumen: Mixture": lm.Loader(lm.data.Mixture(halves, weights={"a": 1, "b": 1}), BATCH, workers=workers),
    }
    return TORCH, {name: functools.partial(_self, loader) for name, loader in loaders.items()}


def _torch_workers(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, "persistent_workers": workers > 0}


def _self(loader: Iterable[Any]) -> Iterable[Any]:
    return loader


def _tokens(count: int, workers: int) -> tuple[str, Reads]:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(90) - 0.5, 1.0, count), 2, LONGEST).astype(int)
    texts = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    batches = _in_order(lengths)
    torchs: DataLoader[Any] = DataLoader(
        texts,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=_padded,
        **_torch_workers(workers),
    )
    ours = lm.Loader(texts, tokens=TOKENS, lengths=lengths, collate=_padded, workers=workers)
    return TORCH, {TORCH: lambda: torchs, "Lumen: tokens": lambda: ours}


def _in_order(lengths: np.ndarray[Any, Any]) -> list[list[int]]:
    """As many sorted rows in each batch as fit."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        stop = start + TOKENS // int(lengths[order[start]])
        batches.append(order[start:stop].tolist())
        start = stop
    return batches


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def _timed(read: Callable[[], Iterable[Any]]) -> Callable[[], float]:
    return lambda: timing.seconds(lambda: [None for _ in read()])


def _large(count: int) -> list[Row]:
    case = f"memory map of {count:,} rows"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.npy"
        np.lib.format.open_memmap(path, "w+", np.int64, (count,)).flush()  # a file with holes, of zeros
        batches: list[Any] = []

        def first() -> None:
            batches.append(lm.Loader(np.load(path, mmap_mode="r"), batch_size=BATCH).epoch(0))
            next(batches[0])

        seconds = timing.seconds(first)
        before = _anonymous()
        for _, _ in zip(range(1000), batches[0], strict=False):
            pass
        grown = _anonymous() - before
    return [
        Row(PART, case, "Lumen: Loader", "first batch", "s", seconds),
        Row(PART, case, "Lumen: Loader", "memory of 1,000 more", "MB", grown / 2**20),
    ]


def _anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])
