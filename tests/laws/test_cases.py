"""Inputs that once gave wrong numbers without an error: right under every way to run a step."""

from __future__ import annotations

import ast
import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics.classification as tm

import lumen as lm
from lumen.errors import GraphBreakWarning, StepError

from .cases import (
    CASES,
    FORMS_OF_A_STEP,
    LABELS,
    SCORES,
    WHERE,
    Form,
    difference,
    linear_state,
    metric_columns,
    metric_run,
    metric_step,
    whole_window,
    window,
)

ALL = [[slice(0, 8)]]
FORMS = {
    "plain": Form(list, ALL),
    "accumulate": Form(lambda: [lm.accumulate(2)], [[slice(0, 4)], [slice(4, 8)]]),
    "donate": Form(lambda: [lm.donate()], ALL),
    "compile": Form(lambda: [lm.compile(backend="eager"), lm.donate()], ALL),
}


def around(form: str, *inner: lm.Transform) -> list[lm.Transform]:
    """The transforms of a form, with `inner` between compilation and the others."""
    transforms = FORMS[form].around()
    outermost = [t for t in transforms if t.level == "compile"]
    return [*outermost, *inner, *(t for t in transforms if t not in outermost)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str, form: str) -> None:
    case = CASES[name]
    if form in case.refused:
        error, message = case.refused[form]
        with pytest.raises(error, match=message):
            case.run(FORMS[form])
        return
    assert difference(case.run(FORMS[form]), case.expected(FORMS[form])) <= case.tolerance


def square_step(state: Any, batch: Any) -> tuple[Any, Any]:
    def loss_fn(params: Any, batch: Any) -> lm.Mean:
        return lm.Mean.of(state.apply(params, batch["x"])[0].square())

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def eval_step(state: Any, batch: Any) -> dict[str, Any]:
    return {"loss": lm.Mean.of(state.apply(state.params, batch["x"])[0].square())}


def other_step(state: Any, batch: Any) -> tuple[Any, Any]:
    return state, {}


@pytest.mark.parametrize("form", FORMS)
def test_a_shared_guard_dumps_the_step_that_failed(form: str, tmp_path: Path) -> None:
    guard = lm.guard("dump", tmp_path)
    failing = lm.compose(*around(form, guard))(square_step)
    lm.compose(guard, lm.ema(0.9))(other_step)
    with pytest.raises(lm.NonFiniteError, match="the loss is not finite"):
        failing(failing.init(linear_state()), {"x": torch.full((4, 1), torch.nan)})
    meta = lm.checkpoint.metadata(tmp_path / "step-0")["meta"]
    assert meta["function"] == f"{__name__}:square_step"
    assert meta["transforms"] == [repr(t) for t in failing.transforms]


@pytest.mark.parametrize("form", FORMS)
def test_a_monitored_name_that_no_validation_gives(form: str, tmp_path: Path) -> None:
    data = lm.Loader(metric_columns(), batch_size=4, shuffle=False)
    plateau = lm.optim.chain(lm.optim.sgd(0.1), lm.optim.reduce_on_plateau(monitor="val/lss"))
    best: dict[str, Any] = {"checkpoint": lm.Checkpointer(tmp_path, monitor="val/lss", mode="min")}
    for tx, options in ((None, best), (plateau, {})):
        runner = lm.Runner(square_step, transforms=around(form), progress=False, **options)
        with pytest.raises(StepError, match=r"'val/lss'.*never published.*'val/loss'"):
            runner.fit(linear_state(tx), data, until=lm.Epochs(3), validate=lm.Validate(eval_step, data))


@pytest.mark.parametrize("form", FORMS)
def test_what_acts_on_the_model_alone_says_that_it_changed_nothing(form: str) -> None:
    case = CASES["f21 functional_call"]
    for transform in (lm.remat(), lm.quantized_matmul("int8")):
        outer, inner = around(form), [transform]
        step = lm.compose(*outer, *inner)(case.step)
        with pytest.warns(lm.InexactWarning, match=r"changed nothing in the step .*state\.apply"):
            step(step.init(case.make_state()), case.batches()[0])


def _looking_at_values(form: str) -> Any:
    """A step with a metric of torchmetrics that branches on its values runs uncompiled, and says so."""
    return pytest.warns(GraphBreakWarning, match="uncompiled") if form == "compile" else contextlib.nullcontext()


@pytest.mark.parametrize("form", FORMS)
def test_metrics_of_uneven_batches(form: str) -> None:
    sure = lm.metrics.from_torchmetrics(tm.BinaryAccuracy(validate_args=False), logits=True)
    extremes = {"worst": lambda s, y: lm.Max.of(s), "least": lambda s, y: lm.Min.of(s)}
    batches = list(zip(SCORES.split(4), LABELS.split(4), strict=True))
    found = metric_run(metric_step(**extremes), around(form), 1)
    assert found["worst"] == pytest.approx([float(s.max()) for s, _ in batches])
    assert found["least"] == pytest.approx([float(s.min()) for s, _ in batches])
    step = metric_step(hits=sure.of)
    with _looking_at_values(form):
        found = metric_run(step, around(form), 1)
    assert found["hits"] == pytest.approx([float(((s > 0) == y).float().mean()) for s, y in batches])
    with _looking_at_values(form):
        found = metric_run(step, around(form), 100)
    assert found["hits"] == pytest.approx([float(((SCORES > 0) == LABELS).float().mean())])


@pytest.mark.parametrize("form", FORMS)
def test_a_metric_that_guesses_at_logits_says_so(form: str) -> None:
    guess = lm.metrics.from_torchmetrics(tm.BinaryAccuracy(validate_args=False))
    with _looking_at_values(form), pytest.warns(lm.InexactWarning, match=r"[Ff]or logits.*logits=True"):
        metric_run(metric_step(hits=guess.of), around(form), 100)


class Failing:
    """Batches, of which the sixth cannot be read."""

    def __iter__(self) -> Any:
        for _ in range(5):
            yield {"x": torch.ones(4, 1)}
        raise ConnectionResetError("peer reset")


@pytest.mark.parametrize("form", FORMS)
def test_an_os_error_of_the_data_ends_in_a_checkpoint(form: str, tmp_path: Path) -> None:
    checkpointer = lm.Checkpointer(tmp_path, every=lm.Every(steps=4), keep=None)
    runner = lm.Runner(square_step, transforms=around(form), checkpoint=checkpointer, progress=False)
    with pytest.raises(ConnectionResetError, match="peer reset"):
        runner.fit(linear_state(), Failing(), until=lm.Epochs(2))
    assert lm.Checkpointer(tmp_path).store.steps() == [4, 5]


@pytest.mark.parametrize("form", FORMS)
def test_a_window_cut_by_a_restart_logs_the_uninterrupted_numbers(form: str, tmp_path: Path) -> None:
    for steps in (2, 4):  # saved there before they are logged
        assert window(tmp_path, around(form), steps) == pytest.approx(whole_window(steps), rel=1e-6)


# ------------------------------------------------------------------------------------ the table


@functools.cache
def names_of_tests(path: str) -> set[str]:
    """The names of the test functions of a file."""
    parsed = ast.parse((Path(__file__).parents[2] / path).read_text())
    return {node.name for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)}


def test_each_input_is_tested_in_each_form_or_says_why_not() -> None:
    for name, forms in WHERE.items():
        assert tuple(forms) == FORMS_OF_A_STEP, name
        for form, entry in forms.items():
            if "::" in entry:
                path, _, test = entry.partition("::")
                assert test in names_of_tests(path), (name, form)
            else:
                assert entry.startswith("does not apply: "), (name, form)
