"""A batch that a worker sends is the batch: the same values, dtypes and views, whatever the size of its storages."""

import os
import sys
import time
from subprocess import PIPE

import numpy as np
import pytest
import torch

from lumen.data import Loader
from lumen.data.messages import MOST_BYTES, Message
from tests import zygote


def sent(batch):
    restore, arguments = Message(batch).__reduce__()
    return restore(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_tensors_keep_their_values_and_dtypes(dtype, count):
    tensor = torch.arange(count).to(dtype)
    found = sent({"x": tensor, "n": np.arange(count), "s": ["a"], "none": None})
    assert found["x"].dtype is dtype
    assert torch.equal(found["x"], tensor)
    assert found["n"].tolist() == list(range(count))
    assert (found["s"], found["none"]) == (["a"], None)
    found["x"].zero_()  # the memory is the receiver's own
    assert torch.equal(tensor, torch.arange(count).to(dtype))


def test_views_stay_views_of_one_storage():
    tokens = torch.arange(12).reshape(3, 4)
    inputs, targets, wide = sent((tokens[:, :-1], tokens[:, 1:], torch.ones(1).expand(1 << 40)))
    assert torch.equal(inputs, tokens[:, :-1])
    assert torch.equal(targets, tokens[:, 1:])
    assert inputs.stride() == tokens.stride()
    inputs[0, 1] = 50
    assert targets[0, 0] == 50
    assert wide.stride() == (0,)


def unsendable(samples):
    return {"x": (i for i in samples)}


def test_workers_send_storages_of_any_size():
    small, large = torch.arange(6.0), torch.arange(6 * MOST_BYTES // 4).reshape(6, -1)
    samples = [{"small": small[i], "large": large[i].float(), "array": np.full(3, i)} for i in range(6)]
    plain, parallel = (list(Loader(samples, 2, workers=workers)) for workers in (0, 1))
    for one, other in zip(plain, parallel, strict=True):
        assert all(torch.equal(one[name], other[name]) and one[name].dtype is other[name].dtype for name in one)
        assert other["large"].is_shared()
        assert not other["small"].is_shared()
    with pytest.raises(TypeError, match="generator"):
        next(iter(Loader(samples, 2, workers=1, collate=unsendable)))


UNREAD = """
import multiprocessing, time, torch, lumen as lm
loader = lm.Loader({"x": torch.zeros(4096, 512)}, batch_size=8, workers=1, prefetch=16)
batches = iter(loader)
next(batches)
print(multiprocessing.active_children()[0].pid, flush=True)
time.sleep(300)
"""


def test_a_worker_with_batches_that_nobody_reads_ends_with_its_parent():
    job = zygote.start([sys.executable, "-c", UNREAD], stdout=PIPE)
    with job.stdout as stdout:
        worker = int(stdout.readline())
    time.sleep(1)  # the pipe is full by then
    job.kill()
    job.wait(60)
    deadline = time.monotonic() + 60  # torch's workers look after their parent every five seconds
    while os.path.exists(f"/proc/{worker}"):
        assert time.monotonic() < deadline, "it waits for ever"
        time.sleep(0.1)
