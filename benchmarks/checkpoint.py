"""What a checkpoint costs: Lumen's store against torch.save and torch.distributed.checkpoint.

    python benchmarks/checkpoint.py                       # 500 MB of float32 in 48 arrays, 5 rounds
    python benchmarks/checkpoint.py --megabytes 50        # a first look
    python benchmarks/checkpoint.py --world 2             # two processes, each with its rows: see checkpoint_world.py

In each round every variant saves the same tree once, to the same disk, and the order rotates. "Blocked" is how long the
call holds up the training loop, "total" until the checkpoint is complete; for the synchronous ones they are the same.
Lumen's totals include a checksum of every file, and its restores verify them; Lumen and DCP sync their files to the
disk, torch.save does not. "Fresh" is the first save of a store, which takes its host memory then. Restores read from
the page cache; DCP reads into tensors made before.

To be expected on two cores of a server with a local disk, in seconds: Lumen blocked 0.05 to 0.1, total 0.4 to 0.5, the
first time 0.4 and 0.8; torch.save 0.3 to 0.4; DCP 0.45 to 0.7. Restores: Lumen 0.3, torch 0.1, DCP 0.2 to 0.5.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import lumen as lm

Tree = dict[str, torch.Tensor]
Timed = tuple[float, float]  # blocked, total


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--arrays", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--world", type=int, default=1, help="how many processes save one state together")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured (a temporary one)")
    options = parser.parse_args()
    if options.world > 1:
        together(options)
        return
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    count = options.megabytes * 10**6 // 4 // options.arrays // 1024
    tree = {f"layer{i}.weight": torch.randn(count, 1024) for i in range(options.arrays)}
    megabytes = lm.tree.nbytes(tree) / 1e6
    root = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        saves, restores = measured(tree, root, options.rounds)
    finally:
        shutil.rmtree(root)
    table = Table(title=f"{megabytes:.0f} MB in {options.arrays} arrays, medians of {options.rounds} rounds")
    for name in ("", "blocked s", "total s", "total MB/s", "restore s", "restore MB/s"):
        table.add_column(name, justify="right" if name else "left")
    for name, times in saves.items():
        blocked, total = (statistics.median(column) for column in zip(*times, strict=True))
        restore = statistics.median(restores[name]) if restores[name] else None
        read = ("–", "–") if restore is None else (f"{restore:.3f}", f"{megabytes / restore:.0f}")
        table.add_row(name, f"{blocked:.3f}", f"{total:.3f}", f"{megabytes / total:.0f}", *read)
    Console().print(table)


def together(options: argparse.Namespace) -> None:
    """The form for several processes."""
    import checkpoint_world

    root = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        times = checkpoint_world.measured(options.world, options.megabytes, options.arrays, options.rounds, root)
    finally:
        shutil.rmtree(root)
    title = f"{options.megabytes} MB in {options.arrays} arrays over {options.world} processes, medians"
    table = Table(title=f"{title} of {options.rounds} rounds")
    for name in ("", "blocked s", "total s", "restore s"):
        table.add_column(name, justify="right" if name else "left")
    for name, found in checkpoint_world.medians(times).items():
        table.add_row(name, *(f"{each:.3f}" for each in found))
    Console().print(table)


def measured(tree: Tree, root: Path, rounds: int) -> tuple[dict[str, list[Timed]], dict[str, list[float]]]:
    """Seconds of each variant's saves and restores; one round is warm-up."""
    saves: dict[str, list[Timed]] = {name: [] for name in VARIANTS}
    restores: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with lm.checkpoint.Store(root / "store", keep=None) as store:
        store.save(0, tree)  # takes the host memory
        store.wait()
        for index in range(rounds + 1):
            names = list(VARIANTS)
            for name in names[index % len(names) :] + names[: index % len(names)]:
                path = root / f"{name}{index}"
                times, read = VARIANTS[name](tree, path, store, index + 1)
                began = time.perf_counter()
                if read is not None:
                    read()
                if index:
                    saves[name].append(times)
                    if read is not None:
                        restores[name].append(time.perf_counter() - began)
                shutil.rmtree(path, ignore_errors=True)
                shutil.rmtree(store.path(index + 1), ignore_errors=True)
    return saves, restores


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
    """How long a call takes, twice."""
    began = time.perf_counter()
    save()
    took = time.perf_counter() - began
    return took, took


VARIANTS: dict[str, Callable[..., tuple[Timed, Callable[[], object] | None]]] = {
    "lumen Store": lumen_store,
    "lumen Store, fresh": lumen_fresh,
    "lumen save": lumen_save,
    "torch.save": torch_save,
    "torch DCP": torch_dcp,
}

if __name__ == "__main__":
    main()
