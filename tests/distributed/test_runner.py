"""The Runner in a world of several processes: one run, whatever one of them sees, and whatever happens to it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from lumen.core import distributed
from lumen.parallel.comm.hang_dump import compare, read_dumps
from lumen.parallel.ddp.ddp import ddp
from tests import zygote
from tests.distributed import jobs
from tests.distributed import torchrun as launcher
from tests.distributed.pool import TaskError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ROWS, CLASSES = 23, 3  # batches of 5 over 2 processes: 3 + 2 rows, and a last one of 2 + 1
TIMED = ("time", "steps_per_second", "rows_per_second", "goodput", "data_wait", "slowest_rank", "slowest_ratio")


def columns(rows=ROWS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(CLASSES, (rows,), generator=generator)}


def make_state(dropout=0.0):
    torch.manual_seed(0)
    head = [torch.nn.Dropout(dropout)] if dropout else []
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), *head, torch.nn.Linear(8, CLASSES)).double()
    return lm.TrainState.create(net, lm.optim.adam(0.02), seed=3)


def step(state, batch):
    def loss_fn(params, batch):
        logits, _ = state.apply(params, batch["x"])
        loss = lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"))
        return loss, lm.Aux(metrics=values(batch, logits))

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss, **aux.metrics}


def values(batch, logits):
    """One of each kind."""
    return {
        "hits": lm.Mean.of(logits.argmax(-1) == batch["y"]),
        "rows": lm.Sum.of(torch.ones_like(batch["y"])),
        "largest": lm.Max.of(batch["x"]),
        "smallest": lm.Min.of(batch["x"]),
    }


def eval_step(state, batch):
    logits, _ = state.apply(state.params, batch["x"])
    loss = lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"))
    return {"loss": loss, **values(batch, logits)}


def logged(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in lines]


def close(found, wanted):
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for have, want in zip(found, wanted, strict=True):
        assert have == pytest.approx(want, rel=1e-10)


def plain(state):
    return {path: leaf.clone() for path, leaf in lm.tree.named_tensors(state)}


def make_runner(directory, *, monitor="val/loss", callbacks=(), **options):
    return lm.Runner(
        step,
        transforms=[ddp(lm.mesh(device="cpu"))],
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=4), keep=2, monitor=monitor),
        sinks=[lm.sinks.JSONL(directory / "metrics.jsonl")],
        callbacks=callbacks,
        log_every=3,
        progress=False,
        **options,
    )


# ----------------------------------------------------------------------------------------------- the law


def whole_run(directory):
    held_out = lm.Loader(columns(7, seed=2), batch_size=3, shuffle=False)
    stop = lm.EarlyStop(monitor="val/loss", patience=2, min_delta=0.03)
    result = make_runner(directory, callbacks=[stop]).fit(
        make_state(),
        lm.Loader(columns(), batch_size=5, seed=2),
        until=lm.Epochs(20),
        validate=lm.Validate(eval_step, held_out, every=lm.Every(steps=4)),
    )
    return plain(result.state), result.reason, result.clock.step, result.metrics


def test_a_run_of_two_is_a_run_of_one(world2, tmp_path):
    wanted, reason, steps, _ = whole_run(tmp_path / "one")
    assert reason.startswith("val/loss has not improved"), "the early stop is part of the law"
    found = world2.run(whole_run, tmp_path / "two")
    for state, why, at, _ in found:
        assert (why[:20], at) == (reason[:20], steps)
        for name, leaf in wanted.items():
            torch.testing.assert_close(state[name], leaf, rtol=1e-9, atol=1e-11)
    assert found[0][3].keys() == found[1][3].keys()
    timeless = [{k: v for k, v in each[3].items() if k not in TIMED} for each in found]
    assert timeless[0] == timeless[1], "to the bit, as they decide"
    close(logged(tmp_path / "two"), logged(tmp_path / "one"))


def weighted_loss(state, params, batch):
    logits, _ = state.apply(params, batch["x"])
    return lm.Mean.of(F.cross_entropy(logits, batch["y"], reduction="none"), batch.get("weight"))


def weighted_step(state, batch):
    loss, grads = lm.value_and_grad(lambda params, batch: weighted_loss(state, params, batch))(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def weighted_eval(state, batch):
    return {"loss": weighted_loss(state, state.params, batch)}


def run_padded(directory, pad):
    held_out = lm.Loader(columns(7, seed=2), batch_size=3, shuffle=False, pad=pad)
    runner = lm.Runner(
        weighted_step,
        transforms=[ddp(lm.mesh(device="cpu"))],
        sinks=[lm.sinks.JSONL(directory / "metrics.jsonl")],
        log_every=3,
        progress=False,
    )
    result = runner.fit(
        make_state(),
        lm.Loader(columns(), batch_size=5, seed=2, pad=pad),
        until=lm.Steps(10),
        validate=lm.Validate(weighted_eval, held_out, every=lm.Every(steps=4), last=True),
    )
    return plain(result.state)


def test_padded_batches_on_two_are_the_smaller_ones_on_one(world2, tmp_path):
    """The last of 7 rows in threes is one: one process has padding alone. Measured at the end of the run too."""
    assert ROWS % 5, "some batch is smaller"
    wanted = run_padded(tmp_path / "one", pad=False)
    for state in world2.run(run_padded, tmp_path / "two", True):
        for name, leaf in wanted.items():
            torch.testing.assert_close(state[name], leaf, rtol=1e-9, atol=1e-11)
    rows = logged(tmp_path / "two")
    assert [row["step"] for row in rows if "val/loss" in row] == [4, 8, 10]
    close(rows, logged(tmp_path / "one"))


def run_for_tokens(directory):
    """Batches of 5 rows, cut into 3 and 2: alone, the processes would not end together."""
    runner = make_runner(directory, monitor=None, tokens=lambda batch: 7 * len(batch["y"]))
    result = runner.fit(make_state(), lm.Loader(columns(), batch_size=5, seed=2), until=lm.Tokens(400))
    return result.clock.step, result.clock.tokens, result.clock.rows


def test_rows_and_tokens_are_those_of_all(world2, tmp_path):
    wanted = run_for_tokens(tmp_path / "one")
    assert wanted[1] == 7 * wanted[2] >= 400
    assert world2.run(run_for_tokens, tmp_path / "two") == [wanted] * 2


# ----------------------------------------------------------------------------------------------- metrics


def evaluate_parts(sizes, with_lists):
    """Each process has its own number of batches, of its own sizes."""
    import torchmetrics

    auroc = lm.metrics.from_torchmetrics(torchmetrics.classification.MulticlassAUROC(CLASSES), logits=True)

    def measure(state, batch):
        logits, _ = state.apply(state.params, batch["x"])
        extra = {"auroc": auroc.of(logits.float(), batch["y"])} if with_lists else {}
        return {**eval_step(state, batch), **extra}

    rows = columns(sum(map(sum, sizes)), seed=4)
    mine = sizes[distributed.rank()] if distributed.world_size() > 1 else [n for each in sizes for n in each]
    before = sum(map(sum, sizes[: distributed.rank()]))
    parts = {name: leaf[before : before + sum(mine)].split(mine) if mine else () for name, leaf in rows.items()}
    batches = [{name: part[i] for name, part in parts.items()} for i in range(len(mine))]
    return lm.Runner(step, progress=False).evaluate(measure, make_state(), lm.data.per_rank(batches))


@pytest.mark.parametrize("with_lists", [False, True])
@pytest.mark.parametrize("sizes", [[[4, 4], [4, 3]], [[5], [1, 2, 3]], [[], [6, 2]], [[6, 2], []]])
def test_evaluation_over_uneven_parts_is_that_of_the_whole(sizes, with_lists, world2):
    wanted = evaluate_parts(sizes, with_lists)
    found = world2.run(evaluate_parts, sizes, with_lists)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(wanted, rel=1e-10)


def merge_changing():
    """The same place, with values of another form, and last ones and plain numbers, from time to time."""
    from lumen.train.distributed import ProcessGroupContext
    from lumen.train.metric_buffer import MetricAccumulator
    from lumen.train.metric_merge import MetricMerger

    rank = distributed.rank()
    merger, meter, found = MetricMerger(ProcessGroupContext(make_state())), MetricAccumulator(), []
    forms = [
        {"a": lm.Mean.of(torch.tensor([1.0 + rank]))},
        {"a": lm.Mean.of(torch.tensor([2.0 + rank, 5.0]))},
        {"a": lm.Sum.of(torch.tensor(rank + 1)), "b": lm.Last(torch.tensor(float(rank + 7))), "c": float(rank)},
        {"a": lm.Mean.of(torch.tensor([3.0 + rank]))},
        None,
    ]
    for form in forms:
        if form is not None and not (form is forms[3] and rank == 0):  # once the first process has none
            meter.add(form)
        found.append(meter.read("m/", merger))
    return found


def test_values_of_changing_forms(world2):
    found = world2.run(merge_changing)
    assert found[0] == found[1]
    assert found[0] == [{"m/a": 1.5}, {"m/a": 3.75}, {"m/a": 3.0, "m/b": 7.0, "m/c": 0.5}, {"m/a": 4.0}, {}]


# ----------------------------------------------------------------------------------------------- decisions


class SignalAt(lm.Callback):
    """One process gets a signal after a step."""

    def __init__(self, at, rank):
        self.at, self.rank = at, rank

    def on_step(self, view):
        time.sleep(0.01)
        if view.clock.step == self.at and distributed.rank() == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def run_with_dropout(directory, stop=None, epochs=12):
    torch.manual_seed(100 + distributed.rank())  # each process draws its own masks
    runner = make_runner(directory, callbacks=[SignalAt(*stop)] if stop else [])
    held_out = lm.Loader(columns(7, seed=2), batch_size=3, shuffle=False)
    validate = lm.Validate(eval_step, held_out, every=lm.Every(steps=7))
    data = lm.Loader(columns(), batch_size=5, seed=2)
    try:
        result = runner.fit(make_state(0.3), data, until=lm.Epochs(epochs), validate=validate, resume="auto")
    except lm.Interrupted as interrupted:
        return interrupted.code, interrupted.result.clock.step, interrupted.result.reason
    return 0, result.clock.step, plain(result.state)


def test_a_signal_to_one_ends_all_after_the_same_step_and_the_run_goes_on_bitwise(world2, tmp_path):
    wanted = world2.run(run_with_dropout, tmp_path / "whole")
    stopped = world2.run(run_with_dropout, tmp_path / "parts", (11, 1))
    assert stopped[0] == stopped[1]
    assert stopped[0][0] == 75
    assert 11 <= stopped[0][1] < 60
    mark = lm.Checkpointer(tmp_path / "parts").interrupted
    assert json.loads(mark.read_text()) == {"reason": "SIGTERM", "step": stopped[0][1]}
    found = world2.run(run_with_dropout, tmp_path / "parts")
    assert not mark.exists()
    for (code, steps, state), (_, _, expected) in zip(found, wanted, strict=True):
        assert (code, steps) == (0, 60)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


WINDOW = torch.arange(28, dtype=torch.float64).sqrt()  # six batches of 5 rows, the last of 3


def window_step(state, batch):
    def as_mean(params, batch):
        return lm.Mean.of(batch["x"] + 0 * params["weight"][0])

    loss, grads = lm.value_and_grad(as_mean)(state.params, batch)
    scalar, _ = lm.value_and_grad(lambda params, batch: as_mean(params, batch).compute())(state.params, batch)
    values = {"rows": lm.Mean.of(batch["x"]), "sum": lm.Sum.of(batch["x"]), "last": lm.Last(state.step + 1)}
    return state.apply_gradients(grads), {"loss": loss, "scalar": scalar, **values}


def run_windows(*parts):
    """Of each directory's run the numbers of its window so far; a checkpoint is made before they are logged."""
    found = []
    for directory, steps in parts:
        runner = lm.Runner(
            window_step,
            transforms=[ddp(lm.mesh(device="cpu"))],
            checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=2)),
            log_every=100,
            progress=False,
        )
        state = lm.TrainState.create(torch.nn.Linear(1, 1, bias=False).double(), lm.optim.sgd(0.1))
        data = lm.Loader({"x": WINDOW}, batch_size=5, shuffle=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="this run resumes with")
            found.append(runner.fit(state, data, until=lm.Steps(steps), resume="auto").metrics)
    return found


def test_a_window_cut_by_restarts_into_other_worlds_logs_the_uninterrupted_numbers(world2, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"  # by the number of processes that begin it
    found = {(2, one): run_windows((one, 2))[0]}
    found[4, one], found[2, two] = world2.run(run_windows, (one, 4), (two, 2))[0]
    found[6, one], found[4, two] = run_windows((one, 6), (two, 4))
    (found[6, two],), _ = world2.run(run_windows, (two, 6))
    for (steps, _), numbers in found.items():
        batches = WINDOW.split(5)[:steps]
        rows = torch.cat(batches)
        scalar = sum(float(batch.mean()) for batch in batches) / steps
        mean = float(rows.mean())
        wanted = {"loss": mean, "scalar": scalar, "rows": mean, "sum": float(rows.sum()), "last": steps}
        assert {name: numbers[f"train/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-12)


@lm.dataclass
class Remembering(lm.TrainState):
    memory: torch.Tensor = field(kw_only=True)


def run_with_memory(directory, differs):
    """A field that every step makes anew of this process's rows, or of those of all; what the run ends with."""
    mesh = lm.mesh(device="cpu")

    def remembering(state, batch):
        new, metrics = step(state, batch)
        mean = batch["x"].mean()
        return new.replace(memory=mean if differs else lm.pmean(mean, "data")), metrics

    plain_state = make_state()
    fields = {each.name: getattr(plain_state, each.name) for each in dataclasses.fields(plain_state)}
    state = Remembering(**fields, memory=torch.zeros((), dtype=torch.float64))
    runner = lm.Runner(
        remembering,
        transforms=[ddp(mesh)],
        checkpoint=lm.Checkpointer(directory, every=lm.Every(steps=2)),
        progress=False,
    )
    data = lm.Loader(columns(), batch_size=5, seed=2)
    try:
        return lm.parallel.check_equal(runner.fit(state, data, until=lm.Steps(4)).state)
    except lm.LumenError as error:
        return f"{type(error).__name__}: {error} {error.__notes__}"


def test_a_field_of_a_process_s_own_rows_is_refused_at_the_first_checkpoint(world2, tmp_path):
    assert world2.run(run_with_memory, tmp_path / "same", False) == [None, None]
    for said in world2.run(run_with_memory, tmp_path / "own", True):
        assert said.startswith("WorldError: state.memory on rank 1 differs from that of rank 0")
        assert "declare that in Remembering:\n\n    memory: torch.Tensor = lm.row_field()\n" in said
        assert "raised after step 2" in said


def run_for_seconds(directory):
    """Each process's clock goes at its own pace."""
    ticks = iter(range(10**9))
    runner = make_runner(
        directory, time_fn=lambda: next(ticks) * (0.5 + 2 * distributed.rank()), callbacks=[SignalAt(0, 9)]
    )
    saved = []

    class Note(lm.Callback):
        def on_checkpoint(self, view):
            saved.append(view.clock.step)

    runner.callbacks = type(runner.callbacks)([SignalAt(0, 9), Note()])
    runner.checkpoint.every = lm.Every(seconds=15)
    data = lm.Loader(columns(), batch_size=5, seed=2)
    result = runner.fit(make_state(), data, until=lm.Steps(10**6) | lm.Seconds(60))
    return result.clock.step, result.clock.seconds, saved


def test_the_first_process_has_the_time(world2, tmp_path):
    first, second = world2.run(run_for_seconds, tmp_path)
    assert first == second
    assert first[1] >= 60
    assert len(first[2]) >= 3


class StopOne(lm.Callback):
    def on_step(self, view):
        time.sleep(0.01)
        if view.clock.step == 6 and distributed.rank() == 1:
            view.stop("rank 1 has seen enough")


def run_until_one_stops(directory):
    data = lm.Loader(columns(), batch_size=5, seed=2)
    result = make_runner(directory, callbacks=[StopOne()]).fit(make_state(), data, until=lm.Steps(10**6))
    return result.clock.step, result.reason


def test_a_callback_of_one_process_ends_all(world2, tmp_path):
    first, second = world2.run(run_until_one_stops, tmp_path)
    assert first == second
    assert first[1] == "rank 1 has seen enough"


def run_on_lists(directory):
    data = list(lm.Loader(columns(), batch_size=5, seed=2).epoch(0))[: 3 + distributed.rank()]
    make_runner(directory, monitor=None).fit(make_state(), lm.data.per_rank(data), until=lm.Epochs(1))


def test_lists_of_different_lengths(world2, tmp_path):
    with pytest.raises(TaskError, match=r"different numbers of batches in an epoch: \[3, 4\]"):
        world2.run(run_on_lists, tmp_path)


def run_unjoined(directory):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = lm.Loader(columns(), batch_size=5, seed=2)
        lm.Runner(step, progress=False).fit(make_state(), data, until=lm.Steps(2))
    return [str(each.message) for each in caught if each.category is lm.InexactWarning]


def test_nothing_joins_the_processes(world2, tmp_path, monkeypatch):
    first, second = world2.run(run_unjoined, tmp_path)
    assert "lm.ddp()" in first[0]
    assert not second
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "there", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(lm.LumenError, match="one of 4"):
        lm.Runner(step, progress=False).fit(make_state(), lm.Loader(columns(), batch_size=5), until=lm.Steps(2))


# ----------------------------------------------------------------------------------------------- faults


def torchrun(directory, processes, *, restarts=0, limit=120, fresh=False, **options):
    """The exit code and what was said. Unless `fresh`, each worker is a fork that has torch loaded."""
    directory.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parents[2]
    agent = ["-m", "torch.distributed.run"] if fresh else [launcher.__file__]
    command = [sys.executable, *agent, "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", jobs.__file__, str(directory), json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = zygote.start(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, said


@pytest.mark.parametrize("strategy", ["ddp", "none"])
def test_an_error_of_one_is_that_of_all(strategy, tmp_path):
    code, said = torchrun(tmp_path, 2, what="raise", at=6, strategy=strategy, steps=10**5, fresh=strategy == "ddp")
    assert code == 1
    assert "ValueError: a row that cannot be read" in said
    assert said.index("ValueError: a row") < said.find("ChildFailedError")
    # Only what was whole everywhere; who cannot leave a collective is ended, on a busy machine before it is on disk.
    assert sorted(lm.Checkpointer(tmp_path).store.steps()) in ([4], [])


def test_a_process_that_hangs_is_named_with_its_step(tmp_path):
    code, said = torchrun(tmp_path, 3, what="hang", at=6, timeout=12.0, steps=10**5)
    assert code == 1
    assert "rank 1 hangs in step 6" in said
    assert f"to compare them: lumen hang {tmp_path}" in said
    dumps = read_dumps(tmp_path)
    assert [dump["rank"] for dump in dumps] == [0, 1, 2]
    (line,) = compare(dumps)
    assert "rank 1 has not begun collective" in line
    assert line.endswith("which ranks 0, 2 have begun")
    assert "jobs.py" in (tmp_path / "hang" / "rank-1.txt").read_text()


def test_data_that_ends_early_for_one(tmp_path):
    code, said = torchrun(tmp_path, 2, what="end", at=7, steps=10**5)
    assert code == 1
    assert "the data of rank 1 ended after step 7, and that of rank 0 did not" in said


def rows_by_step(directory, processes):
    """The rows of each global batch, from the last time that its step was made."""
    found = {}
    for rank in range(processes):
        for line in (directory / f"rows-{rank}.jsonl").read_text().splitlines():
            at, rows = json.loads(line)
            found.setdefault(at, {})[rank] = rows
    return {at: sorted(row for rows in parts.values() for row in rows) for at, parts in found.items()}


def test_a_killed_process_and_fewer_processes(tmp_path):
    alone = lm.Runner(jobs.step, progress=False).fit(
        jobs.make_state(), loader := lm.Loader(jobs.columns(), batch_size=jobs.SIZE, seed=2), until=lm.Steps(15)
    )
    stream = loader.stream()
    order = [sorted(next(stream)[0]["row"].tolist()) for _ in range(15)]

    code, said = torchrun(tmp_path, 3, restarts=1, strategy="fsdp", what="kill", at=7, rank=2, steps=8)
    assert code == 0, said[-3000:]
    assert (tmp_path / "happened").exists()
    assert [rows_by_step(tmp_path, 3)[at] for at in range(8)] == order[:8]
    for rows in tmp_path.glob("rows-*.jsonl"):
        rows.unlink()
    shutil.rmtree(tmp_path / "final")
    code, said = torchrun(tmp_path, 2, strategy="ddp", steps=15)
    assert code == 0, said[-3000:]
    assert said.count("resumes with 2 processes") == 1
    assert rows_by_step(tmp_path, 2) == dict(enumerate(order[8:], 8))
    final = lm.checkpoint.restore(tmp_path / "final", jobs.make_state())
    for name, leaf in alone.state.params.items():
        torch.testing.assert_close(final.params[name], leaf, rtol=1e-6, atol=1e-9)
