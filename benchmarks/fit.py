"""A whole job: `Runner.fit` with all that a run needs, beside the same loop by hand and Lightning's Trainer.

Each trains on the same batches, writes the loss as a line of JSON and to TensorBoard every 50 steps, validates on 8
batches and saves every 100, and shows a progress bar on a terminal (which forgets it). The final
validation loss of all must be the same.

A checkpoint of the loop by hand has the guarantees of the Runner's: it contains the model, the optimizer, the random
generator and the position, torch's format has checksums, it is on disk when it appears under its name, and a thread
writes it while the training goes on. A variant of the loop writes it itself. Lightning's `ModelCheckpoint` writes it in
the loop, neither synced nor atomic; its logger writes CSV instead of JSON, and its bar shows no loss.

"step" is wall time, "processor" that of all threads of the process. Both contain an equal number of validations and
checkpoints, without the work at the beginning and at the end of a run.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lumen as lm
from benchmarks import ours, peers, tasks, timing
from benchmarks.options import Options
from benchmarks.peers import adamw
from benchmarks.rows import Row, timed
from benchmarks.tasks import Batch, Task, loss_of
from benchmarks.timing import Marked, Measure, NotTheSameError

LOG_EVERY = 50
EVERY = 100  # steps between two validations, and between two checkpoints
VALIDATED = 8  # batches
STEPS = {"mlp": (400, 15), "gpt": (200, 5)}  # of a timed section, and the rounds
Job = Callable[[Task, "Window", Path], float]  # trains, and returns the last validation loss


class Window(Marked):
    """Batches with the time of the steps after the first `EVERY`, also as processor time."""

    def __init__(self, task: Task, steps: int) -> None:
        super().__init__(task, steps, whole=EVERY)
        self.processor: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        marks = 0
        for batch in super().__iter__():
            if len(self.marks) > marks:
                marks = len(self.marks)
                self.processor.append(time.process_time())
            yield batch

    def processor_per_step(self) -> float:
        """Seconds of processor time per step."""
        start, end = self.processor
        return (end - start) / self.steps


class Terminal(io.StringIO):
    """A terminal that shows nothing."""

    def isatty(self) -> bool:
        """It is one."""
        return True

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)


# ---------------------------------------------------------------------------------------------------------- Lumen


def driven(progress: bool | str = "bar", saves: bool = True) -> Job:
    """`Runner.fit`."""

    def evaluate(state: Any, batch: Batch) -> dict[str, Any]:
        x, y = batch
        logits, _ = state.apply(state.params, x)
        return {"loss": lm.Mean.of(loss_of(logits, y))}

    def job(task: Task, data: Window, folder: Path) -> float:
        every = lm.Every(steps=EVERY)
        runner = lm.Runner(
            ours.step,
            transforms=[lm.donate()],
            checkpoint=lm.Checkpointer(folder, every=every) if saves else None,
            sinks=[lm.sinks.JSONL(folder / "metrics.jsonl"), lm.sinks.TensorBoard(folder / "board")],
            log_every=LOG_EVERY,
            progress=progress,
        )
        validate = lm.Validate(evaluate, task.data(VALIDATED), every=every)
        result = runner.fit(ours.state_of(task.fresh()), data, until=lm.Steps(len(data)), validate=validate)
        return float(result.metrics["val/loss"])

    return job


# ----------------------------------------------------------------------------------------------------- a loop by hand


class Saver:
    """Saves a checkpoint in place of the one before, in the loop or in a thread."""

    def __init__(self, folder: Path, in_thread: bool) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1) if in_thread else None
        self._running: Future[None] | None = None

    def save(self, step: int, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save it; with a thread, after the save before."""
        content = {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": step,
        }
        if self._pool is None:
            self._write(step, content)
            return
        self.wait()
        self._running = self._pool.submit(self._write, step, copy.deepcopy(content))

    def wait(self) -> None:
        """Return when it is on disk; raises what its thread raised."""
        if self._running is not None:
            self._running.result()

    def _write(self, step: int, content: dict[str, Any]) -> None:
        temporary = self._folder / "temporary"
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._folder / f"{step}.pt")
        directory = os.open(self._folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        (self._folder / f"{step - EVERY}.pt").unlink(missing_ok=True)


class Log:
    """A line of JSON, TensorBoard and the bar."""

    def __init__(self, folder: Path, total: int) -> None:
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        self._lines = (folder / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(folder / "board"))
        self.bar = tqdm(total=total)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step."""
        self._lines.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self.bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Close all three."""
        self._lines.close()
        self._board.close()
        self.bar.close()


def by_hand(in_thread: bool) -> Job:
    """A raw loop with fused AdamW."""

    def job(task: Task, data: Window, folder: Path) -> float:
        net = task.fresh()
        optimizer = adamw(net, fused=True)
        log, saver = Log(folder, len(data)), Saver(folder, in_thread)
        held_out, found = task.data(VALIDATED), 0.0
        total, began = torch.zeros(()), time.perf_counter()
        for step, (x, y) in enumerate(data, 1):
            optimizer.zero_grad()
            loss = loss_of(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            log.bar.update()
            if step % LOG_EVERY == 0:
                seconds, began = time.perf_counter() - began, time.perf_counter()
                rate = optimizer.param_groups[0]["lr"]
                log.write(step, {"train/loss": float(total) / LOG_EVERY, "lr": rate, "steps/s": LOG_EVERY / seconds})
                total.zero_()
            if step % EVERY == 0:
                found = mean_loss(net, held_out)
                log.write(step, {"val/loss": found})
                saver.save(step, net, optimizer)
        saver.wait()
        log.close()
        return found

    return job


def mean_loss(net: nn.Module, batches: list[Batch]) -> float:
    """The loss on held-out batches."""
    net.eval()
    with torch.no_grad():
        total = sum((loss_of(net(x), y) for x, y in batches), torch.zeros(()))
    net.train()
    return float(total) / len(batches)


# ------------------------------------------------------------------------------------------------------ Lightning


def lightning(task: Task, data: Window, folder: Path) -> float:
    """Lightning's Trainer."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    peers.hush()

    class Module(peers.lightning_module()):  # type: ignore[misc]
        def training_step(self, batch: Batch, _index: int) -> Tensor:
            x, y = batch
            loss = loss_of(self.net(x), y)
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch: Batch, _index: int) -> None:
            x, y = batch
            self.log("val/loss", loss_of(self.net(x), y), batch_size=len(x))

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=[CSVLogger(folder), TensorBoardLogger(folder)],
        log_every_n_steps=LOG_EVERY,
        val_check_interval=EVERY,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=EVERY)],
        enable_model_summary=False,
    )
    trainer.fit(
        Module(task), data, DataLoader(task.data(VALIDATED), batch_size=None)
    )  # a plain list is several loaders
    return float(trainer.callback_metrics["val/loss"])


BASE = "by hand"
VARIANTS: dict[str, Job] = {
    BASE: by_hand(in_thread=True),
    "by hand, saving in the loop": by_hand(in_thread=False),
    "Lumen: Runner": driven(),
    "Lightning Trainer": lightning,
}


def timed_job(job: Job, task: Task, steps: int) -> tuple[Window, float]:
    """The batches, with the time of a job, and its last validation loss."""
    data = Window(task, steps)
    with (
        tempfile.TemporaryDirectory() as folder,
        Terminal() as terminal,
        contextlib.redirect_stdout(terminal),
        contextlib.redirect_stderr(terminal),
    ):
        loss = job(task, data, Path(folder))
    return data, loss


def counted(job: Job) -> Callable[[Task], Measure]:
    """For `benchmarks.versus`: a job of at least `EVERY` steps."""

    def build(task: Task) -> Measure:
        return lambda steps: timed_job(job, task, -(-steps // EVERY) * EVERY)[0].per_step()

    return build


def measure(options: Options) -> list[Row]:
    """Both models."""
    rows = []
    for name, (steps, rounds) in STEPS.items():
        if options.wants(name):
            rows += _measured(tasks.make(name), options.pick(steps, EVERY), options.times(rounds), options)
    return rows


def _measured(task: Task, steps: int, rounds: int, options: Options) -> list[Row]:
    jobs = options.chosen(VARIANTS, BASE)
    seconds: dict[str, list[float]] = {label: [] for label in jobs}
    processor: dict[str, list[float]] = {label: [] for label in jobs}
    wanted = timed_job(jobs[BASE], task, EVERY)[1]
    for label, job in jobs.items():
        loss = timed_job(job, task, EVERY)[1]
        if abs(loss - wanted) > 1e-3 * abs(wanted):
            raise NotTheSameError(f"{label}: the validation loss is {loss:.5f}, that of the loop by hand {wanted:.5f}")
    with timing.collected():
        for index in range(rounds):
            for label in timing.rotated(jobs, index):
                timing.progress(f"{task.name}: round {index + 1} of {rounds}: {label}")
                data, _ = timed_job(jobs[label], task, steps)
                seconds[label].append(data.per_step())
                processor[label].append(data.processor_per_step())
    return timed("fit", task.name, seconds, BASE) + timed("fit", task.name, processor, BASE, metric="processor")
