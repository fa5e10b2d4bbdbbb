"""A training job for torchrun, for what ends processes: `torchrun jobs.py DIRECTORY OPTIONS`.

It goes on from whatever the directory holds. The first process leaves its final params in `DIRECTORY/final`, each the
rows that it was given in `DIRECTORY/rows-RANK.jsonl`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

import lumen as lm
from lumen.core import distributed

ROWS, SIZE = 60, 12
DEFAULTS = {
    "steps": 15,
    "every": 4,
    "timeout": 60.0,
    "at": None,  # the step in which something happens to `rank`, while the directory has no file `happened`
    "rank": 1,
    "what": None,  # "raise", "hang", "kill", "end" (of its data)
    "strategy": "ddp",  # or "fsdp", or "none": a step without collectives
}
STRATEGIES = {"ddp": lambda mesh: [lm.ddp(mesh)], "fsdp": lambda mesh: [lm.fsdp(mesh)], "none": lambda mesh: []}


def columns():
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(ROWS, 6, generator=generator, dtype=torch.float64),
        "y": torch.randint(3, (ROWS,), generator=generator),
        "row": torch.arange(ROWS),
    }


def make_state():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    return lm.TrainState.create(net, lm.optim.adam(0.02), seed=5)


def step(state, batch):
    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["x"])
        return lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss, "rows": lm.Sum.of(torch.ones_like(batch["row"]))}


class Misfortune:
    """What happens to one process in one step, once."""

    def __init__(self, directory, options):
        self.mark, self.options = directory / "happened", options

    def __call__(self, state):
        options = self.options
        if options["rank"] != distributed.rank() or options["at"] != int(state.step) + 1 or self.mark.exists():
            return
        self.mark.touch()
        if options["what"] == "raise":
            raise ValueError("a row that cannot be read")
        if options["what"] == "hang":
            time.sleep(1000)
        if options["what"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def main(directory, options):
    options = {**DEFAULTS, **options}
    strategy = options["strategy"]
    mesh = lm.mesh(device="cpu", timeout=options["timeout"], **{"shard" if strategy == "fsdp" else "data": -1})
    happens = Misfortune(directory, options)
    seen = (directory / f"rows-{distributed.rank()}.jsonl").open("a")

    def watched(state, batch):
        happens(state)
        seen.write(json.dumps([int(state.step), batch["row"].tolist()]) + "\n")
        seen.flush()
        return step(state, batch)

    loader = lm.Loader(columns(), batch_size=SIZE, seed=2)
    data = loader
    if options["what"] == "end":
        short = options["at"] if distributed.rank() == options["rank"] else 10**6
        data = lm.data.per_rank(batch for (batch, _), _ in zip(loader.stream(), range(short), strict=False))
    if strategy == "none":
        warnings.filterwarnings("ignore", message=".*no transform reduces")
    runner = lm.Runner(
        watched,
        transforms=STRATEGIES[strategy](mesh),
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=options["every"])),
        sinks=[lm.sinks.JSONL(directory / "metrics.jsonl")],
        log_every=2,
        progress=False,
    )
    result = runner.fit(make_state(), data, until=lm.Steps(options["steps"]), resume="auto")
    state = runner.step.export(result.state)
    if distributed.rank() == 0:
        lm.checkpoint.save(directory / "final", state)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
