"""`lm.MemorySnapshot`: what is in memory, written on demand and when memory runs out."""

from __future__ import annotations

import json
import os
import signal as signals
import threading
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lumen.core import _torch_compat, distributed
from lumen.core.arguments import checked
from lumen.core.device import is_out_of_memory
from lumen.core.urls import local_path
from lumen.errors import HyperparameterError, InexactWarning
from lumen.optim._hyperparams import check_count
from lumen.train.callbacks import Callback, CallbackContext
from lumen.train.memory_report import memory_report


@checked
class MemorySnapshot(Callback):
    """Writes what is in memory: after given steps, at a signal, and when a step runs out of memory.

    Each rank writes `step-N-rank-R.json` into `directory`, with sizes in bytes: of the process (`rss`, `peak_rss`), of
    each component of the state (params, moments, buffers, slots), of the live tensors by shape, and of the lines that
    allocated Python's memory, if `tracemalloc` runs. With CUDA it also writes `step-N-rank-R.pickle`, which
    https://pytorch.org/memory_viz opens: all blocks, and the last `history` allocations with the Python stack of each.
    After an error the names begin with `out-of-memory-`. The error itself is raised unchanged, with a note that names
    the files, or why they could not be written.

    Listening costs what a callback on each step costs. On CUDA the allocator records a stack for each allocation.

    Args:
        directory: where the files go; it is created if it is missing.
        steps: the steps of the clock after which to write. With `unroll(k)` the first call that ends at or after one.
        signal: the signal after which the next step writes: `kill -USR2 PID`. None for none. It is handled while the
            run trains in the main thread, and not otherwise.
        on_oom: write when an error says that memory ran out, on the device or on the host.
        history: how many allocations and frees of CUDA are kept.

    Raises:
        HyperparameterError: nothing would ever be written, a step or `history` below 1, or an unknown signal.

    >>> import lumen as lm
    >>> lm.MemorySnapshot("runs/a/memory", steps=[10, 100])
    lm.MemorySnapshot('runs/a/memory', after steps 10, 100, at SIGUSR2, when out of memory)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        steps: Collection[int] = (),
        signal: str | None = "SIGUSR2",
        on_oom: bool = True,
        history: int = 100_000,
    ) -> None:
        for step in steps:
            check_count("steps", step, low=1)
        check_count("history", history, low=1)
        if not (steps or signal or on_oom):
            raise HyperparameterError(
                'lm.MemorySnapshot would never write: give it steps=[100], signal="SIGUSR2" or on_oom=True.'
            )
        self.directory = local_path(directory, "the directory of lm.MemorySnapshot")
        self._steps = sorted(set(steps))
        self._due: list[int] = []
        self._signal = None if signal is None else _signal_number(signal)
        self._on_oom = on_oom
        self._history = history
        self._is_requested = False
        self._previous: Any = None  # the handler of the signal before
        self._is_on = False

    def __repr__(self) -> str:
        after = f"after steps {', '.join(map(str, self._steps))}" if self._steps else ""
        at = "" if self._signal is None else f"at {self._signal.name}"
        oom = "when out of memory" if self._on_oom else ""
        return f"lm.MemorySnapshot({', '.join(filter(None, (repr(str(self.directory)), after, at, oom)))})"

    def on_start(self, view: CallbackContext) -> None:
        """Listen to the signal, and have CUDA record allocations."""
        self._stop()  # a run that never ended may have left them on
        self._is_requested = False
        self._due = [step for step in self._steps if step > view.clock.step]
        self._is_on = True
        if self._signal is not None and threading.current_thread() is threading.main_thread():
            self._previous = signals.signal(self._signal, self._request)
        if torch.cuda.is_available():
            _torch_compat.record_memory_history(max_entries=self._history, stacks="python")

    def on_step(self, view: CallbackContext) -> None:
        """Write, if that is due."""
        step = view.clock.step
        if not self._is_requested and not (self._due and step >= self._due[0]):
            return
        self._is_requested = False
        self._due = [due for due in self._due if due > step]
        try:
            self._write(view, "step")
        except Exception as error:  # the run is worth more than what is said of it
            warnings.warn(
                f"the memory snapshot of step {step} could not be written to {self.directory}"
                f" ({type(error).__name__}: {error}). Training continues.",
                InexactWarning,
                stacklevel=2,
            )

    def on_exception(self, view: CallbackContext, error: BaseException) -> None:
        """Write, if memory ran out, and stop."""
        try:
            if self._on_oom and is_out_of_memory(error):
                paths = self._write(view, "out-of-memory-step")
                error.add_note(f"What was in memory is in {' and '.join(map(str, paths))}")
        except Exception as failure:
            error.add_note(f"What was in memory could not be written: {failure!r}")
        finally:
            self._stop()

    def on_end(self, view: CallbackContext) -> None:
        """Stop."""
        self._stop()

    def _request(self, _number: int, _frame: object) -> None:
        self._is_requested = True

    def _stop(self) -> None:
        if self._signal is not None and self._previous is not None:
            signals.signal(self._signal, self._previous)
            self._previous = None
        if self._is_on and torch.cuda.is_available():
            _torch_compat.record_memory_history(enabled=None)
        self._is_on = False

    def _write(self, view: CallbackContext, name: str) -> list[Path]:
        """Write the files; returns their paths."""
        self.directory.mkdir(parents=True, exist_ok=True)
        rank, step = distributed.rank(), view.clock.step
        stem = f"{name}-{step}-rank-{rank}"
        report = {"step": step, "rank": rank, "time": time.time(), **memory_report(view.state)}
        paths = [self.directory / f"{stem}.json"]
        paths[0].write_text(json.dumps(report, indent=1), encoding="utf-8")
        if torch.cuda.is_available():
            paths.append(self.directory / f"{stem}.pickle")
            _torch_compat.dump_snapshot(str(paths[1]))
        return paths


def _signal_number(name: str) -> signals.Signals:
    """The signal of this name; raises `HyperparameterError` for one that this system lacks or that has another use."""
    number = getattr(signals.Signals, name, None)
    if number is None or name in ("SIGTERM", "SIGINT", "SIGKILL", "SIGSTOP"):
        raise HyperparameterError(
            f"signal={name!r} cannot request a memory snapshot: SIGTERM and SIGINT end a run, SIGKILL and SIGSTOP"
            ' cannot be handled, and others must be known to this system. Write signal="SIGUSR2", or None.'
        )
    return signals.Signals(number)
