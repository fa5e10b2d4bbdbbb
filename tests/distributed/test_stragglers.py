"""A rank that keeps the others waiting is named in the log, on clocks that the ranks move themselves."""

from __future__ import annotations

import warnings

import pytest
import torch

import lumen as lm
from lumen.core import distributed
from lumen.parallel.comm.wait_time import WAIT_TIME

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


class Waiting:
    """A collective in which this process waits, on its own clock, for 100 seconds."""

    def __init__(self, work, seconds):
        self.work, self.seconds = work, seconds

    def wait(self):
        self.seconds[0] += 100.0
        self.work.wait()


def run(steps):
    """Rank 1 takes 4 seconds for a step and waits 2 for a batch, rank 0 takes 3 and 1; what rank 0 logs and warns."""
    seconds, slow = [0.0], distributed.rank()
    wait = WAIT_TIME.wait
    if not slow:
        WAIT_TIME.wait = lambda work: wait(Waiting(work, seconds))

    def step(state, batch):
        seconds[0] += 3.0 + slow

        def loss_fn(params, batch):
            return lm.Mean.of(state.apply(params, batch)[0].square())

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    class Data:
        def __len__(self):
            return 2 * steps

        def __getitem__(self, index):
            seconds[0] += 1.0 + slow
            return torch.ones(3)

    sink = lm.sinks.Memory()
    state = lm.TrainState.create(torch.nn.Linear(3, 1), lm.optim.sgd(0.1))
    runner = lm.Runner(
        step, transforms=[lm.ddp()], sinks=[sink], log_every=2, progress=False, time_fn=lambda: seconds[0]
    )
    data = lm.Loader(Data(), batch_size=2, shuffle=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lm.errors.InexactWarning)
        try:
            runner.fit(state, data, until=lm.Steps(steps))
        finally:
            WAIT_TIME.wait = wait
    assert slow or seconds[0] > 100 * steps
    names = [str(warning.message).partition(" has been")[0] for warning in caught]
    rows = [values for _, values in sink.rows]
    return {name: [row[name] for row in rows if name in row] for name in ("slowest_rank", "slowest_ratio")}, names


def test_the_slow_rank_is_named(world2):
    (logged, warned), (nothing, silent) = world2.run(run, 12)
    assert logged == {"slowest_rank": [1] * 6, "slowest_ratio": [6 / 4] * 6}
    assert warned == ["rank 1"]
    assert nothing == {"slowest_rank": [], "slowest_ratio": []}
    assert silent == []
