"""The cost of a checkpoint: Lumen's store beside torch.save and torch.distributed.checkpoint.

In each round every variant saves the same tree once, to the same disk, and the order rotates. "Blocked" is how long the
call blocks the training loop, "total" the time until the checkpoint is complete; for synchronous variants they are the
same. Lumen's totals include a checksum of every file, and its restores verify them. Lumen and DCP sync their files to
the disk, torch.save does not. "Fresh" is the first save of a store, which allocates its host memory. Restores read
from the page cache; DCP reads into existing tensors. For two processes see checkpoint_world.py.

Expected on two cores of a server with a local disk, in seconds for 500 MB: Lumen blocked 0.05 to 0.1, total 0.4 to
0.5, the first time 0.4 and 0.8; torch.save 0.3 to 0.4; DCP 0.45 to 0.7. Restores: Lumen 0.3, torch 0.1, DCP 0.2 to
0.5.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lumen as lm
from benchmarks import checkpoint_world, timing
from benchmarks.options import Options
from benchmarks.rows import Row, timed

Tree = dict[str, torch.Tensor]
Timed = tuple[float, float]  # blocked, total
ARRAYS = 48
METRICS = ("blocked", "total", "restore")


def measure(options: Options) -> list[Row]:
    """One process, and several processes."""
    rows: list[Row] = []
    megabytes = options.pick(500, 48)
    for size in options.worlds or (1, 2):
        case = f"{megabytes} MB, {size} process{'es' if size > 1 else ''}"
        if not options.wants(case):
            continue
        root = Path(tempfile.mkdtemp(dir=options.directory))
        try:
            rows += (
                _alone(case, megabytes, root, options) if size == 1 else _together(case, size, megabytes, root, options)
            )
        finally:
            shutil.rmtree(root)
    return rows


def _alone(case: str, megabytes: int, root: Path, options: Options) -> list[Row]:
    rows_each = megabytes * 10**6 // 4 // ARRAYS // 1024
    tree = {f"layer{i}.weight": torch.randn(rows_each, 1024) for i in range(ARRAYS)}
    times = measured(tree, root, options.times(5))
    rows = [
        row
        for at, metric in enumerate(METRICS[:2])
        for row in _of(case, metric, {label: [each[at] for each in found] for label, found in times.items()})
    ]
    return rows + _of(case, "restore", {label: [t[2] for t in found] for label, found in times.items() if found[0][2]})


def _together(case: str, size: int, megabytes: int, root: Path, options: Options) -> list[Row]:
    times = checkpoint_world.measured(size, megabytes, ARRAYS, options.times(5), root)
    return [
        row
        for at, metric in enumerate(METRICS)
        for row in _of(case, metric, {label: [each[at] for each in found] for label, found in times.items()})
    ]


def _of(case: str, metric: str, times: dict[str, list[float]]) -> list[Row]:
    return timed("checkpoint", case, times, DCP, unit="s", metric=metric)


def measured(tree: Tree, root: Path, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Seconds of each variant: blocked, total, and restore (0 if it has none). One round is warm-up."""
    times: dict[str, list[tuple[float, float, float]]] = {label: [] for label in VARIANTS}
    with lm.checkpoint.Store(root / "store", keep=None) as store:
        store.save(0, tree)  # allocates the host memory
        store.wait()
        for index in range(rounds + 1):
            for at, label in enumerate(timing.rotated(VARIANTS, index)):
                path = root / f"{at}-{index}"
                (blocked, total), read = VARIANTS[label](tree, path, store, index + 1)
                restore = timing.seconds(read) if read is not None else 0.0
                if index:
                    times[label].append((blocked, total, restore))
                shutil.rmtree(path, ignore_errors=True)
                shutil.rmtree(store.path(index + 1), ignore_errors=True)
    return times


def lumen_store(tree: Tree, _: Path, store: lm.checkpoint.Store, step: int) -> tuple[Timed, Callable[[], object]]:
    """In the background, as the Runner does it."""
    began = time.perf_counter()
    store.save(step, tree)
    blocked = time.perf_counter() - began
    store.wait()
    return (blocked, time.perf_counter() - began), lambda: store.restore(step, tree)


def lumen_fresh(tree: Tree, path: Path, _: lm.checkpoint.Store, step: int) -> tuple[Timed, None]:
    """The first save of a store."""
    with lm.checkpoint.Store(path) as store:
        times, _read = lumen_store(tree, path, store, step)
    return times, None


def lumen_save(tree: Tree, path: Path, *_: object) -> tuple[Timed, Callable[[], object]]:
    """Synchronous, without a copy."""
    return synchronous(lambda: lm.checkpoint.save(path, tree)), lambda: lm.checkpoint.restore(path, tree)


def torch_save(tree: Tree, path: Path, *_: object) -> tuple[Timed, Callable[[], object]]:
    """One file, neither synced nor atomic."""
    path.mkdir()
    return synchronous(lambda: torch.save(tree, path / "state.pt")), lambda: torch.load(path / "state.pt")


def torch_dcp(tree: Tree, path: Path, *_: object) -> tuple[Timed, Callable[[], object]]:
    """torch.distributed.checkpoint in one process."""
    import torch.distributed.checkpoint as dcp

    new = {name: torch.empty_like(tensor) for name, tensor in tree.items()}
    times = synchronous(lambda: dcp.save(tree, checkpoint_id=path, no_dist=True))
    return times, lambda: dcp.load(new, checkpoint_id=path, no_dist=True)


def synchronous(save: Callable[[], object]) -> Timed:
    """The time of a call, as blocked and as total."""
    took = timing.seconds(save)
    return took, took


DCP = "torch DCP"
VARIANTS: dict[str, Callable[..., tuple[Timed, Callable[[], object] | None]]] = {
    DCP: torch_dcp,
    "torch.save": torch_save,
    "Lumen: Store": lumen_store,
    "Lumen: Store, fresh": lumen_fresh,
    "Lumen: save": lumen_save,
}
