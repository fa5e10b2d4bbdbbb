"""A process that leaves its world and keeps all that it made there: `leaving.py PORTS DIRECTORY`, once for each rank.

It writes the threads that it has, and what its old mesh says, to `DIRECTORY/RANK.json`: after `leave()` with meshes,
steps and a Runner still held, and once more after `atexit`, at the end of a run that failed inside a collective.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

import lumen as lm
from lumen.core import distributed
from lumen.parallel.comm.init import leave
from tests.distributed import jobs


def threads():
    """The names of the threads of Gloo, of torch's store, and of our own that live."""
    native = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    ours = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    return sorted(name for name in (*native, *ours) if "gloo" in name or "tcpstore" in name or name.startswith("lumen"))


def a_thread_of_gloo_appears(seconds=60):
    """Whether one lives, or comes to: a new thread names itself once it first runs, in a way that depends on torch."""
    deadline = time.monotonic() + seconds
    while not any("gloo" in name for name in threads()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def stepped(transform):
    """A step after one batch, its state, and metrics."""
    step = transform(jobs.step)
    state = step.init(jobs.make_state())
    return step, *step(state, {key: column[:4] for key, column in jobs.columns().items()})


def world_of_many(directory):
    """All that somebody may hold when the world is left."""
    mesh, sharded, tensor = lm.mesh(data=-1, device="cpu"), lm.mesh(shard=-1), lm.mesh(tensor=-1)
    layers = {"0": lm.parallel.Colwise(), "2": lm.parallel.Rowwise()}
    held = [stepped(each) for each in (lm.ddp(mesh), lm.fsdp(sharded), lm.tensor_parallel(layers, tensor))]
    with mesh.bound():
        graph = lm.psum(torch.ones(1, requires_grad=True), "data")
    runner = lm.Runner(jobs.step, transforms=[lm.ddp(mesh)], checkpoint=lm.Checkpointer(directory), progress=False)
    lm.mesh(data=-1)
    importlib.import_module("torch.distributed.nn.functional")  # whose default arguments are the world's group
    data = lm.Loader(jobs.columns(), batch_size=jobs.SIZE, seed=2)
    result = runner.fit(jobs.make_state(), data, until=lm.Steps(2))
    return mesh, [*held, graph, runner, result, data, mesh.torch, mesh.torch["data"], sharded, tensor]


def refused(function, *args):
    """What `WorldError` says."""
    try:
        function(*args)
    except lm.errors.WorldError as error:
        return str(error)
    return ""


def main(ports, directory):
    found = {}

    def write():
        found["at exit"] = threads()
        (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(found))

    atexit.register(write)  # before what joins registers its own, and so after it
    os.environ["MASTER_PORT"] = ports[0]
    mesh, held = world_of_many(directory)
    a_thread_of_gloo_appears()
    found["in it"] = threads()
    leave()
    found["left"] = threads()
    (step, state, _), *_ = held
    asked = (lambda: mesh.torch, lambda: mesh.index("data"), lambda: mesh.group("data"), mesh.bound)
    found["refused"] = [refused(each) for each in (*asked, lambda: step(state, jobs.columns()))]
    os.environ["MASTER_PORT"] = ports[1]
    again = lm.mesh(data=-1, device="cpu")
    found["again"] = [again.index("data"), distributed.world_size(), refused(lambda: mesh.torch), *again.sizes.values()]
    with again.bound():
        lm.psum(torch.ones(1).to(torch.float8_e4m3fn), "data")  # codes, which have no sum


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1].split(","), Path(sys.argv[2]))
