"""The cost of a checkpoint: Lumen's store beside torch.save and torch.distributed.checkpoint.

In each round every variant saves the same tree once, to the same disk, and the order rotates. "Blocked" is how long the
call blocks the training loop, with a ratio to DCP's `async_save`; "total" is the time until the checkpoint is complete.
For synchronous variants they are the same. Lumen's totals include a checksum of every file, and its restores verify
them. Lumen and DCP sync their files to the disk, torch.save does not. "Fresh" is the first save of a store, which
allocates its host memory; `async_save` allocates it each time. Restores read from the page cache; DCP reads into
existing tensors. For two processes see checkpoint_world.py. Only what saves in the background saves the large state.

"memory" is the peak of a process's resident memory over two saves beyond what it had before, as a ratio to the state.

Expected on two cores of a server with a local disk, in seconds for 500 MB: Lumen blocked 0.05 to 0.1, total 0.4 to
0.5, the first time 0.4 and 0.8; torch.save 0.3 to 0.4; DCP 0.45 to 0.7. Restores: Lumen 0.3, torch 0.1, DCP 0.2 to
0.5.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lumen as lm
from benchmarks import checkpoint_world, peak, timing
from benchmarks.apart import apart
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
    cases = [(size, megabytes) for size in options.worlds or (1, 2)]
    if not options.worlds:
        cases.append((1, 4 * megabytes))
    for size, megabytes in cases:
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
    is_large = megabytes > options.pick(500, 48)
    variants, rounds = (BACKGROUND, 2) if is_large else (tuple(VARIANTS), 5)
    rows = _memory(case, [label for label in variants if label != FRESH], megabytes, root)
    times = measured(tree_of(megabytes), root, options.times(rounds), variants)
    for at, metric in enumerate(METRICS[:2]):
        rows += _of(case, metric, {label: [each[at] for each in found] for label, found in times.items()})
    restores = {label: [each[2] for each in found] for label, found in times.items() if found[0][2]}
    return rows if is_large else rows + _of(case, "restore", restores)


def tree_of(megabytes: int) -> Tree:
    """A state of that size."""
    rows_each = megabytes * 10**6 // 4 // ARRAYS // 1024
    return {f"layer{i}.weight": torch.randn(rows_each, 1024) for i in range(ARRAYS)}


def _memory(case: str, labels: Sequence[str], megabytes: int, root: Path) -> list[Row]:
    rows = [Row("checkpoint", case, "the state", "memory", "MB", megabytes, 1.0)]
    for label in labels:
        found = apart(extra_memory, label, megabytes, root / "memory", environment=peak.ENVIRONMENT) / 1e6
        rows.append(Row("checkpoint", case, label, "memory", "MB", found, found / megabytes))
    return rows


def extra_memory(label: str, megabytes: int, root: Path) -> int:
    """The bytes that a process needs in addition to save its state, in memory of its own."""
    if label == DCP_ASYNC:
        _join_alone()
    tree = tree_of(megabytes)
    with lm.checkpoint.Store(root / "store", keep=None) as store:
        VARIANTS[label]({"little": torch.ones(1)}, root / "0", store, 0)  # what it imports
        peak.settle()
        before = peak.resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        for number in (1, 2):
            VARIANTS[label](tree, root / f"{number}", store, number)
        more = peak.resident("VmHWM") - before
    shutil.rmtree(root)
    return more


def _join_alone() -> None:
    """Make a process group of one process, which `async_save` asks for."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _together(case: str, size: int, megabytes: int, root: Path, options: Options) -> list[Row]:
    times = checkpoint_world.measured(size, megabytes, ARRAYS, options.times(5), root)
    return [
        row
        for at, metric in enumerate(METRICS)
        for row in _of(case, metric, {label: [each[at] for each in found] for label, found in times.items()})
    ]


def _of(case: str, metric: str, times: dict[str, list[float]]) -> list[Row]:
    base = DCP_ASYNC if metric == "blocked" or DCP not in times else DCP
    return timed("checkpoint", case, times, base, unit="s", metric=metric)


def measured(tree: Tree, root: Path, rounds: int, variants: Sequence[str]) -> checkpoint_world.Times:
    """Seconds of each variant: blocked, total, and restore (0 if it has none). One round is warm-up."""
    _join_alone()
    times: checkpoint_world.Times = {label: [] for label in variants}
    with lm.checkpoint.Store(root / "store", keep=None) as store:
        store.save(0, tree)  # allocates the host memory
        store.wait()
        for index in range(rounds + 1):
            for at, label in enumerate(timing.rotated(variants, index)):
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


def torch_dcp_async(tree: Tree, path: Path, *_: object) -> tuple[Timed, None]:
    """torch.distributed.checkpoint in the background, with its own settings."""
    import torch.distributed.checkpoint as dcp

    began = time.perf_counter()
    future: Any = dcp.async_save(tree, checkpoint_id=path)
    blocked = time.perf_counter() - began
    future.result()
    return (blocked, time.perf_counter() - began), None


def synchronous(save: Callable[[], object]) -> Timed:
    """The time of a call, as blocked and as total."""
    took = timing.seconds(save)
    return took, took


DCP, DCP_ASYNC, FRESH = checkpoint_world.DCP, checkpoint_world.DCP_ASYNC, "Lumen: Store, fresh"
BACKGROUND = (DCP_ASYNC, "Lumen: Store", FRESH)
VARIANTS: dict[str, Callable[..., tuple[Timed, Callable[[], object] | None]]] = {
    DCP: torch_dcp,
    DCP_ASYNC: torch_dcp_async,
    "torch.save": torch_save,
    "Lumen: Store": lumen_store,
    FRESH: lumen_fresh,
    "Lumen: save": lumen_save,
}
