"""A world of real processes for tests: started once, asked many times, ended whatever happens."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from pathlib import Path

from tests.zygote import PRELOADED, forget_jax, free_ports

ROOT = Path(__file__).parents[2]

# Seconds that processes get to end by themselves: under coverage they still have their data to write.
GRACE = 60.0 if os.environ.get("COVERAGE_PROCESS_START") else 0.5
LIMIT = 240.0  # seconds that one task may take in all its processes; two that compile on two busy cores need minutes


class TaskError(AssertionError):
    """A task that raised, or did not end, in some process."""

    def __init__(self, message, errors=()):
        super().__init__(message)
        self.errors = list(errors)  # (rank, type name, message) in the order in which they came


class World:
    """`size` processes joined over Gloo; `run(function, *args)` calls `function` in each and gives what they return.

    `function` is a top-stage function of a test module; arguments and results travel as pickles between processes of
    one test run. The processes are forked with `modules` imported, which would otherwise take each of them seconds.
    After a task that took longer than its limit, or failed in other ways here and there, the processes are ended and
    started anew for the next: only where all raised the same are they sure to agree on what comes next.
    """

    def __init__(self, size, modules=()):
        self.size = size
        self._modules = tuple(modules)
        self._processes, self._pipes = [], []

    def run(self, function, *args, limit=LIMIT):
        """The results by rank; raises `TaskError` with every process's error."""
        if not self._processes:
            self._start()
        task = (function.__code__.co_filename, function.__name__, args)
        for pipe in self._pipes:
            pipe.send(task)
        try:
            answers = self._answers(limit)
        except BaseException:
            self.close()
            raise
        errors = sorted((when, rank, *what) for rank, (when, ok, what) in enumerate(answers) if not ok)
        if errors:
            if len(errors) < self.size or len({(kind, message) for _, _, kind, message, _ in errors}) > 1:
                self.close()
            text = "\n".join(f"--- rank {rank}:\n{trace}" for _, rank, _, _, trace in errors)
            raise TaskError(text, [(rank, kind, message) for _, rank, kind, message, _ in errors])
        return [what for _, _, what in answers]

    def close(self):
        """End the processes, those that hang too."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, __name__, *self._modules])
        (port,) = free_ports(1)
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.size, port, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _answers(self, limit):
        deadline = time.monotonic() + limit
        answers = {}
        while len(answers) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TaskError(f"ranks {list(waiting.values())} had not answered after {limit} s")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(10)
                    raise TaskError(f"rank {rank} died with exit code {self._processes[rank].exitcode}") from None
        return [answers[rank] for rank in range(self.size)]


def serve(rank, size, port, pipe):
    """What each process does: join, then one task after the other until the pipe closes."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import torch

    torch.set_num_threads(1)
    forget_jax()
    gc.freeze()  # what the fork server has loaded lives on, and collections need not look at it
    from lumen.core import distributed
    from lumen.parallel.comm.init import join, leave

    join("cpu", timeout=LIMIT / 2)
    while True:
        try:
            path, name, args = pipe.recv()
        except EOFError:
            break
        distributed.set_row_replicas(1)  # what the mesh of the task before has left
        try:
            answer = (time.monotonic(), True, getattr(_module(path), name)(*args))
        except BaseException as error:
            answer = (time.monotonic(), False, (type(error).__name__, str(error), traceback.format_exc()))
        pipe.send(answer)
    leave()


def module_name(path):
    """The name of the test module at `path`, from the root of the repository."""
    return ".".join(Path(path).relative_to(ROOT).with_suffix("").parts)


def _module(path):
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(module_name(path))
