"""Models that recompute, and losses that take derivatives themselves: on two processes as in a raw loop."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.core import distributed
from tests.distributed.test_cases import FORMS, HALVES, ROWS, TOGETHER, refused
from tests.laws.cases import Form, difference, sgd_step
from tests.laws.derivative_cases import DERIVATIVES, Net, batches, squares
from tests.tiers import pick

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

FORMS = {
    **FORMS,
    "fsdp compile": Form(lambda: [lm.compile(backend="eager"), lm.fsdp()], TOGETHER),
    "fsdp remat": Form(lambda: [lm.fsdp(prefetch=0), lm.accumulate(2), lm.remat()], HALVES),
}
COMPILED = ("checkpointed blocks", "gradient penalty", "torch.func.grad")
IN_TURN = ("ddp", "fsdp 1", "fsdp 2", "ddp accumulate", "fsdp accumulate", "fsdp remat")


def cells():
    """Each case at stage 3, in one other form, and three in a graph; under `make test-all` in every form."""
    found = []
    for i, name in enumerate(DERIVATIVES):
        some = ["fsdp 3", IN_TURN[i % len(IN_TURN)], *(["fsdp compile"] if name in COMPILED else [])]
        found.append((name, pick(some, list(FORMS))))
    return found


def numbers():
    """By case and form: how far the params are from those of a raw loop, or the error."""
    found = {}
    for name, forms in cells():
        case = DERIVATIVES[name]
        for form in forms:
            own = [{key: x[ROWS[distributed.rank()]] for key, x in batch.items()} for batch in case.batches()]
            try:
                found[name, form] = difference(case.run(FORMS[form], own), case.expected(FORMS[form]))
            except Exception as error:
                found[name, form] = f"{type(error).__name__}: {error}"
    return found


def test_numbers_are_those_of_a_raw_loop(world2):
    for found in world2.run(numbers):
        assert {key: far for key, far in found.items() if not (isinstance(far, float) and far <= 1e-12)} == {}


def by_func_in_params(apply, params, x):
    grads = torch.func.grad(lambda params: squares(apply, params, x).mean())(params)
    return squares(apply, {name: p - 0.1 * grads[name] for name, p in params.items()}, x)


def by_autograd_in_params(apply, params, x):
    torch.autograd.grad(squares(apply, params, x).mean(), list(params.values()), create_graph=True)
    return squares(apply, params, x)


def freeing(apply, params, x):
    near = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(squares(apply, params, near).sum(), near)
    return squares(apply, params, x + 0.1 * slope)


def refusals():
    """What stage 3 says of derivatives that it cannot take."""
    found = {}
    for rows in (by_func_in_params, by_autograd_in_params, freeing):
        step = lm.fsdp()(sgd_step(lambda state, p, b, rows=rows: rows(lambda p, x: state.apply(p, x)[0], p, b["x"])))
        state = step.init(lm.TrainState.create(Net().double(), lm.optim.sgd(0.1)))
        found[rows.__name__] = refused(step, state, batches()[0])
    return found


def test_what_stage_3_cannot_differentiate_names_stage_2(world2):
    for found in world2.run(refusals):
        for name, error in found.items():
            assert "lm.fsdp(stage=2)" in error, (name, error)
            assert error.startswith(("ParamsError: ", "LossError: ")), (name, error)
