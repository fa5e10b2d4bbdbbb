"""A small training job as a process of its own, for faults that end processes: `python job.py DIRECTORY OPTIONS`.

It goes on from whatever the directory holds, and when it is done leaves its final state in `DIRECTORY/final`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import lumen as lm

DEFAULTS = {
    "steps": 24,
    "every": 4,
    "workers": 0,
    "slow": 0.0,  # seconds a step takes besides
    "guard": None,
    "bad_step": None,  # from here on the data is not a number, until the directory has a file `cured`
    "kill_worker": None,  # the row whose reader kills its process, unless there is a file `cured`
    "full_after": None,  # the step after which no file may grow beyond a few bytes
    "die_in": None,  # "rename" or "unlink": the process kills itself at the `nth` call of that kind
    "nth": 1,
}


class Rows:
    """Samples with a random augmentation."""

    def __init__(self, kill_at=None, cured=None):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(64, 6, generator=generator)
        self.y = torch.randint(3, (64,), generator=generator)
        self.kill_at, self.cured = kill_at, cured

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index == self.kill_at and not os.path.exists(self.cured):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": self.x[index] + 0.1 * torch.randn(6), "y": self.y[index]}


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3)
    )


def make_step(directory, bad_step, slow):
    def step(state, batch):
        time.sleep(slow)
        x = batch["x"]
        if bad_step is not None and int(state.step) == bad_step and not (directory / "cured").exists():
            x = x * float("nan")

        def loss_fn(params, batch):
            logits, buffers = state.apply(params, x)
            return lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none")), lm.Aux(buffers=buffers)

        (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}

    return step


def eval_step(state, batch):
    logits, _ = state.apply(state.params, batch["x"])
    return {"loss": lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"))}


class Started(lm.Callback):
    """Tells the parent that steps are being made."""

    def __init__(self, directory, full_after):
        self.directory, self.full_after = directory, full_after

    def on_step(self, view):
        (self.directory / "started").touch()
        if view.clock.step == self.full_after:
            # Files may not grow: a full disk, in a form that needs no rights to set up.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))


def die_in(kind, nth):
    """Kill this process at the `nth` removal or renaming, before or in the midst of deleting a directory."""
    original = {"rename": os.rename, "unlink": os.unlink}[kind]
    left = [nth]

    def dying(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(os, kind, dying)


def main(directory, options):
    options = {**DEFAULTS, **options}
    directory.mkdir(parents=True, exist_ok=True)
    if options["die_in"]:
        die_in(options["die_in"], options["nth"])
    rows = Rows(options["kill_worker"], directory / "cured")
    plain = Rows()
    held_out = lm.Loader({"x": plain.x, "y": plain.y}, batch_size=24, shuffle=False)
    tx = lm.optim.chain(lm.optim.adamw(0.01), lm.optim.reduce_on_plateau(patience=1, factor=0.7, monitor="val/loss"))
    guard = [lm.guard(options["guard"], directory / "dumps")] if options["guard"] else []
    runner = lm.Runner(
        make_step(directory, options["bad_step"], options["slow"]),
        transforms=[*guard, lm.ema(0.9), lm.donate()],
        checkpoint=lm.Checkpointer(
            directory, every=lm.Every(steps=options["every"]), keep=2, monitor="val/loss", mode="min", keep_every=12
        ),
        sinks=[lm.sinks.JSONL(directory / "metrics.jsonl"), lm.sinks.TensorBoard(directory)],
        callbacks=[Started(directory, options["full_after"]), lm.EarlyStop(monitor="val/loss", patience=10**6)],
        log_every=4,
        progress=False,
    )
    result = runner.fit(
        lm.TrainState.create(make_net(), tx, seed=5),
        lm.Loader(rows, batch_size=10, seed=2, workers=options["workers"]),
        until=lm.Steps(options["steps"]),
        validate=lm.Validate(eval_step, held_out, every=lm.Every(steps=6), use="ema"),
        resume="auto",
    )
    shutil.rmtree(directory / "final", ignore_errors=True)
    lm.checkpoint.save(directory / "final", result.state)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
