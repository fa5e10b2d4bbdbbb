"""Models that recompute, and losses that take derivatives themselves: as in a loop in plain PyTorch."""

from __future__ import annotations

import functools
import warnings

import pytest

import lumen as lm

from .cases import Form, difference
from .derivative_cases import DERIVATIVES

ALL, HALVES = [[slice(0, 8)]], [[slice(0, 4)], [slice(4, 8)]]
FORMS = {
    "plain": Form(list, ALL),
    "accumulate": Form(lambda: [lm.accumulate(2)], HALVES),
    "donate": Form(lambda: [lm.donate()], ALL),
    "compile": Form(lambda: [lm.compile(backend="eager"), lm.donate()], ALL),
    "blocks": Form(lambda: [lm.compile(backend="eager", blocks=True)], ALL),
    "remat": Form(lambda: [lm.guard(), lm.ema(0.9), lm.precision("fp64"), lm.remat()], ALL),
}
BY_FUNC = {
    "dp_sgd": Form(lambda: [lm.dp_sgd(clip=1e9, noise=0.0)], ALL),
    "ensemble": Form(lambda: [lm.ensemble(1)], ALL),
}
EXPECTED = functools.cache(lambda name, form: DERIVATIVES[name].expected({**FORMS, **BY_FUNC}[form]))


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_of_a_raw_loop(form: str) -> None:
    for name, case in DERIVATIVES.items():
        with warnings.catch_warnings():
            if form == "blocks":
                warnings.simplefilter("ignore", lm.errors.GraphBreakWarning)
            found = case.run(FORMS[form])
        assert difference(found, EXPECTED(name, "accumulate" if form == "accumulate" else "plain")) <= 1e-12, name


@pytest.mark.parametrize("form", BY_FUNC)
def test_by_torch_func_a_checkpoint_only_runs_its_function(form: str) -> None:
    for name in ("checkpointed blocks", "reentrant checkpoints", "nested checkpoints", "torch.func.grad"):
        found = DERIVATIVES[name].run(BY_FUNC[form])
        found = {key: x.reshape(EXPECTED(name, "plain")[key].shape) for key, x in found.items()}
        assert difference(found, EXPECTED(name, "plain")) <= 1e-12, name


@pytest.mark.parametrize("form", BY_FUNC)
@pytest.mark.parametrize("name", ["gradient penalty", "forces"])
def test_by_torch_func_a_derivative_by_autograd_is_refused(form: str, name: str) -> None:
    with pytest.raises(lm.errors.LossError, match=r"torch\.func\.grad\(lambda x: state\.apply"):
        DERIVATIVES[name].run(BY_FUNC[form])
