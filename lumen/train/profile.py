"""`lm.Profile`: traces of a few steps of a run, for TensorBoard, Perfetto or Chrome."""

from __future__ import annotations

import os
import socket
import time

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from lumen.core.annotations import integer_of
from lumen.core.arguments import checked
from lumen.core.urls import local_path
from lumen.errors import HyperparameterError
from lumen.optim._hyperparams import check_count
from lumen.train.callbacks import Callback, CallbackContext

_ROWS = 30  # of the table


@checked
class Profile(Callback):
    """Profiles a few steps of a run on the CPU and the accelerator.

    Each cycle skips `wait` steps, warms the profiler up for `warmup` steps and records `active` steps. Then it writes
    two files into `directory`: `*.pt.trace.json`, which TensorBoard's profiler plugin, ui.perfetto.dev and
    chrome://tracing open, and `*.txt` with the operators that took longest. After the last cycle the profiler is off
    and costs nothing. With `unroll(k)` a step is a call of k steps. A run that ends or fails in a cycle writes what was
    recorded.

    Args:
        directory: where the files go; it is created if it is missing.
        wait: how many steps of each cycle are skipped: the first steps of a run are not representative.
        warmup: how many steps run under the profiler without being recorded.
        active: how many steps are recorded.
        repeat: how many cycles there are.
        memory: record allocations too.
        stacks: record the Python lines that called each operator, which makes recorded steps much slower.
        trace: write the trace, which may be large; if False, only the table.

    Raises:
        HyperparameterError: a count outside its range.

    >>> import lumen as lm
    >>> lm.Profile("runs/a/profile", wait=10, active=5)
    lm.Profile('runs/a/profile', the last 5 of 17 steps)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        wait: int = 5,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        memory: bool = False,
        stacks: bool = False,
        trace: bool = True,
    ) -> None:
        wait, active = check_count("wait", wait, low=0), check_count("active", active, low=1)
        repeat = check_count("repeat", repeat, low=1)
        if integer_of(warmup, low=1) is None:
            raise HyperparameterError(
                f"warmup={warmup!r} is not allowed: give an integer from 1, since the first step under the profiler"
                " includes its start-up."
            )
        self.directory = local_path(directory, "the directory of lm.Profile")
        self._schedule = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        self._active = active
        self._length = wait + warmup + active
        self._repeat = repeat
        self._memory = memory
        self._stacks = stacks
        self._trace = trace
        self._profiler: profile | None = None
        self._cycles = 0
        self._steps_left = 0

    def __repr__(self) -> str:
        repeats = f", {self._repeat} times" if self._repeat > 1 else ""
        return f"lm.Profile({str(self.directory)!r}, the last {self._active} of {self._length} steps{repeats})"

    def on_start(self, view: CallbackContext) -> None:
        """Begin the first cycle."""
        self._stop()  # a run that never ended may have left a profiler
        self._cycles = self._repeat
        self._begin()

    def on_step(self, view: CallbackContext) -> None:
        """Count a step."""
        profiler = self._profiler
        if profiler is None:
            return
        profiler.step()
        self._steps_left -= 1
        if self._steps_left == 0:
            self._stop()
            if self._cycles:
                self._begin()

    def on_exception(self, view: CallbackContext, error: BaseException) -> None:
        """Stop, and add a failure to do so to the error."""
        try:
            self._stop()
        except Exception as failure:
            error.add_note(f"the profile was lost as well: {failure!r}")

    def on_end(self, view: CallbackContext) -> None:
        """Stop, if the run was shorter than the profile."""
        self._stop()

    def _begin(self) -> None:
        # A new profiler for each cycle: a single one would collect the events of all cycles.
        self._cycles -= 1
        self._steps_left = self._length
        self._profiler = profile(
            acc_events=True,  # there is one cycle; torch 2.11 warns that it forgets those before it
            activities=_activities(),
            schedule=self._schedule,
            on_trace_ready=self._write,
            profile_memory=self._memory,
            with_stack=self._stacks,
        )
        self._profiler.start()

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _write(self, profiler: profile) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # The plugin's naming scheme: a worker, a span and the suffix.
        stem = f"{socket.gethostname()}_{os.getpid()}.{time.time_ns()}"
        if self._trace:
            profiler.export_chrome_trace(str(self.directory / f"{stem}.pt.trace.json"))
        on_device = len(_activities()) > 1
        table = profiler.key_averages().table(
            sort_by="self_device_time_total" if on_device else "self_cpu_time_total",
            row_limit=_ROWS,
            max_name_column_width=80,
        )
        (self.directory / f"{stem}.txt").write_text(table, encoding="utf-8")


def _activities() -> list[ProfilerActivity]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    if torch.xpu.is_available():
        activities.append(ProfilerActivity.XPU)
    return activities
