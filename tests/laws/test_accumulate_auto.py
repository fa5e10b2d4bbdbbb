"""`accumulate("auto")`: after running out of memory the same step, in more parts."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

import lumen as lm
from lumen.errors import BatchError, DonatedError
from tests import zygote


def make_state(tx=None):
    torch.manual_seed(0)
    return lm.TrainState.create(torch.nn.Linear(3, 1), tx or lm.optim.adamw(0.05))


def make_batch(rows=12):
    generator = torch.Generator().manual_seed(rows)
    return {"x": torch.randn(rows, 3, generator=generator), "y": torch.randn(rows, 1, generator=generator)}


class Small:
    """A device on which no more than `rows` rows fit."""

    def __init__(self, rows, error=torch.OutOfMemoryError):
        self.rows, self.error, self.seen = rows, error, []

    def step(self, state, batch):
        def loss_fn(params, batch):
            self.seen.append(len(batch["x"]))
            if len(batch["x"]) > self.rows:
                raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
            out, _ = state.apply(params, batch["x"])
            return lm.Mean.of((out - batch["y"]) ** 2)

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}


def same(a, b, **tolerance):
    for name, value in a.params.items():
        torch.testing.assert_close(b.params[name], value, **tolerance)


@pytest.mark.parametrize("outer", [(), (lm.donate(),), (lm.compile(backend="eager"),)], ids=str)
def test_finds_the_parts_and_keeps_them(outer):
    device = Small(rows=5)
    inner = [t for t in outer if t.donates]
    fast = lm.compose(*(t for t in outer if not t.donates), lm.accumulate("auto"), *inner)(device.step)
    state = fast.init(make_state())
    plain = make_state()
    with pytest.warns(lm.InexactWarning, match=r"12 rows are now split into (2|4) microbatches") as caught:
        state, metrics = fast(state, make_batch())
    assert len(caught) == 2  # 12 and 6 did not fit, 3 do
    assert int(state.slots["accumulate"].microbatches) == 4
    everything = Small(rows=99)
    plain, expected = everything.step(plain, make_batch())
    device.seen.clear()
    for rows in (12, 12, 2):  # and a smaller last batch
        state, metrics = fast(state, make_batch(rows))
        plain, expected = everything.step(plain, make_batch(rows))
    same(plain, state)
    torch.testing.assert_close(metrics["loss"].compute(), expected["loss"].compute())
    assert max(device.seen) <= 3
    assert "accumulate" not in fast.export(state).slots


def test_a_state_that_knows_its_parts_begins_with_them():
    device = Small(rows=3)
    fast = lm.accumulate("auto")(device.step)
    with pytest.warns(lm.InexactWarning):
        state, _ = fast(fast.init(make_state()), make_batch())
    other = Small(rows=3)
    lm.accumulate("auto")(other.step)(state, make_batch())
    assert set(other.seen) == {3}


def test_one_row_that_does_not_fit_is_an_error():
    fast = lm.accumulate("auto")(Small(rows=0).step)
    with pytest.warns(lm.InexactWarning), pytest.raises(torch.OutOfMemoryError):
        fast(fast.init(make_state()), make_batch(4))


def test_other_errors_are_not_taken_for_it():
    fast = lm.accumulate("auto")(Small(rows=5, error=ZeroDivisionError).step)
    with pytest.raises(ZeroDivisionError):
        fast(fast.init(make_state()), make_batch())


def test_an_update_that_runs_out_of_memory_is_not_repeated():
    calls = []

    def full(grads, state, params):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    tx = lm.optim.chain(lm.optim.sgd(0.1), lm.optim.GradientTransformation(lambda params: {}, full))
    fast = lm.accumulate("auto")(Small(rows=99).step)
    with pytest.raises(torch.OutOfMemoryError):
        fast(fast.init(make_state(tx)), make_batch())
    assert calls == [1]


def test_a_compiled_donated_state_may_be_half_changed(monkeypatch):
    fast = lm.compose(lm.compile(backend="eager"), lm.accumulate("auto"), lm.donate())(Small(rows=99).step)
    state, _ = fast(fast.init(make_state()), make_batch())

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.fx.GraphModule, "__call__", full)
    with pytest.raises(DonatedError, match="checkpoint"):
        fast(state, make_batch())


@pytest.mark.parametrize("bad", [{"k": "all"}, {"k": 0}, {}, {"k": 2, "microbatch": 2}, {"k": True}])
def test_bad_arguments(bad):
    with pytest.raises(BatchError, match="auto"):
        lm.accumulate(**bad)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_real_memory():
    # 400 MB of activations where the process may have 300 MB more than it already has.
    script = """
    import resource, torch, lumen as lm
    torch.set_num_threads(1)
    net = torch.nn.Sequential(torch.nn.Linear(1, 4096), torch.nn.Tanh(), torch.nn.Linear(4096, 1))
    def step(state, batch):
        def loss_fn(params, batch):
            out, _ = state.apply(params, batch)
            return lm.Mean.of(out**2)
        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}
    fast = lm.accumulate("auto")(step)
    state = fast.init(lm.TrainState.create(net, lm.optim.sgd(0.1)))
    small, _ = fast(state, torch.ones(8, 1))
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
    state, metrics = fast(state, torch.ones(12 * 2**10, 1))
    print("parts", int(state.slots["accumulate"].microbatches))
    """
    done = zygote.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > 1
