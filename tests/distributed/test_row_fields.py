"""`lm.row_field()` over processes: a hidden state carried between batches, stopped, resumed, and on other worlds."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lumen as lm
from lumen.core import distributed
from lumen.core.versions import version_of
from lumen.parallel.comm import consistency
from tests.tiers import pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ROWS, CHUNK, WIDTH, HIDDEN = 5, 2, 3, 5  # as many rows as hidden units: the memory has the shape of a param
STEPS, HALF = 6, 3


class RNN(nn.Module):
    """A recurrence over the columns of x, from a hidden state."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(WIDTH + HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x, h):
        outs = []
        for column in x.unbind(1):
            h = torch.tanh(self.cell(torch.cat([column, h], 1)))
            outs.append(self.head(h))
        return torch.cat(outs, 1), h


@lm.dataclass
class Recurrent(lm.TrainState):
    memory: dict[str, torch.Tensor] = lm.row_field()


def step(state, batch):
    """Truncated back-propagation through time: gradients stop at the borders of a batch."""

    def loss_fn(params, batch):
        (out, hidden), _ = state.apply(params, batch["x"], batch["memory"]["h"])
        error = (out - batch["y"]).square().mean(1)
        average = torch.lerp(batch["memory"]["cell.bias"], error.detach(), 0.5)
        return lm.Mean.of(error), {"h": hidden, "cell.bias": average, "age": batch["memory"]["age"] + 1}

    rows = {**batch, "memory": state.memory}
    (loss, memory), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, rows)
    return state.apply_gradients(grads, memory=memory), {"loss": loss}


def make_state(rows=ROWS, dtype=torch.float64):
    torch.manual_seed(0)
    net = RNN().to(dtype)
    memory = {
        "h": torch.randn(rows, HIDDEN, dtype=dtype),
        "cell.bias": torch.zeros(rows, dtype=dtype),  # the name of a param, and with ROWS its shape
        "age": torch.zeros(rows, dtype=torch.int16),  # of which Gloo knows nothing
    }
    return Recurrent.create(net, lm.optim.adamw(1e-2), memory=memory)


def columns(rows=ROWS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * rows, CHUNK, WIDTH, generator=generator, dtype=dtype)
    return {"x": x, "y": x.sum(2).roll(1, 1)}


def fit(transforms, steps, directory=None, dtype=torch.float64, **options):
    """The run up to `steps`, with checkpoints in `directory`."""
    checkpoint = None if directory is None else lm.Checkpointer(directory, every=lm.Every(steps=HALF), keep=None)
    runner = lm.Runner(step, transforms=transforms, checkpoint=checkpoint, progress=False)
    data = lm.Loader(columns(dtype=dtype), batch_size=ROWS, shuffle=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this run resumes with")
        return runner.fit(make_state(dtype=dtype), data, until=lm.Steps(steps), **options)


def leaves(state):
    return {path: leaf.detach().clone() for path, leaf in lm.tree.named_tensors(state)}


def assert_near(found, wanted, case, tolerance=1e-10):
    assert found.keys() == wanted.keys(), case
    for path, want in wanted.items():
        assert found[path].dtype == want.dtype, (case, path)
        torch.testing.assert_close(found[path], want, rtol=0, atol=tolerance, msg=lambda text: f"{case} {path} {text}")  # noqa: B023


def strategy(name):
    if name == "ddp":
        return lm.ddp(lm.mesh(device="cpu"), check_every=1)
    return lm.fsdp(lm.mesh(shard=-1, device="cpu"), stage=int(name[-1]))


CASES = [("ddp", 0), ("ddp", 2), ("fsdp1", 0), ("fsdp2", 2), ("fsdp3", 0), ("fsdp3", 2)]
CASES += pick([], [("fsdp1", 2), ("fsdp2", 0)])


def stop_and_resume(directory, cases):
    """Each case stopped here and resumed here, and begun by one process and resumed here; the exported leaves."""
    found = []
    for name, parts in cases:
        transforms = [strategy(name), lm.donate(), *([lm.accumulate(parts)] if parts else [])]
        own = directory / f"{name}-{parts}"
        stopped = fit(transforms, HALF, own)
        counts = [len(leaf) for leaf in stopped.state.memory.values()]
        resumed = fit(transforms, STEPS, own, resume="auto")
        moved = fit(transforms, STEPS, resume=directory / "one")
        again = lm.Runner(step, transforms=transforms, progress=False)  # of a state that was prepared before
        data = lm.Loader({k: v[HALF * ROWS :] for k, v in columns().items()}, batch_size=ROWS, shuffle=False)
        continued = again.fit(stopped.state, data, until=lm.Steps(STEPS))
        runs = [leaves(result.export()) for result in (resumed, moved, continued)]
        found.append((counts, runs, resumed.metrics["train/loss"]))
    return found


def test_the_run_is_the_uninterrupted_one_on_any_world(world2, tmp_path):
    uninterrupted = fit([], STEPS)
    wanted, loss = leaves(uninterrupted.state), uninterrupted.metrics["train/loss"]
    assert int(wanted["memory[age]"][0]) == STEPS
    fit([], HALF, tmp_path / "one")
    for rank, found in enumerate(world2.run(stop_and_resume, tmp_path, CASES)):
        for case, (counts, runs, last) in zip(CASES, found, strict=True):
            assert counts == [3 - rank] * 3, case
            for run in runs:
                assert_near(run, wanted, (rank, case))
            assert last == pytest.approx(loss, abs=1e-10)
    for name, parts in CASES:
        own = tmp_path / f"{name}-{parts}"
        assert_near(leaves(fit([], STEPS, resume=own / "checkpoints" / str(HALF)).state), wanted, (name, "on one"))
        saved = lm.checkpoint.load(own / "checkpoints" / str(STEPS), under="memory")
        assert_near(saved, {key: wanted[f"memory[{key}]"] for key in saved}, (name, "as it is saved"))


# ------------------------------------------------------------------------------------------- other shapes of a world


def train(transforms, rows):
    """The step, the state after two batches, and that exported."""
    wrapped = lm.compose(*transforms)(step)
    state = wrapped.init(make_state(rows))
    start, stop = distributed.shard_bounds(rows, *lm.parallel.rows()) if transforms else (0, rows)
    for number in range(2):
        batch = {key: leaf.split(rows)[number][start:stop] for key, leaf in columns(rows).items()}
        state, _ = wrapped(state, batch)
    return wrapped, state, leaves(wrapped.export(state))


def without_rows():
    """One row on two ranks."""
    return [train([strategy(name)], 1)[-1] for name in ("ddp", "fsdp2", "fsdp3")]


def test_a_rank_without_rows_takes_part(world2):
    *_, wanted = train([], 1)
    for found in world2.run(without_rows):
        for each in found:
            assert_near(each, wanted, "one row")


def on_two_axes(directory):
    """HSDP, and data beside tensor: what is exported, after it was saved by all and restored."""
    found = []
    for axis in ("shard", "tensor"):
        mesh = lm.mesh(data=2, device="cpu", **{axis: 2})
        plan = {"cell": lm.parallel.Rowwise(input="replicate")}
        transforms = [lm.fsdp(mesh)] if axis == "shard" else [lm.ddp(mesh), lm.tensor_parallel(plan, mesh)]
        wrapped, state, exported = train(transforms, ROWS)
        consistency.check_fields(state, dist.group.WORLD, wrapped.shard_specs(state))
        lm.checkpoint.save(directory / axis, state, step=wrapped)
        restored = lm.checkpoint.restore(directory / axis, wrapped.init(make_state()), step=wrapped)
        assert_near(leaves(restored), leaves(state), axis, 0)
        found.append(exported)
        with pytest.raises(lm.LumenError, match="is one rank's shard under lm"):
            lm.Runner(step, progress=False).fit(state, [], until=lm.Steps(1))
    other = state.replace(memory=lm.tree.map(lambda leaf: leaf + (distributed.rank() == 3), state.memory))
    with pytest.raises(
        lm.LumenError, match=r"memory\[h\] on rank 3 differs from that of the first rank of its tensor axis"
    ):
        consistency.check_fields(other, dist.group.WORLD, wrapped.shard_specs(other))
    return found


def test_on_two_axes(world4, tmp_path):
    *_, wanted = train([], ROWS)
    for found in world4.run(on_two_axes, tmp_path):
        for axis, exported in zip(("shard", "tensor"), found, strict=True):
            assert_near(exported, wanted, axis)
            assert_near(leaves(lm.checkpoint.restore(tmp_path / axis, make_state())), wanted, axis)


def under_deepspeed(directory):
    """Stopped and resumed; the exported leaves."""
    transforms = [lm.deepspeed({"zero_optimization": {"stage": 2}}), lm.accumulate(2)]
    fit(transforms, HALF, directory, torch.float32)
    result = fit(transforms, STEPS, directory, torch.float32, resume="auto")
    found = [len(leaf) for leaf in result.state.memory.values()], leaves(result.export())
    transforms[0].engine.destroy()
    return found


@pytest.mark.skipif(version_of("deepspeed") is None, reason="DeepSpeed is not installed")
def test_under_deepspeed(world2, tmp_path):
    wanted = leaves(fit([], STEPS, dtype=torch.float32).state)
    for rank, (counts, found) in enumerate(world2.run(under_deepspeed, tmp_path)):
        assert counts == [3 - rank] * 3
        assert_near(found, wanted, rank, 1e-5)


# ------------------------------------------------------------------------------------------------ what is refused


def refused():
    """What each mistake is told."""
    said = []

    def attempt(run):
        try:
            run()
        except lm.LumenError as error:
            said.append(f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', ()))}")

    for make in (lambda: strategy("ddp"), lambda: strategy("fsdp3")):
        wrapped = make()(step)
        local, mine = make_state(2), {key: leaf[:2] for key, leaf in columns().items()}  # rows of one rank alone
        attempt(lambda wrapped=wrapped, local=local, mine=mine: wrapped(wrapped.init(local), mine))
        fewer = make()(lambda state, batch: (state.replace(memory={k: v[:1] for k, v in state.memory.items()}), {}))
        attempt(lambda fewer=fewer: fewer(fewer.init(make_state()), {}))
    plain = make_state()
    attempt(lambda: lm.ddp(lm.mesh(device="cpu"))(step)(plain, {k: v[:2] for k, v in columns().items()}))
    attempt(lambda: strategy("fsdp2")(step).init(strategy("fsdp3")(step).init(plain)))
    attempt(lambda: strategy("ddp")(step).init(strategy("fsdp3")(step).init(plain)))
    attempt(lambda: lm.checkpoint.save("nowhere", strategy("ddp")(step).init(plain)))
    return said


def test_mistakes_are_told_with_the_fix(world2):
    for said in world2.run(refused):
        for batch, changed in (said[:2], said[2:4]):
            assert batch.startswith("BatchError: the leaves of the batch have different leading sizes")
            assert "This rank holds 1 of the 2 rows of state.memory[h]" in batch
            assert "Create the state with the rows of the global batch" in batch
            assert changed.startswith(
                "StateError: state.memory[h] has the shape (1, 5), and this rank's shard of its 5"
            )
        unprepared, stage, other, saved = said[4:]
        assert "was not prepared: state = step.init(state)" in unprepared
        assert stage.startswith("StateError: this state was sharded by lm.fsdp(stage=3) over 2 ranks, and lm.fsdp(")
        assert other.startswith("StateError: this state is one rank's shard under lm.fsdp, which is not a transform of")
        assert "step.export(state)" in other
        assert saved.startswith("CheckpointError: this process has only a shard of the state")


@lm.dataclass
class Carry:
    h: torch.Tensor = lm.row_field()
    mine: torch.Tensor


@lm.dataclass
class Players:
    """A state that is no TrainState."""

    one: lm.TrainState
    others: dict
    slots: dict


def players():
    """What check_equal says of states in a state, of which each rank has rows and something else of its own."""
    here = torch.full((2,), float(distributed.rank()))
    said = []
    for mine in (torch.zeros(2), here):
        state = Players(make_state(), {"a": Carry(h=here, mine=mine)}, slots={})
        try:
            said.append(lm.parallel.check_equal(state))
        except lm.LumenError as error:
            said.append(str(error))
    return said


def test_fields_are_looked_at_in_states_of_any_class(world2):
    for equal, differs in world2.run(players):
        assert equal is None
        assert "others[a].mine on rank 1 differs from that of rank 0" in differs
