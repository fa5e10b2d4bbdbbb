"""`local`: ranks train apart and are joined; every step and averaged it is ddp."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.core import distributed as world
from lumen.errors import BatchError, CheckpointMismatchError, StateError
from tests.distributed.models import bare, batches, furthest, make_state, part, step

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

OUTER = lm.optim.sgd(0.7, momentum=0.9, nesterov=True)
STACKS = {
    "alone": lambda every, outer: [lm.local(every=every, outer=outer)],
    "inside": lambda every, outer: [lm.local(every=every, outer=outer), lm.accumulate(2), lm.clip(1e9), lm.donate()],
    "compiled": lambda every, outer: [lm.compile(backend="eager"), lm.clip(1e9), lm.local(every=every, outer=outer)],
}


def rows_of_rank(batch, rank=None):
    """Half of the rows, without the mask that would weigh them differently."""
    mine = part(batch, (4, 4), world.rank() if rank is None else rank)
    return {**mine, "mask": torch.ones_like(mine["mask"])}


def averaged(names):
    """Of each stack: how far local SGD in which ranks are joined after each step is from ddp."""
    found = []
    for name in names:
        tx = lm.optim.sgd(0.1)
        apart = lm.compose(*STACKS[name](1, lm.optim.sgd(1.0)))(step)
        together = lm.ddp()(step)
        state, expected = apart.init(make_state("mlp", tx=tx)), together.init(make_state("mlp", tx=tx))
        for batch in batches(4, 8):
            state, _ = apart(state, rows_of_rank(batch))
            expected, _ = together(expected, rows_of_rank(batch))
        found.append(furthest(bare(apart.export(state).params), bare(expected.params)))
    return found


def test_joined_after_every_step_by_plain_sgd_it_is_ddp(world2):
    for found in world2.run(averaged, list(STACKS)):
        for name, (distance, leaf) in zip(STACKS, found, strict=True):
            assert distance < 1e-12, (name, leaf)


def by_hand(count, every):
    """DiLoCo in one process, as its paper writes it: two workers, and the outer optimizer of torch."""
    anchor = make_state("mlp", tx=lm.optim.adam(0.01))
    outer = {name: torch.nn.Parameter(p.clone()) for name, p in anchor.params.items()}
    optimizer = torch.optim.SGD(outer.values(), lr=0.7, momentum=0.9, nesterov=True)
    workers = [anchor, anchor]
    for number, batch in enumerate(batches(count, 8), 1):
        workers = [step(state, rows_of_rank(batch, rank))[0] for rank, state in enumerate(workers)]
        if number % every == 0:
            for name, p in outer.items():
                p.grad = p.detach() - (workers[0].params[name] + workers[1].params[name]) / 2
            optimizer.step()
            workers = [w.replace(params={name: p.detach().clone() for name, p in outer.items()}) for w in workers]
    return workers, {name: p.detach() for name, p in outer.items()}


def diloco(count, every):
    wrapped = lm.local(every=every, outer=OUTER)(step)
    state = wrapped.init(make_state("mlp", tx=lm.optim.adam(0.01)))
    for batch in batches(count, 8):
        state, _ = wrapped(state, rows_of_rank(batch))
    return bare(state.params), bare(state.opt_state), bare(wrapped.export(state).params)


@pytest.mark.parametrize("count", [6, 8])  # joined after the last step, or two steps before
def test_it_is_diloco_written_by_hand(count, world2):
    workers, outer = by_hand(count, 3)
    for worker, (params, opt_state, exported) in zip(workers, world2.run(diloco, count, 3), strict=True):
        assert furthest(params, bare(worker.params))[0] < 1e-12
        assert furthest(opt_state, bare(worker.opt_state))[0] < 1e-12
        assert furthest(exported, outer)[0] < 1e-12


def resumed(directory):
    """A run that is interrupted between two times of joining, and resumed, against one that is not."""

    def run(name, until, resume="never"):
        runner = lm.Runner(
            step,
            transforms=[lm.local(every=3, outer=OUTER)],
            checkpoint=lm.Checkpointer(directory / name, every=lm.Every(steps=2)),
            log_every=2,
            progress=False,
        )
        rows = lm.data.per_rank([rows_of_rank(batch) for batch in batches(9, 8)])
        state = make_state("mlp", tx=lm.optim.adam(0.01))
        return runner, runner.fit(state, rows, until=lm.Steps(until), resume=resume)

    _, expected = run("whole", 9)
    run("cut", 4)
    runner, found = run("cut", 9, "auto")
    same = all(torch.equal(leaf, bare(expected.state)[path]) for path, leaf in bare(found.state).items())
    return same, found.metrics["train/loss"] == expected.metrics["train/loss"], str(runner.checkpoint.latest())


def test_a_run_resumes_exactly_between_two_times_of_joining(world2, tmp_path):
    answers = world2.run(resumed, tmp_path)
    assert [answer[:2] for answer in answers] == [(True, True)] * 2
    alone = lm.local(every=3, outer=OUTER)(step).init(make_state("mlp", tx=lm.optim.adam(0.01)))
    with pytest.raises(CheckpointMismatchError):  # one process has no shards of two
        lm.checkpoint.restore(answers[0][2], alone)


def refusals():
    """What each rank raises for a batch without rows, for updates that one rank skips, and for a missing step."""
    messages = []
    wrapped = lm.local(every=1)(step)
    state = wrapped.init(make_state("mlp"))
    try:
        wrapped(state, {name: leaf[:0] for name, leaf in batches(1, 8)[0].items()})
    except BatchError as error:
        messages.append(str(error))
    skipping = lm.local(every=1)(step)
    state = skipping.init(make_state("mlp", tx=lm.optim.apply_if_finite(lm.optim.sgd(0.1), 3)))
    batch = rows_of_rank(batches(1, 8)[0])
    if world.rank():
        batch["x"] = batch["x"] * torch.nan
    try:
        skipping(state, batch)
    except StateError as error:
        messages.append(str(error))
    try:
        lm.ddp()(step).init(state)
    except StateError as error:
        messages.append(str(error))
    return messages


def test_what_ranks_cannot_do_apart_is_refused(world2):
    for messages in world2.run(refusals):
        assert [message.partition(",")[0] for message in messages] == [
            "this rank has no rows",
            "state.opt_state.consecutive differs between the ranks of lm.local",
            "this state is one rank's shard under lm.local",
        ]
