"""Schedules beside `torch.optim.lr_scheduler`, in float64 to 1e-12, and as tensor programs."""

import warnings
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler as torch_schedules

from lumen import optim
from lumen.errors import HyperparameterError

STEPS = 60


def torch_table(make, steps=STEPS, lr=0.3):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls its own deprecated step(epoch)
        scheduler = make(optimizer)
        table = []
        for _ in range(steps):
            table.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return torch.tensor(table, dtype=torch.float64)


def our_table(schedule, steps=STEPS):
    return torch.stack([schedule(torch.tensor(step)) for step in range(steps)])


def warmup_then_cosine(optimizer):
    return torch_schedules.SequentialLR(
        optimizer,
        [
            torch_schedules.LinearLR(optimizer, 0.1, 1.0, total_iters=10),
            torch_schedules.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01),
        ],
        milestones=[10],
    )


def one_cycle(**kwargs):
    return partial(torch_schedules.OneCycleLR, max_lr=0.3, total_steps=STEPS + 1, cycle_momentum=False, **kwargs)


CASES = {
    "constant": (
        optim.constant(0.3),
        partial(torch_schedules.ConstantLR, factor=1.0),
    ),
    "linear": (
        optim.linear(0.3 * 0.25, 20, 0.3 * 0.75),
        partial(torch_schedules.LinearLR, start_factor=0.25, end_factor=0.75, total_iters=20),
    ),
    "polynomial": (
        optim.polynomial(0.3, 40, 0.0, power=2.5),
        partial(torch_schedules.PolynomialLR, total_iters=40, power=2.5),
    ),
    "cosine": (
        optim.cosine(0.3, STEPS, stop=0.01),
        partial(torch_schedules.CosineAnnealingLR, T_max=STEPS, eta_min=0.01),
    ),
    "exponential": (optim.exponential(0.3, 0.93), partial(torch_schedules.ExponentialLR, gamma=0.93)),
    "step": (optim.step_decay(0.3, 0.7, 9), partial(torch_schedules.StepLR, step_size=9, gamma=0.7)),
    "piecewise": (
        optim.piecewise(0.3, {5: 0.1, 17: 0.1, 40: 0.1}),
        partial(torch_schedules.MultiStepLR, milestones=[5, 17, 40], gamma=0.1),
    ),
    "join": (
        optim.join([optim.linear(0.03, 10, 0.3), optim.cosine(0.3, 50, 0.01)], [10]),
        warmup_then_cosine,
    ),
    "warmup cosine": (optim.warmup_cosine(0.3, 60, 10, start=0.03, stop=0.01), warmup_then_cosine),
    "one cycle": (optim.one_cycle(0.3, STEPS + 1), one_cycle()),
    "one cycle linear": (
        optim.one_cycle(0.3, STEPS + 1, anneal="linear", warmup_fraction=0.4, start_divisor=5.0),
        one_cycle(anneal_strategy="linear", pct_start=0.4, div_factor=5.0),
    ),
    "one cycle three phases": (
        optim.one_cycle(0.3, STEPS + 1, three_phase=True, stop_divisor=100.0),
        one_cycle(three_phase=True, final_div_factor=100.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_schedule_is_torch_scheduler(case):
    schedule, make = CASES[case]
    torch.testing.assert_close(our_table(schedule), torch_table(make), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_schedule_of_numbers_is_the_schedule_of_tensors(case):
    """A fused update on the CPU evaluates schedules in Python numbers."""
    schedule, _ = CASES[case]
    numbers = torch.tensor([schedule.at(step) for step in range(STEPS + 5)], dtype=torch.float64)
    torch.testing.assert_close(numbers, our_table(schedule, STEPS + 5), rtol=1e-14, atol=1e-16)


def test_join_takes_any_function():
    schedule = optim.join([optim.constant(1.0), lambda step: step.double() * 2], [5])
    assert our_table(schedule, 8).tolist() == [1.0] * 5 + [0.0, 2.0, 4.0]
    params = {"w": torch.ones(1)}
    for tx in (optim.sgd(schedule), optim.sgd(lambda step: 0.5)):
        params, _ = tx.apply({"w": torch.ones(1)}, tx.init(params), params)
    assert params["w"].item() == -0.5


@pytest.mark.parametrize("case", CASES)
def test_schedule_is_a_tensor_program(case):
    schedule, _ = CASES[case]
    table = our_table(schedule)
    mapped = torch.func.vmap(schedule)(torch.arange(STEPS))
    torch.testing.assert_close(mapped, table, rtol=1e-14, atol=0)
    traced = make_fx(schedule)(torch.tensor(0))
    for step in (0, 7, 33, STEPS - 1):
        assert torch.equal(traced(torch.tensor(step)), table[step])


@pytest.mark.parametrize("case", ["linear", "polynomial", "cosine", "warmup cosine", "one cycle"])
def test_schedule_keeps_its_last_value(case):
    schedule, _ = CASES[case]
    last = schedule(torch.tensor(STEPS + 1))
    assert torch.equal(schedule(torch.tensor(10**6)), last)
    assert last.dtype is torch.float64


def test_schedule_of_tensors_can_be_swept_and_differentiated():
    peaks = torch.tensor([0.1, 0.2], dtype=torch.float64)
    values = torch.func.vmap(lambda peak: optim.warmup_cosine(peak, 20, 5)(torch.tensor(3)))(peaks)
    torch.testing.assert_close(values, peaks * 0.6)
    slope = torch.func.grad(lambda peak: optim.cosine(peak, 10)(torch.tensor(5)))(peaks[0])
    torch.testing.assert_close(slope, torch.tensor(0.5, dtype=torch.float64))


def test_exponential_stops_at_its_floor_and_climbs_a_staircase():
    assert our_table(optim.exponential(1.0, 0.5, stop=0.2))[5] == 0.2
    stairs = our_table(optim.exponential(1.0, 0.5, every=3, staircase=True), 7)
    assert stairs.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.linear(0.1, steps=0, stop=0.0),
        lambda: optim.linear(float("nan"), steps=5, stop=0.0),
        lambda: optim.cosine(-1.0, 10),
        lambda: optim.cosine(1.0, 2.5),
        lambda: optim.warmup_cosine(1.0, steps=10, warmup=10),
        lambda: optim.exponential(1.0, -0.5),
        lambda: optim.piecewise(1.0, {5: -1.0}),
        lambda: optim.join([optim.constant(1.0)], [5]),
        lambda: optim.join([optim.constant(1.0)] * 3, [5, 5]),
        lambda: optim.one_cycle(1.0, 10, anneal="quadratic"),
        lambda: optim.one_cycle(1.0, 10, warmup_fraction=1.5),
    ],
)
def test_bad_schedules_are_refused(make):
    with pytest.raises(HyperparameterError):
        make()
