"""Checkpoints that several processes write together: whole or invisible, and the same whatever wrote and reads them."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file

import lumen as lm
from lumen.cli.main import main
from lumen.core import distributed
from lumen.core.sharding import ShardSpec, Slice
from lumen.core.step import Transform
from lumen.errors import CorruptCheckpointError
from lumen.parallel.ddp.ddp import ddp
from lumen.parallel.fsdp.fsdp import fsdp
from tests.distributed import fsdp_models, models, sharded_jobs  # noqa: F401 (the first adds models)
from tests.distributed.pool import TaskError
from tests.tiers import pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TIMED = ("time", "steps_per_second", "rows_per_second", "goodput", "data_wait", "slowest_rank", "slowest_ratio")


def strategy(name, size=None):
    """A strategy by a short name, in a world of any size."""
    size = size or distributed.world_size()
    if name == "ddp":
        return ddp(lm.mesh(data=size, device="cpu"))
    if name == "hsdp":
        return fsdp(lm.mesh(data=2, shard=size // 2, device="cpu"))
    return fsdp(lm.mesh(shard=size, device="cpu"), stage=int(name[-1]))


def step_under(name, others=("ema", "donate")):
    return lm.compose(strategy(name), *models.transforms(others))(models.step)


def trained(name, model="deep", dtype=torch.float32, steps=2):
    """A step under a strategy, and its state after a few steps."""
    step = step_under(name)
    state = step.init(models.make_state(model, dtype))
    data = models.batches(steps, 8, dtype)
    share = [2] * 4 if distributed.world_size() == 4 else [8 // distributed.world_size()] * distributed.world_size()
    for batch in data:
        state, _ = step(state, models.part(batch, share, distributed.rank()))
    return step, state


def whole(step, state):
    """Every leaf of the state that no process holds a part of alone, with the slots of the other transforms."""
    return bits(step.transforms[0].export(state))


def bits(state):
    """Every leaf of a whole state."""
    return {path: leaf.clone() for path, leaf in lm.tree.named_tensors(state)}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        have = found[name]
        assert (have.dtype, have.shape) == (want.dtype, want.shape), name
        assert raw(have).equal(raw(want)), name


def raw(tensor):
    """Its bytes: a NaN is equal to itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def save_trained(path, name, model="deep", dtype=torch.float32):
    """Saved by all; the whole state, as it was."""
    step, state = trained(name, model, dtype)
    lm.checkpoint.save(path, state, step=step, meta={"by": name})
    return whole(step, state)


def restore_under(path, name, model="deep", dtype=torch.float32):
    """The whole state, put together from what each process read; then saved again by all."""
    step = step_under(name)
    like = step.init(models.make_state(model, dtype))
    state = lm.checkpoint.restore(path, like, step=step)
    assert lm.tree.structure(state) == lm.tree.structure(like)
    lm.checkpoint.save(path.with_name(f"again-{distributed.world_size()}-{name}"), state, step=step)
    return whole(step, state)


# ------------------------------------------------------------------------------------------------------- the law


STAGES = ["fsdp3", "fsdp2", "fsdp1", "hsdp"]


@pytest.mark.parametrize("stage", STAGES)
def test_saved_by_four_it_is_restored_by_any_number_under_any_strategy(stage, worlds, tmp_path):
    path = tmp_path / "first"
    wanted = worlds(4).run(save_trained, path, stage)[0]
    alone = lm.compose(*models.transforms(["ema", "donate"]))(models.step)
    like = alone.init(models.make_state("deep", torch.float32))
    assert_same(bits(lm.checkpoint.restore(path, like)), wanted)
    others = [(2, "ddp"), (2, "fsdp1"), (2, "fsdp3"), (3, "fsdp3"), (4, "hsdp"), (4, "fsdp2")]
    for size, name in pick(others[STAGES.index(stage) :: 4], others):
        for found in worlds(size).run(restore_under, path, name):
            assert_same(found, wanted)
        again = lm.checkpoint.restore(tmp_path / f"again-{size}-{name}", like)
        assert_same(bits(again), wanted)


def test_float32_averages_of_16_bit_params_are_cut_and_joined_as_they_are(worlds, tmp_path):
    path, dtype = tmp_path / "first", torch.bfloat16
    wanted = worlds(2).run(save_trained, path, "fsdp3", "deep", dtype)[0]
    alone = lm.compose(*models.transforms(["ema", "donate"]))(models.step)
    like, state = (alone.init(models.make_state("deep", dtype)) for _ in range(2))
    assert_same(bits(lm.checkpoint.restore(path, like)), wanted)
    for found in worlds(2).run(restore_under, path, "fsdp1", "deep", dtype):
        assert_same(found, wanted)
    for batch in models.batches(2, 8, dtype):
        state, _ = alone(state, batch)
    for name, leaf in bits(state).items():
        assert wanted[name].dtype == leaf.dtype, name
        torch.testing.assert_close(wanted[name], leaf, rtol=0.05, atol=0.02, msg=name)
    exported = torch.load(
        lm.checkpoint.export(path, tmp_path / "ema.pt", format="torch", what="ema"), weights_only=True
    )
    for name, averaged in lm.ema.params(lm.checkpoint.restore(path, like)).items():
        assert averaged.dtype == dtype
        assert torch.equal(exported[name], averaged)


# ------------------------------------------------------------------------------------- any tree, cut in any way


class Scatter(Transform):
    """Gives each process the boxes that a random number says, of each leaf of a tree that is known."""

    name = "scatter"
    shards = True

    def __init__(self, seed, size, rank):
        self.chance, self.size, self.rank = random.Random(seed), size, rank
        self.cut = {}

    def init(self, state):
        """The boxes of a leaf, one below the other; a copy of some is held by all, and one process owns it."""
        leaves, spec = lm.tree.flatten(state)
        for place, leaf in enumerate(leaves if self.size > 1 else ()):
            if not isinstance(leaf, torch.Tensor) or not leaf.dim() or self.chance.random() < 0.25:
                continue
            way = self.chance.choice([rows, columns, fused, rows_of_columns, scattered, copies])
            owned = way(leaf.shape, self.size, self.chance)
            blocks = [(low, size) for rank, low, size in owned if rank in (self.rank, None) and min(size) > 0]
            owner = way is not copies or self.rank == self.size - 1
            leaves[place], self.cut[place] = stacked(leaf, blocks, owner)
        return spec.unflatten(leaves)

    def shard_specs(self, state):
        return self.cut


def stacked(leaf, blocks, owner):
    """A tensor with the blocks one below the other, and what it is of the leaf."""
    boxes, below = [], 0
    for low, size in blocks:
        boxes.append(Slice((below, *(0 for _ in low[1:])), tuple(low), tuple(size)))
        below += size[0]
    widest = [max((size[dim] for _, size in blocks), default=0) for dim in range(1, leaf.dim())]
    local = torch.zeros((below, *widest), dtype=leaf.dtype)
    for box in boxes:
        part(local, box.local, box.size).copy_(part(leaf, box.full, box.size))
    return local, ShardSpec(tuple(leaf.shape), tuple(boxes), owner)


def part(tensor, low, size):
    return tensor[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]


def spans(length, count):
    each = -(-length // count)
    return [(min(i * each, length), min((i + 1) * each, length)) for i in range(count)]


def rows(shape, size, chance, dim=0):
    found = []
    for rank, (start, stop) in enumerate(spans(shape[dim], size)):
        low, extent = [0] * len(shape), list(shape)
        low[dim], extent[dim] = start, stop - start
        found.append((rank, low, extent))
    return found


def columns(shape, size, chance):
    return rows(shape, size, chance, dim=len(shape) - 1)


def fused(shape, size, chance):
    """Rows of three groups for each."""
    if shape[0] % (3 * size):
        return rows(shape, size, chance)
    each = shape[0] // (3 * size)
    return [
        (rank, [group * each * size + rank * each, *[0] * (len(shape) - 1)], [each, *shape[1:]])
        for rank in range(size)
        for group in range(3)
    ]


def rows_of_columns(shape, size, chance):
    """Two halves, each cut unevenly along the same or another dim."""
    halves = columns(shape, 2, chance) if chance.random() < 0.5 else rows(shape, 2, chance)
    found = []
    for half, (_, low, extent) in enumerate(halves):
        ranks = [rank for rank in range(size) if rank % 2 == half] or [0]
        for rank, (start, stop) in zip(ranks, spans(extent[0], len(ranks)), strict=True):
            found.append((rank, [low[0] + start, *low[1:]], [stop - start, *extent[1:]]))
    return found


def scattered(shape, size, chance):
    """Cut in two again and again, anywhere, each part for anyone."""
    blocks = [([0] * len(shape), list(shape))]
    for _ in range(chance.randrange(7)):
        low, extent = blocks.pop(chance.randrange(len(blocks)))
        dim = chance.randrange(len(shape))
        at = chance.randint(0, extent[dim])
        blocks.append((low, [*extent[:dim], at, *extent[dim + 1 :]]))
        blocks.append(
            ([*low[:dim], low[dim] + at, *low[dim + 1 :]], [*extent[:dim], extent[dim] - at, *extent[dim + 1 :]])
        )
    return [(chance.randrange(size), low, extent) for low, extent in blocks]


def copies(shape, size, chance):
    return [(None, [0] * len(shape), list(shape))]


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2]


def random_tree(seed):
    """The same on every process: leaves of any form, and None, empty containers and scalars between them."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def leaf():
        shape = [chance.choice([1, 2, 3, 5, 7, 8, 12, 24]) for _ in range(chance.randrange(4))]
        if shape and chance.random() < 0.1:
            shape[chance.randrange(len(shape))] = 0
        dtype = chance.choice(DTYPES)
        count = math.prod(shape) * dtype.itemsize
        held = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
        return held.view(dtype).view(shape)

    others = [None, {}, (), 3, "text", 0.5]
    names = ["a", "b.c", "d/e", "f", "g~", ".."]
    return {name: leaf() if chance.random() < 0.8 else chance.choice(others) for name in names} | {"sure": leaf()}


def scattering(tree, seed):
    transform = Scatter(seed, distributed.world_size(), distributed.rank())
    step = transform(models.step)
    return step, step.init(tree)


def save_random(directory, seeds):
    for seed in seeds:
        step, state = scattering(random_tree(seed), 1000 + seed)
        lm.checkpoint.save(directory / str(seed), state, step=step)


def restore_random(directory, seeds):
    """Under another cut than it was saved with."""
    for seed in seeds:
        step, wanted = scattering(random_tree(seed), 2000 + seed + 17 * distributed.world_size())
        like = lm.tree.map(lambda x: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x, wanted)
        found = lm.checkpoint.restore(directory / str(seed), like, step=step)
        for have, want in zip(lm.tree.tensors(found), lm.tree.tensors(wanted), strict=True):
            assert raw(have).equal(raw(want)), seed


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_tree_cut_in_any_way(size, worlds, tmp_path):
    seeds = range(100 * size, 100 * size + pick(6, 15))
    worlds(size).run(save_random, tmp_path, seeds)
    loose = 0
    for seed in seeds:
        found, wanted = lm.checkpoint.load(tmp_path / str(seed)), random_tree(seed)
        for name, leaf in wanted.items():
            if isinstance(leaf, torch.Tensor):
                assert raw(found[name]).equal(raw(leaf)), (seed, name)
        loose += any("parts" in row for row in header_of(tmp_path / str(seed))["leaves"])
    assert size == 1 or loose > len(seeds) // 3, "some are cut"
    for other in pick((1 + size % 4, 1 + (size + 1) % 4), (1, 2, 3, 4)):
        worlds(other).run(restore_random, tmp_path, seeds)


def header_of(path):
    return json.loads((path / "meta" / "metadata").read_text())


def test_a_process_reads_only_the_chunks_that_it_needs(world2, tmp_path):
    """The others may even be damaged; a whole reader names the array and the chunk."""
    path = tmp_path / "first"
    wanted = world2.run(save_trained, path, "fsdp3")[0]
    chunk = path / "state" / "params.blocks.0.up.weight" / "c.1.0"
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"c\.1\.0, which contains a shard of 'params/blocks.0.up.weight'"):
        lm.checkpoint.load(path)
    first = world2.run(read_by_one, path, 0)[0]
    assert_same(first, {"x": wanted["params[blocks.0.up.weight]"][:6]})
    with pytest.raises(TaskError, match=r"c\.1\.0, which contains a shard of 'params/blocks.0.up.weight'"):
        world2.run(read_by_one, path, 1)


def read_by_one(path, rank):
    """One process reads its part alone."""
    step = step_under("fsdp3")
    like = step.init(models.make_state("deep", torch.float32))
    if distributed.rank() != rank:
        return None
    return {"x": lm.checkpoint.restore(path, like, step=step).params["blocks.0.up.weight"]}


# ------------------------------------------------------------------------------------------------- what goes wrong


def ended(processes, limit=120):
    """Exit codes and what was said."""
    try:
        return [(process.wait(limit), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_whole(path, number):
    like = lm.compose()(sharded_jobs.step).init(sharded_jobs.value_of(0))
    assert_same(bits(lm.checkpoint.restore(path, like)), bits(sharded_jobs.value_of(number)))


def test_a_process_killed_at_any_moment_of_a_save_loses_nothing(tmp_path):
    chance = random.Random(1)
    store, done = lm.checkpoint.Store(tmp_path), tmp_path / "done"
    last = 0
    for turn in range(pick(2, 8)):
        done.unlink(missing_ok=True)
        processes = sharded_jobs.start("save_on", tmp_path, 2)
        deadline = time.monotonic() + 120
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        processes[turn % 2].kill()
        ended(processes)
        last = max(last, int(done.read_text()))
        assert store.latest() >= last, "what was said to be done"
        for step in store.steps():
            assert_whole(store.path(step), step)
    with store:  # the next run tidies up
        assert set(os.listdir(tmp_path)) == {".lumen-lock", "done", *map(str, store.steps())}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_is_an_error_of_all(rank, tmp_path):
    found = ended(sharded_jobs.start("save_hindered", tmp_path, 2, what="full", rank=rank))
    for code, out, err in found:
        assert code == 0, err[-3000:]
        told = json.loads(out)
        assert "saving step 2" in told["said"]
        assert "File too large" in told["said"]
        assert told["steps"] == [3], "the next save is as if nothing had happened"
    other = json.loads(found[1 - rank][1])["said"]
    assert f"rank {rank}: OSError" in other or f"rank {rank}: " in other
    assert_whole(tmp_path / "3", 3)
    assert sorted(os.listdir(tmp_path)) == [".lumen-lock", "3"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_named_in_time(rank, tmp_path):
    found = ended(sharded_jobs.start("save_hindered", tmp_path, 2, what="hang", rank=rank, timeout=4.0))
    code, out, err = found[1 - rank]
    assert code == 0, err[-3000:]
    told = json.loads(out)
    assert f"rank {rank} hangs or has exited" in told["said"]
    assert not told["late"], "before it came back"
    assert told["steps"] == [1]
    late = json.loads(found[rank][1])["said"]  # when it comes back
    assert f"rank {rank} hangs" in late or (rank == 1 and "rank 0 is gone" in late)
    assert_whole(tmp_path / "1", 1)


# ------------------------------------------------------------------------------------------------------ the Runner


class EndAt(lm.Callback):
    """The run ends after a step, as by a signal."""

    def __init__(self, at):
        self.at = at

    def on_step(self, view):
        if view.clock.step == self.at and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def data_set():
    batch = models.batches(1, 23, torch.float64)[0]
    return {"x": batch["x"], "y": batch["y"], "mask": batch["mask"]}


def run(directory, name, end=None, steps=20):
    """A run under a strategy, to its end or to a signal: the whole state, and whether checkpoints are in parts."""
    runner = lm.Runner(
        models.step,
        transforms=[strategy(name), *models.transforms(["ema", "donate"])],
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=4), keep=2),
        sinks=[lm.sinks.JSONL(directory / "metrics.jsonl")],
        callbacks=[] if end is None else [EndAt(end)],
        log_every=3,
        progress=False,
    )
    state = models.make_state("mlp")
    data = lm.Loader(data_set(), batch_size=6, seed=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this run resumes with")
        try:
            result = runner.fit(state, data, until=lm.Steps(steps), resume="auto")
        except lm.Interrupted as interrupted:
            result = interrupted.result
    return result.clock.step, whole(runner.step, result.state)


def logged(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in lines]


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(world2, tmp_path):
    wanted = world2.run(run, tmp_path / "whole", "fsdp3")
    steps, _ = world2.run(run, tmp_path / "parts", "fsdp3", 7)[0]
    assert 7 <= steps < 20
    newest = lm.Checkpointer(tmp_path / "parts").latest()
    assert int(newest.name) == steps
    assert header_of(newest)["format"] == 2, "in parts"
    found = world2.run(run, tmp_path / "parts", "fsdp3")
    for (steps, have), (_, want) in zip(found, wanted, strict=True):
        assert steps == 20
        assert_same(have, want)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_a_run_goes_on_under_another_strategy_and_with_another_number_of_processes(worlds, tmp_path):
    _, wanted = run(tmp_path / "whole", "fsdp3")
    ways = [(2, "fsdp3", 5), (1, "fsdp3", 9), (4, "hsdp", 13), (2, "ddp", 16), (2, "fsdp1", 20)]
    for size, name, steps in ways:
        found = run(tmp_path / "parts", name, None, steps) if size == 1 else None
        found = found or worlds(size).run(run, tmp_path / "parts", name, None, steps)[0]
        assert found[0] == steps
    for name, want in wanted.items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-9, atol=1e-11)


def run_with_damage(directory):
    """The chunk of one process alone is damaged in the newest checkpoint."""
    run(directory, "fsdp3", None, 8)
    if distributed.rank() == 0:
        chunk = next((directory / "checkpoints" / "8" / "state").glob("params.0.weight/c.1.0"))
        content = bytearray(chunk.read_bytes())
        content[-1] ^= 1
        chunk.write_bytes(content)
    torch.distributed.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps, _ = run(directory, "fsdp3", None, 8)
    return steps, [str(each.message) for each in caught if each.category is lm.InexactWarning]


def test_damage_that_one_process_sees_is_that_of_all(world2, tmp_path):
    first, second = world2.run(run_with_damage, tmp_path)
    assert (first[0], second[0]) == (8, 8)
    assert "checkpoint 8 is damaged and was set aside; the run resumes from 4" in first[1][0]
    assert not second[1], "said once"
    assert (tmp_path / "checkpoints" / "damaged-8").is_dir()


def smoke():
    runner = lm.Runner(models.step, transforms=[strategy("fsdp3")], progress=False)
    return runner.smoke(models.make_state("mlp"), lm.Loader(data_set(), batch_size=6, seed=2)).clock.step


def test_smoke_saves_and_reads_in_the_first_ones_directory(world2):
    assert world2.run(smoke) == [1, 1]


# ---------------------------------------------------------------------------------------------------------- misuse


def save_a_part(path):
    step, state = trained("fsdp3", "mlp", torch.float64, steps=1)
    try:
        lm.checkpoint.save(path, state)
    except lm.LumenError as error:
        return str(error)


def save_different_trees(path):
    step = step_under("fsdp3")
    state = step.init(models.make_state("mlp"))
    if distributed.rank() == 1:
        state = state.replace(buffers={"own": torch.ones(1)})
    try:
        lm.checkpoint.save(path, state, step=step)
    except lm.LumenError as error:
        return str(error)


def save_where_something_is(path):
    step = step_under("fsdp3")
    try:
        lm.checkpoint.save(path, step.init(models.make_state("mlp")), step=step)
    except lm.LumenError as error:
        return str(error)


def test_what_cannot_be_saved_together(world2, tmp_path):
    for said in world2.run(save_a_part, tmp_path / "a"):
        assert "has only a shard of the state under lm.fsdp. Write lm.checkpoint.save(path, state, step=step)" in said
    for said in world2.run(save_different_trees, tmp_path / "b"):
        assert "rank 1 saves a tree of another structure than rank 0" in said
    (tmp_path / "c").mkdir()
    for said in world2.run(save_where_something_is, tmp_path / "c"):
        assert "c exists; a checkpoint is written to a new directory" in said
    assert os.listdir(tmp_path) == ["c"]


def save_and_go_on(path):
    """What a donated step does to its memory afterwards is not in what was saved before."""
    step, state = trained("fsdp3")
    kept = whole(step, state)
    with lm.checkpoint.Store(path).open(step) as store:
        store.save(1, state)
        for batch in models.batches(3, 8, torch.float32):
            state, _ = step(state, models.part(batch, [4, 4], distributed.rank()))
        store.wait()
        found = store.restore(1, state)
    return kept, whole(step, found)


def test_a_donated_state_goes_on_while_it_is_written(world2, tmp_path):
    for kept, found in world2.run(save_and_go_on, tmp_path):
        assert_same(found, kept)


ORBAX = """
import sys, json, numpy as np, orbax.checkpoint as ocp
found = ocp.PyTreeCheckpointer().restore(sys.argv[1] + "/state")
params = found["params"]
print(json.dumps({name: [str(a.dtype), list(a.shape), np.asarray(a).tobytes().hex()] for name, a in params.items()}))
"""


def test_plain_orbax_reads_it(world2, tmp_path):
    wanted = world2.run(save_trained, tmp_path / "x", "fsdp3", "deep", torch.bfloat16)[0]
    done = subprocess.run(
        [sys.executable, "-c", ORBAX, str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["inspect", str(tmp_path / "x"), "--verify"]) == 0
    exported = lm.checkpoint.export(tmp_path / "x", tmp_path / "x.safetensors")
    found = json.loads(done.stdout.splitlines()[-1])
    params = {name[7:-1]: leaf for name, leaf in wanted.items() if name.startswith("params[")}
    assert_same(load_file(exported), params)
    assert found.keys() == params.keys()
    for name, leaf in params.items():
        assert found[name] == ["bfloat16", list(leaf.shape), raw(leaf).numpy().tobytes().hex()], name
