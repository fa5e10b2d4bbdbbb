"""Processes that save together, for what ends or hinders one of them: `python sharded_jobs.py TASK DIRECTORY OPTIONS`.

They are started by `start`, one for each rank, without torchrun, which would end the others.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import lumen as lm
from lumen.checkpoint import sharded
from lumen.core import distributed
from lumen.errors import CheckpointError
from lumen.parallel.fsdp.fsdp import fsdp
from tests import zygote

ROWS = 4001
NAMED = "named"  # by the other process, of the one that hangs
RETURNED = "returned"  # what hung has come back
PATIENCE = 60.0  # seconds for which it hangs at the most


def value_of(number):
    torch.manual_seed(number)
    state = lm.TrainState.create(torch.nn.Linear(33, ROWS), lm.optim.sgd(0.1, momentum=0.9))
    return state.replace(step=torch.tensor(number))


def step(state, batch):
    return state, {}


def opened(directory, **options):
    wrapped = fsdp(lm.mesh(shard=-1, device="cpu", timeout=30))(step)
    return wrapped, lm.checkpoint.Store(directory, **options)


def save_on(directory, options):
    """Save one after the other, each twice, until somebody is killed."""
    wrapped, store = opened(directory, keep=2, timeout=5.0)
    with store.open(wrapped):
        number = (store.latest() or 0) + 1
        while True:
            state = wrapped.init(value_of(number))
            store.save(number, state)
            store.save(number, state)  # replaces it
            if distributed.rank() == 0:
                (directory / "done").write_text(str(number))
            number += 1


def save_hindered(directory, options):
    """The second save fails on one rank; what each says of it, and what is there then."""
    wrapped, store = opened(directory, timeout=options.get("timeout", 60.0))
    states = [wrapped.init(value_of(number)) for number in (1, 2, 3)]
    with store.open(wrapped):
        store.save(1, states[0])
        store.wait()
        if distributed.rank() == options["rank"]:
            hindrance = HINDRANCES[options["what"]](directory)
        try:
            store.save(2, states[1])
            store.wait()
            said = "nothing"
        except CheckpointError as error:
            said = str(error)
        late = (directory / RETURNED).exists()
        if options["what"] == "hang":
            (directory / NAMED).touch()
        if distributed.rank() == options["rank"]:
            hindrance()
        if options["what"] != "hang":
            store.save(3, states[2])
            store.wait()
    sys.stdout.write(json.dumps({"said": said, "late": late, "steps": store.steps()}))


def full_disk(_directory):
    """No file may grow beyond a few bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def hanging(directory):
    """The disk does not answer until somebody has complained."""
    real = sharded._Writer._write

    def hang(self, path, content):
        sharded._Writer._write = real  # the next file is written
        deadline = time.monotonic() + PATIENCE
        while not (directory / NAMED).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (directory / RETURNED).touch()
        return real(self, path, content)

    sharded._Writer._write = hang
    return lambda: None


HINDRANCES = {"full": full_disk, "hang": hanging}


def start(task, directory, size, **options):
    """The processes, by rank."""
    command = [sys.executable, __file__, task, str(directory), json.dumps(options)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return zygote.launch(command, size, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
