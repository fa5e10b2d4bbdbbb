"""A training job that can be killed at any moment and resumes exactly.

    python examples/resume.py            # about 30 seconds on 2 cores; press Ctrl-C, or kill -9 it
    python examples/resume.py            # … and start it again: it resumes from the newest checkpoint
    python examples/resume.py --prove    # does this automatically, in about half a minute

The job is a small convolutional net on scikit-learn's handwritten digits, with everything that makes exact resumption
hard: random shifts drawn in worker processes, dropout, averaged params, a learning rate that is reduced on a plateau,
early stopping.

Expected: a validation accuracy of 0.98 or more, however often the job was interrupted. --rundir contains checkpoints,
TensorBoard logs, a JSONL file, and the best params as a safetensors file. `--prove` runs a short job of 6 epochs once
without interruption, and once with three SIGKILLs and a SIGTERM at random moments. It ends with a table of where each
process began and ended, and checks that the last checkpoints and all logged numbers are equal, bit for bit.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lumen as lm


@dataclass
class Config:
    """Settings of the job."""

    epochs: int = 30
    batch_size: int = 64
    lr: float = 3e-3
    patience: int = 8
    """Validations without improvement after which the job ends early."""
    workers: int = 2
    seed: int = 0
    rundir: Path = Path("runs/resume")
    resume: Literal["auto", "never"] = "auto"
    progress: Literal["auto", "bar", "lines"] = "auto"
    prove: bool = False
    """Run the job in processes that are killed, and compare it with one that is not."""


# ------------------------------------------------------------------------------------------------ the job


class Digits(torch.utils.data.Dataset):
    """Images [1, 8, 8] and labels; shifted at random by up to a pixel where `augment` is set."""

    def __init__(self, images: Tensor, labels: Tensor, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        if self.augment:
            top, left = torch.randint(3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1), value=-0.5)[:, top : top + 8, left : left + 8]
        return {"image": image, "label": self.labels[index]}


def load(seed: int) -> tuple[Digits, Digits]:
    """A training and a validation set, 80 to 20."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0 - 0.5
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, val = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return Digits(images[train], labels[train], augment=True), Digits(images[val], labels[val], augment=False)


def make_net() -> nn.Module:
    """Logits [B, 10] for images [B, 1, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(256, 10),
    )


def step(state: lm.TrainState, batch: dict[str, Tensor]) -> tuple[lm.TrainState, dict[str, lm.Mean]]:
    """One training step."""

    def loss_fn(params, batch):
        logits, buffers = state.apply(params, batch["image"])
        loss = lm.Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))
        return loss, lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def eval_step(state: lm.TrainState, batch: dict[str, Tensor]) -> dict[str, lm.Mean]:
    """Loss and accuracy on held-out images."""
    logits, _ = state.apply(state.params, batch["image"])
    loss = lm.Mean.of(F.cross_entropy(logits, batch["label"], reduction="none"))
    return {"loss": loss, "accuracy": lm.Mean.of(logits.argmax(-1) == batch["label"])}


def train(config: Config) -> lm.Result:
    """The job. Only `Checkpointer` and `resume="auto"` are needed to make it resumable."""
    torch.manual_seed(config.seed)
    train_set, val_set = load(config.seed)
    tx = lm.optim.chain(
        lm.optim.clip_by_global_norm(1.0),
        lm.optim.adamw(config.lr, weight_decay=0.05, decay_mask=lm.optim.matrices),
        lm.optim.reduce_on_plateau(factor=0.5, patience=3, monitor="val/loss"),
    )
    checkpoint = lm.Checkpointer(config.rundir, every=lm.Every(steps=20), keep=3, monitor="val/loss", mode="min")
    runner = lm.Runner(
        step,
        transforms=[lm.ema(0.98), lm.donate()],
        checkpoint=checkpoint,
        sinks=[lm.sinks.TensorBoard(config.rundir), lm.sinks.JSONL(config.rundir / "metrics.jsonl")],
        callbacks=[lm.EarlyStop(monitor="val/loss", patience=config.patience)],
        config=config,
        log_every=5,
        progress=config.progress,
    )
    try:
        return runner.fit(
            lm.TrainState.create(make_net(), tx, seed=config.seed),
            lm.Loader(train_set, batch_size=config.batch_size, seed=config.seed, workers=config.workers),
            until=lm.Epochs(config.epochs),
            validate=lm.Validate(eval_step, lm.Loader(val_set, batch_size=256, shuffle=False), use="ema"),
            resume=config.resume,
        )
    except lm.Interrupted as interrupted:  # a SystemExit with code 75: let it pass
        print(f"saved at step {interrupted.result.clock.step}: start me again, and I go on from there")
        raise


def report(result: lm.Result, config: Config) -> None:
    """Print the results, and export the averaged params of the best checkpoint."""
    print(f"{result.reason}, after {result.clock.step} steps in {result.clock.seconds:.1f} s of training")
    print(f"val/loss {result.metrics['val/loss']:.4f}, val/accuracy {result.metrics['val/accuracy']:.4f}")
    best = lm.Checkpointer(config.rundir, monitor="val/loss").best()
    exported = config.rundir / "best.safetensors"
    exported.unlink(missing_ok=True)
    lm.checkpoint.export(best, exported, what="ema")
    print(f"best checkpoint: {best}, exported to {exported}")


# ---------------------------------------------------------------------------------------------- the proof


def prove(config: Config) -> None:
    """Run the job with and without interruptions, and compare the results; exits with 1 if they differ."""
    table = Table(title="one job in five processes")
    for column in ("process", "began at step", "ended at step", "by", "exit code"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as root:
        whole, pieces = Path(root, "whole"), Path(root, "pieces")
        finish(start(whole, config))
        total = logged(whole)[-1]["step"]
        signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
        for number, kind in enumerate(signals):
            began = newest(pieces)
            # At a random step of its range, so that each process makes some progress.
            job, moment = start(pieces, config), total * (number + random.uniform(0.2, 0.8)) / (len(signals) + 1.5)
            wait_for(job, pieces, moment)
            time.sleep(random.uniform(0, 0.05))  # in a step, a validation, a save, or between them
            job.send_signal(kind)
            code = job.wait()
            table.add_row(str(number + 1), str(began), str(logged(pieces)[-1]["step"]), kind.name, str(code))
            expected = 75 if kind == signal.SIGTERM else -kind
            if code != expected:
                raise SystemExit(f"the job ended with {code}, expected {expected}:\n{said(pieces)}")
        began = newest(pieces)
        code = finish(start(pieces, config))
        table.add_row("5", str(began), str(newest(pieces)), "the end", str(code))
        Console().print(table)
        compare(whole, pieces)


def compare(whole: Path, pieces: Path) -> None:
    """Print what is equal; exit with 1 if anything differs."""
    ours, theirs = (lm.checkpoint.load(lm.Checkpointer(each).latest()) for each in (pieces, whole))
    found, expected = (dict(lm.tree.named_tensors(each)) for each in (ours, theirs))
    unlike = found.keys() ^ expected.keys()
    unlike |= {name for name in found.keys() & expected.keys() if not torch.equal(found[name], expected[name])}
    print(f"last state: {len(found)} tensors, {len(found) - len(unlike)} of them bitwise those of the whole run")
    rows, wanted = logged(pieces), logged(whole)
    same = sum(a == b for a, b in zip(rows, wanted, strict=False))
    print(f"metrics.jsonl: {len(rows)} rows, {same} of the {len(wanted)} of the whole run")
    print(f"val/accuracy {rows[-1].get('val/accuracy', float('nan')):.4f}")
    if unlike or rows != wanted:
        raise SystemExit("the interrupted run differs")


def start(rundir: Path, config: Config) -> subprocess.Popen:
    """The job as a separate process."""
    rundir.mkdir(exist_ok=True)
    settings = {"epochs": min(config.epochs, 6), "workers": config.workers, "seed": config.seed, "rundir": rundir}
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    with open(rundir / "output.txt", "a") as output:
        return subprocess.Popen([sys.executable, __file__, *options], stdout=output, stderr=subprocess.STDOUT)


def finish(job: subprocess.Popen) -> int:
    """Wait until the job has finished."""
    code = job.wait()
    if code:
        raise SystemExit(f"the job ended with {code}:\n{said(Path(job.args[-1]))}")
    return code


def wait_for(job: subprocess.Popen, rundir: Path, step: float) -> None:
    """Return when this process, not an earlier one, has logged the step."""
    since = time.time()
    while not any(row["step"] >= step and row["time"] > since for row in logged(rundir, timed=True)):
        if job.poll() is not None:
            raise SystemExit(f"the job ended with {job.returncode} before step {step:.0f}:\n{said(rundir)}")
        time.sleep(0.01)


def logged(rundir: Path, timed: bool = False) -> list[dict[str, Any]]:
    """The rows of the JSONL file; without values that depend on the machine's speed, unless `timed`."""
    path = rundir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    timing = ("time", "steps_per_second", "rows_per_second", "goodput", "data_wait", "slowest_rank", "slowest_ratio")
    clocks = () if timed else timing
    return [{name: value for name, value in row.items() if name not in clocks} for row in rows]


def newest(rundir: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    return lm.Checkpointer(rundir).store.latest() or 0


def said(rundir: Path) -> str:
    """The last output of the job's processes."""
    return (rundir / "output.txt").read_text()[-3000:]


def main(config: Config) -> None:
    """Train, or prove that training can be interrupted."""
    if config.prove:
        prove(config)
    else:
        report(train(config), config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
