"""How many Python calls into Lumen one eager step makes: python -m benchmarks.calls

A step of three Linears whose loss is an `lm.Mean`, plain and under `donate`, `fsdp` over two processes and
`accumulate(2)`, is profiled with `sys.setprofile` after three steps that fill every cache. The script counts calls of
functions defined in lumen/, the files that they are in, and how often two consecutive calls are in different files.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen.parallel.comm.init import leave

HOME = str(Path(lm.__file__).parent)
WARM_UP = 3


def step(state: Any, batch: Any) -> Any:
    """A training step."""

    def loss_fn(params: Any, batch: Any) -> Any:
        out, _ = state.apply(params, batch["x"])
        return lm.Mean.of(F.mse_loss(out, batch["y"], reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def scalar_step(state: Any, batch: Any) -> Any:
    """The same with a loss that calls nothing of Lumen by itself."""

    def loss_fn(params: Any, batch: Any) -> Any:
        out, _ = state.apply(params, batch["x"])
        return F.mse_loss(out, batch["y"])

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def counted(wrap: Callable[[Any], Any], step: Any = step) -> list[str]:
    """The file, below lumen/, of each call of one step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))
    wrapped = wrap(step)
    state = wrapped.init(lm.TrainState.create(net, lm.optim.adamw(1e-3)))
    batch = {"x": torch.randn(8, 8), "y": torch.randn(8, 1)}
    for _ in range(WARM_UP):
        state, _ = wrapped(state, batch)
    files: list[str] = []

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            files.append(frame.f_code.co_filename[len(HOME) + 1 :])

    sys.setprofile(note)
    wrapped(state, batch)
    sys.setprofile(None)
    return files


def row(name: str, files: Sequence[str]) -> str:
    """A line of the table."""
    changes = sum(a != b for a, b in itertools.pairwise(files))
    return f"| {name} | {len(files)} | {len(set(files))} | {changes} |"


def _rank(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    files = counted(lm.compose(lm.donate(), lm.fsdp(lm.mesh(shard=2, device="cpu")), lm.accumulate(2)))
    if rank == 0:
        print(row("donate, fsdp(shard=2), accumulate(2)", files), flush=True)
        if "--files" in sys.argv:
            print("\n".join(f"{files.count(each):6} {each}" for each in sorted(set(files), key=files.count)[::-1]))
    leave()


def main() -> None:
    """Print the table."""
    print("| step | calls | files | changes of file |\n|---|---|---|---|")
    print(row("plain", counted(lm.compose())), flush=True)
    print(row("plain, with a scalar loss", counted(lm.compose(), scalar_step)), flush=True)
    print(row("donate", counted(lm.compose(lm.donate()))), flush=True)
    mp.spawn(_rank, (29511,), nprocs=2)


if __name__ == "__main__":
    main()
