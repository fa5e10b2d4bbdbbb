"""Inputs that once gave wrong numbers without an error: right on two processes."""

from __future__ import annotations

import functools
import gc
import math
import re
import warnings
import weakref

import pytest
import torch
import torchmetrics.classification as tm

import lumen as lm
from lumen.core import distributed
from tests.laws.cases import (
    CASES,
    LABELS,
    SCORES,
    Form,
    difference,
    linear_state,
    metric_columns,
    metric_run,
    metric_step,
    whole_window,
    window,
)
from tests.laws.test_cases import Failing, eval_step, square_step
from tests.tiers import pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

ROWS = slice(0, 5), slice(5, 8)  # of each rank
TOGETHER = [ROWS]
HALVES = [[slice(0, 3), slice(5, 7)], [slice(3, 5), slice(7, 8)]]
FORMS = {
    "ddp": Form(lambda: [lm.ddp()], TOGETHER),
    "fsdp 1": Form(lambda: [lm.fsdp(stage=1)], TOGETHER),
    "fsdp 2": Form(lambda: [lm.fsdp(stage=2)], TOGETHER),
    "fsdp 3": Form(lambda: [lm.fsdp(stage=3)], TOGETHER, narrow=True),
    "ddp accumulate": Form(lambda: [lm.ddp(), lm.accumulate(2)], HALVES),
    "fsdp accumulate": Form(lambda: [lm.fsdp(), lm.accumulate(2)], HALVES, narrow=True),
    "ddp compile": Form(lambda: [lm.compile(backend="eager"), lm.ddp()], TOGETHER),
}
ALWAYS, IN_TURN = ("ddp", "fsdp 3", "ddp accumulate"), ("fsdp 1", "fsdp 2", "fsdp accumulate")
COMPILED = ("f01 buffers", "f30 sgd", "f32 from_torch")


def cells():
    """The cases with the forms that they are run in: each form of sharding in turn, and under `make test-all` all."""
    found = []
    for i, name in enumerate(CASES):
        compiled = ["ddp compile"] if name in COMPILED else []
        found.append((name, pick([*ALWAYS, IN_TURN[i % len(IN_TURN)], *compiled], list(FORMS))))
    return found


def numbers(chosen):
    """By case and form: how far the numbers are from the right ones, or the error."""
    found = {}
    for name, forms in chosen:
        case = CASES[name]
        batches = [{key: x[ROWS[distributed.rank()]] for key, x in batch.items()} for batch in case.batches()]
        for form in forms:
            try:
                found[name, form] = difference(case.run(FORMS[form], batches), case.expected(FORMS[form]))
            except lm.LumenError as error:
                found[name, form] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("half", [slice(0, 6), slice(6, None)])
def test_numbers(half, world2):
    for found in world2.run(numbers, cells()[half]):
        assert found
        for (name, form), far in found.items():
            if form in CASES[name].refused:
                error, message = CASES[name].refused[form]
                assert re.search(f"^{error.__name__}: .*{message}", far), (name, form, far)
            else:
                assert far <= CASES[name].tolerance, (name, form, far)


SHORT = {form: FORMS[form] for form in ("ddp", "fsdp 1", "fsdp 2", "fsdp 3", "ddp accumulate")}


def refused(task, *args):
    """The type and the text of what `task` raises: of another rank's error, where that was first."""
    try:
        task(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def dumps(directory):
    """What the dumps of a guard that two steps share say of the step that failed, by form."""
    found = {}
    for form in SHORT:
        guard = lm.guard("dump", directory / form)
        parallel, *inner = FORMS[form].around()
        failing = lm.compose(parallel, guard, *inner)(square_step)
        lm.compose(guard, lm.ema(0.9))(square_step)
        x = torch.ones(4, 1) * (math.nan if distributed.rank() == 1 else 1)  # in the rows of one rank
        error = refused(failing, failing.init(linear_state()), {"x": x})
        assert error.startswith("NonFiniteError: the loss is not finite at step 0"), error
        path = directory / form / f"step-0-rank-{distributed.rank()}"
        meta = lm.checkpoint.metadata(path)["meta"]
        batch = lm.checkpoint.load(path)["batch"][0]
        found[form] = (meta["function"], meta["transforms"] == [repr(t) for t in failing.transforms], batch.tolist())
    return found


def test_a_shared_guard_dumps_the_step_that_failed(world2, tmp_path):
    for rank, found in enumerate(world2.run(dumps, tmp_path)):
        for form, (function, is_own, batch) in found.items():
            assert function == "tests.laws.test_cases:square_step", form
            assert is_own, form
            assert all(math.isnan(x) == (rank == 1) for (x,) in batch), form


def misspelled(directory):
    """The errors of a monitored name that no validation gives."""
    data = lm.Loader(metric_columns(), batch_size=4, shuffle=False)
    plateau = lm.optim.chain(lm.optim.sgd(0.1), lm.optim.reduce_on_plateau(monitor="val/lss"))
    found = {}
    for form in SHORT:
        best = {"checkpoint": lm.Checkpointer(directory / form, monitor="val/lss", mode="min")}
        for tx, options in ((None, best), (plateau, {})):
            runner = lm.Runner(square_step, transforms=FORMS[form].around(), progress=False, **options)
            validate = lm.Validate(eval_step, data)
            fit = functools.partial(runner.fit, linear_state(tx), data, until=lm.Epochs(3), validate=validate)
            found[form, *options] = refused(fit)
    return found


def test_a_monitored_name_that_no_validation_gives(world2, tmp_path):
    for found in world2.run(misspelled, tmp_path):
        for key, error in found.items():
            assert re.search(r"StepError: .*'val/lss'.*never published.*'val/loss'", error), (key, error)


def unapplied():
    """What transforms warn of that act on a model's application alone, where a loss has none."""
    case, found = CASES["f21 functional_call"], {}
    batch = {key: x[ROWS[distributed.rank()]] for key, x in case.batches()[0].items()}
    for form in SHORT:
        for transform in (lm.remat(), lm.quantized_matmul("int8")):
            step = lm.compose(*FORMS[form].around(), transform)(case.step)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step(step.init(case.make_state()), batch)
            found[form, transform.name] = [str(each.message) for each in caught if each.category is lm.InexactWarning]
    return found


def test_what_acts_on_the_model_alone_says_that_it_changed_nothing(world2):
    for found in world2.run(unapplied):
        for key, messages in found.items():
            assert any("changed nothing in the step" in message for message in messages), (key, messages)


def metrics():
    """What runs log of metrics, on a last batch of which one rank has no row; and what one that guesses says."""
    sure = lm.metrics.from_torchmetrics(tm.BinaryAccuracy(), logits=True)
    guess = lm.metrics.from_torchmetrics(tm.BinaryAccuracy())
    step = metric_step(worst=lambda s, y: lm.Max.of(s), least=lambda s, y: lm.Min.of(s), hits=sure.of)
    found, said = {}, {}
    for form in SHORT:
        found[form] = metric_run(step, FORMS[form].around(), 1, 9), metric_run(step, FORMS[form].around(), 100, 9)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metric_run(metric_step(hits=guess.of), FORMS[form].around(), 100, 9)
        said[form] = any("logits=True" in str(each.message) for each in caught)
    return found, said


@pytest.fixture(scope="module")
def logged_metrics(worlds):
    return worlds(2).run(metrics)


def test_metrics_of_uneven_batches(logged_metrics):
    scores, labels = SCORES[:9], LABELS[:9]
    batches = list(zip(scores.split(4), labels.split(4), strict=True))
    for found, _ in logged_metrics:
        for form, (each, together) in found.items():
            assert each["worst"] == pytest.approx([float(s.max()) for s, _ in batches]), form
            assert each["least"] == pytest.approx([float(s.min()) for s, _ in batches]), form
            assert each["hits"] == pytest.approx([float(((s > 0) == y).float().mean()) for s, y in batches]), form
            assert together["hits"] == pytest.approx([float(((scores > 0) == labels).float().mean())]), form


def test_a_metric_that_guesses_at_logits_says_so(logged_metrics):
    for _, said in logged_metrics:
        assert all(said.values()), said


def left(directory):
    """What is alive after a run of its state and of what it was given."""
    found = {}
    gc.collect()
    gc.disable()
    try:
        for form in SHORT:
            watched = []
            run_and_drop(FORMS[form].around(), directory / form, watched)
            found[form] = len(watched), [type(each()).__name__ for each in watched if each() is not None]
    finally:
        gc.enable()
    return found


class Columns:
    """A data set that weak references may watch."""

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"x": torch.full((1,), float(row))}


def run_and_drop(transforms, directory, watched):
    """A run whose state, data and Runner are watched, and dropped."""
    data = Columns()
    loader = lm.Loader(data, batch_size=4, shuffle=False)
    state = linear_state(lm.optim.adam(0.1))
    checkpoint = lm.Checkpointer(directory, every=lm.Every(steps=2))
    runner = lm.Runner(square_step, transforms=transforms, checkpoint=checkpoint, progress=False)
    result = runner.fit(state, loader, until=lm.Epochs(2))
    watched += [weakref.ref(each) for each in (data, loader, runner, *lm.tree.tensors(state))]
    watched += [weakref.ref(leaf) for leaf in lm.tree.tensors(result.state)]


def test_nothing_is_alive_after_a_run(world2, tmp_path):
    for found in world2.run(left, tmp_path):
        for form, (count, alive) in found.items():
            assert count > 10, form
            assert not alive, form


def failing_data(directory):
    """The errors of runs whose data fail at the sixth batch, on every rank."""
    found = {}
    for form in SHORT:
        checkpoint = lm.Checkpointer(directory / form, every=lm.Every(steps=4), keep=None)
        runner = lm.Runner(square_step, transforms=FORMS[form].around(), checkpoint=checkpoint, progress=False)
        fit = functools.partial(runner.fit, linear_state(), lm.data.per_rank(Failing()), until=lm.Epochs(2))
        found[form] = refused(fit)
    return found


def test_an_os_error_of_the_data_keeps_the_last_checkpoint_of_all_ranks(world2, tmp_path):
    """Of several ranks no checkpoint is made after an error: each could be at another step."""
    for found in world2.run(failing_data, tmp_path):
        assert all("ConnectionResetError: peer reset" in error for error in found.values()), found
    for form in SHORT:
        assert lm.Checkpointer(tmp_path / form).store.steps() == [4], form


def windows(directory, steps, forms):
    """The numbers of each form's window up to step `steps`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this run resumes with")
        return {form: window(directory / form, FORMS[form].around(), steps) for form in forms}


def test_a_window_cut_by_restarts_into_other_worlds(world2, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"  # by the number of processes that begin it
    few, many = ("fsdp 3", "ddp accumulate"), ("fsdp 1", "fsdp 2", "fsdp 3", "ddp accumulate")
    found = [(2, windows(one, 2, few)), (2, world2.run(windows, two, 2, many)[0])]
    found += [(4, world2.run(windows, one, 4, few)[0]), (4, windows(two, 4, many))]
    for steps, forms in found:
        for form, numbers in forms.items():
            assert numbers == pytest.approx(whole_window(steps), rel=1e-6), (form, steps)
