"""`psum`, `pmean`, `pmax`, `pmin` over the lanes of a vmap: right values, and right derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lumen as lm
from lumen.core import rules
from lumen.core.collectives import LaneAxis


def over_lanes(fn: Callable[..., Any], *args: Tensor) -> Any:
    """`fn` mapped over the first dim of `args`, with the axis "lanes" bound."""

    def one(lane: Tensor, *row: Tensor) -> Any:
        with rules.bound_axis("lanes", LaneAxis(len(args[0]), lane)):
            return fn(*row)

    return torch.func.vmap(one)(torch.arange(len(args[0])), *args)


LANES = st.lists(st.floats(-5, 5), min_size=1, max_size=5).map(lambda v: torch.tensor(v, dtype=torch.float64))


@settings(max_examples=20)
@given(LANES)
def test_values(x: Tensor) -> None:
    collectives = (lm.psum, lm.pmean, lm.pmax, lm.pmin)
    found = over_lanes(lambda v: tuple(collective(v, "lanes") for collective in collectives), x)
    for got, want in zip(found, (x.sum(), x.mean(), x.max(), x.min()), strict=True):
        torch.testing.assert_close(got, want.expand(len(x)))


@pytest.mark.parametrize("collective", [lm.pmax, lm.pmin], ids=lambda f: f.__name__)
def test_a_nan_in_any_lane_comes_out(collective: Any) -> None:
    for lane in range(3):
        x = torch.where(torch.arange(3) == lane, torch.nan, torch.arange(3.0))
        assert over_lanes(lambda v: collective(v, "lanes"), x).isnan().all()


def test_a_constant_counts_once_for_each_lane() -> None:
    x = torch.zeros(4)
    assert over_lanes(lambda v: v + lm.psum(torch.tensor(1.0), "lanes"), x).tolist() == [4.0] * 4


def test_lanes_are_numbered() -> None:
    assert over_lanes(lambda v: v + lm.axis_index("lanes"), torch.zeros(3)).tolist() == [0.0, 1.0, 2.0]


@settings(max_examples=20)
@given(LANES, st.integers(0, 99))
def test_the_transpose_of_psum_is_psum(x: Tensor, seed: int) -> None:
    weights = torch.randn(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    live = x.clone().requires_grad_()
    (over_lanes(lambda v: lm.psum(v, "lanes"), live) * weights).sum().backward()
    torch.testing.assert_close(live.grad, weights.sum().expand(len(x)))


@pytest.mark.parametrize("collective", [lm.psum, lm.pmean, lm.pmax, lm.pmin], ids=lambda f: f.__name__)
def test_gradients_agree_with_differences(collective: Any) -> None:
    def through(x: Tensor) -> Tensor:
        return over_lanes(lambda v: torch.sin(v) * collective(v * v, "lanes"), x)

    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (x,))


def test_second_derivatives_of_psum() -> None:
    def through(x: Tensor) -> Tensor:
        return over_lanes(lambda v: torch.sin(lm.psum(v * v, "lanes")), x)

    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(through, (x,))


def test_a_gradient_inside_the_lanes_reaches_all_of_them() -> None:
    """Each lane differentiates its own output of a sum: every lane's input receives the gradient of all."""
    x = torch.tensor([1.0, 2.0, 3.0])
    grads = over_lanes(lambda v: torch.func.grad(lambda u: lm.psum(u * u, "lanes"))(v), x)
    # The transpose sums the gradients of all lanes' outputs: three times each lane's own 2·x.
    torch.testing.assert_close(grads, 3 * 2 * x)


@settings(max_examples=10)
@given(rows=st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_values_of_lanes_add_up_to_the_whole(rows: list[float]) -> None:
    x = torch.tensor(rows, dtype=torch.float64).reshape(2, 2)
    mean, total, most, least = over_lanes(
        lambda v: tuple(kind.of(v).psum("lanes").compute() for kind in (lm.Mean, lm.Sum, lm.Max, lm.Min)), x
    )
    for got, want in zip((mean, total, most, least), (x.mean(), x.sum(), x.max(), x.min()), strict=True):
        torch.testing.assert_close(got, want.expand(2))


def test_unbound_axes_are_identities() -> None:
    values = {"x": torch.tensor(2.0)}
    assert lm.psum(values, "nowhere") is values
    assert lm.pmean(values, "nowhere") is values
    assert int(lm.axis_index("nowhere")) == 0


def test_an_axis_is_bound_once() -> None:
    lane = LaneAxis(1, torch.tensor(0))
    with (
        rules.bound_axis("a", lane),
        pytest.raises(lm.errors.HyperparameterError, match="already bound"),
        rules.bound_axis("a", lane),
    ):
        pass
