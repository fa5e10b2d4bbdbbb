"""16-bit params: small steps for long, against float64. What is averaged is kept wide, what is kept is rounded once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lumen as lm
from lumen import optim
from lumen.core.dtypes import NARROW
from lumen.optim._schedule_free import ScheduleFreeState

STEPS = 500
SHAPE = (6, 8)
DTYPES = {"a.weight": torch.bfloat16, "b.weight": torch.float16}


def start() -> dict[str, Tensor]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {name: (x + x.sign()).to(dtype) for name, dtype in DTYPES.items()}


def small_grads(steps: int = STEPS, size: float = 1e-3) -> list[dict[str, Tensor]]:
    """A direction for each entry, and noise: their squares are below what float16 can hold."""
    generator = torch.Generator().manual_seed(1)
    drift = torch.randn(SHAPE, generator=generator, dtype=torch.float64).sign()
    noise = torch.randn(steps, *SHAPE, generator=generator, dtype=torch.float64)
    return [{name: (size * (drift + n)).to(dtype) for name, dtype in DTYPES.items()} for n in noise]


def rounded(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.to(DTYPES[name]).double() for name, p in params.items()}


def exact_run(tx: optim.GradientTransformation, all_grads: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Any]:
    """In float64; params are rounded to their dtypes after each step."""
    params = {name: p.double() for name, p in start().items()}
    opt_state = tx.init(params)
    if isinstance(opt_state, ScheduleFreeState):  # which of float64 params finds the average in them
        opt_state = opt_state.replace(x=lm.tree.map(torch.clone, params))
    for grads in all_grads:
        updates, opt_state = tx.update_fn({name: g.double() for name, g in grads.items()}, opt_state, params)
        params = rounded({name: p + updates[name] for name, p in params.items()})
    return params, opt_state


def moved(exact: dict[str, Tensor]) -> float:
    """How far the params went, so that not even a rule that does nothing would pass."""
    return min((exact[name] - p.double()).abs().median().item() for name, p in start().items())


def assert_near(found: dict[str, Tensor], exact: dict[str, Tensor], ulps: float = 4) -> None:
    """Within a few roundings: where float32 and float64 fall on two sides of one, the params stay apart by it."""
    for name, p in found.items():
        assert p.dtype == DTYPES[name]
        error = (p.double() - exact[name]).abs() / exact[name].abs().clamp(min=1.0)
        assert error.max().item() <= ulps * torch.finfo(p.dtype).eps, (name, error.max().item())


# Steps of one unit in the last place of bfloat16 or less.
RULES: dict[str, Callable[[], optim.GradientTransformation]] = {
    "sgd": lambda: optim.sgd(4.0),
    "sgd momentum": lambda: optim.sgd(0.5, 0.9, weight_decay=1e-4),
    "sgd nesterov": lambda: optim.sgd(0.5, 0.9, nesterov=True),
    "adam": lambda: optim.adam(5e-3, amsgrad=True),
    "adamw": lambda: optim.adamw(5e-3),
    "lion": lambda: optim.lion(5e-3),
    "rmsprop": lambda: optim.rmsprop(5e-3, centered=True, momentum=0.5),
    "adagrad": lambda: optim.adagrad(0.05),
    "adafactor": lambda: optim.adafactor(5e-3, eps=(1e-8, 1e-3)),
    "nadam": lambda: optim.nadam(5e-3),
    "radam": lambda: optim.radam(5e-2),
    "lamb": lambda: optim.lamb(5e-3),
    "muon": lambda: optim.muon(2e-2, dtype=torch.float64),
    "partition": lambda: optim.partition({"a.*": optim.sgd(1.0, 0.9)}, optim.adamw(5e-3)),
    "finite": lambda: optim.apply_if_finite(optim.sgd(0.5, 0.9), 3),
    "plateau": lambda: optim.chain(optim.adamw(5e-3), optim.reduce_on_plateau()),
    "trace": lambda: optim.chain(optim.trace(0.9), optim.sgd(0.5)),
    "clip": lambda: optim.chain(optim.clip_by_global_norm(5e-3), optim.adamw(5e-3)),
}


@pytest.mark.parametrize("name", RULES)
def test_optimizers(name: str) -> None:
    tx, all_grads = RULES[name](), small_grads()
    exact, exact_state = exact_run(tx, all_grads)
    assert moved(exact) > 0.1
    params, opt_state = start(), tx.init(start())
    for grads in all_grads:
        params, opt_state = tx.apply(grads, opt_state, params, donate=True)
    assert_near(params, exact, ulps=16 if name in ("trace", "clip") else 4)  # whose links hand on grads of 16 bits
    for path, kept, right in zip(
        lm.tree.paths(opt_state), lm.tree.tensors(opt_state), lm.tree.tensors(exact_state), strict=True
    ):
        if kept.dim() and name not in ("trace", "clip"):
            assert kept.dtype == torch.float32, path
            scale = right.abs().mean().item()
            torch.testing.assert_close(kept.double(), right, rtol=1e-2, atol=2e-2 * scale, msg=path)


def test_a_step_is_scaled_before_it_is_rounded() -> None:
    """`reduce_on_plateau` shortens the step before it is rounded."""
    tx = optim.chain(optim.sgd(1.0), optim.reduce_on_plateau(factor=0.5, patience=0))
    for donate in (False, True):
        params = {"w": torch.ones(32, dtype=torch.bfloat16)}
        opt_state = tx.init(params)
        for loss in (1.0, 1.0):
            opt_state = optim.plateau_step(opt_state, loss)
        new, _ = tx.apply({"w": torch.full((32,), 1.2 * 2**-8).bfloat16()}, opt_state, params, donate=donate)
        # 0.6 units are one; 1.2 units, rounded to one and halved, would be none.
        assert new["w"].unique().item() == 1 - 2**-8, donate


# ----------------------------------------------------------------------------------------- 2,000 small steps


def averaging(step: Any, state: Any, small: list[Tensor]) -> Any:
    for x in small:
        state, _ = step(state, x)
    return state


def adds(state: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
    return state.replace(params={name: (p + x).to(p.dtype) for name, p in state.params.items()}), {}


@pytest.mark.parametrize("transform", [lm.ema(0.999), lm.ema(0.9995, warmup=True), lm.ema(None), lm.ema(0.99, start=7)])
def test_an_average_of_params_follows_them(transform: Any) -> None:
    step = transform(adds)
    state = lm.TrainState.create(nn.Linear(2, 2), optim.sgd(0.1))
    dtypes = {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32, "double": torch.float64}
    state = step.init(state.replace(params={name: torch.full((3,), 1.0, dtype=d) for name, d in dtypes.items()}))
    exact = {name: p.double() for name, p in state.params.items()}
    for i in range(2000):
        state, _ = step(state, torch.tensor(2.0**-7 if i % 8 == 0 else 0.0))
        n = i + 1 - transform.start
        weight = 1 - transform.decay if transform.decay is not None else 1 / max(n, 1)
        if transform.warmup:
            weight = max(weight, 1 - (1 + n) / (10 + n))
        weight = weight if n >= 1 else 1.0
        exact = {name: a + weight * (state.params[name].double() - a) for name, a in exact.items()}
    kept = state.slots["ema"].params
    for name, average in lm.ema.params(state).items():
        assert average.dtype == dtypes[name]
        assert kept[name].dtype == (torch.float64 if name == "double" else torch.float32)
        torch.testing.assert_close(kept[name].double(), exact[name], rtol=1e-12 if name == "double" else 2e-5, atol=0)
        assert torch.equal(average, kept[name].to(dtypes[name]))


def test_lookahead_and_schedule_free_average_in_float32() -> None:
    all_grads = small_grads(2000, 2e-4)
    for tx in (optim.lookahead(optim.sgd(30.0), slow_step=0.1), optim.schedule_free(optim.sgd(2.0))):
        exact, exact_state = exact_run(tx, all_grads)
        params, opt_state = start(), tx.init(start())
        for grads in all_grads:
            params, opt_state = tx.apply(grads, opt_state, params, donate=True)
        if hasattr(opt_state, "slow"):
            found, right = optim.lookahead_slow_params(opt_state, params), exact_state.slow
        else:
            found = optim.schedule_free_eval_params(opt_state, params)
            right = exact_state.x
        assert moved(right) > 0.1
        assert_near(found, right)
        assert_near(params, exact)


@pytest.mark.parametrize("dtype", NARROW)
def test_moments_follow_falling_gradients(dtype: torch.dtype) -> None:
    """In 16 bits a mean of decay rate 0.999 never falls."""
    beta1, beta2 = 0.9, 0.999
    tx = optim.adamw(1e-4, (beta1, beta2))
    params = {"w": torch.ones(16, dtype=dtype)}
    opt_state, m, v = tx.init(params), 0.0, 0.0
    for i in range(2000):
        g = torch.tensor(0.1 * 0.998**i).to(dtype)
        params, opt_state = tx.apply({"w": g.expand(16)}, opt_state, params, donate=True)
        m, v = beta1 * m + (1 - beta1) * g.item(), beta2 * v + (1 - beta2) * g.item() ** 2
    assert opt_state.mu["w"][0].item() == pytest.approx(m, rel=1e-4)
    assert opt_state.nu["w"][0].item() == pytest.approx(v, rel=1e-4)


def test_batchnorm_statistics_are_float32_under_precision_and_in_norms_that_are() -> None:
    """Those of a norm in 16 bits are what torch makes of them: of its own dtype, within a few percent."""

    def step(state: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
        _, buffers = state.apply(state.params, x)
        return state.replace(buffers=buffers), {}

    x = torch.linspace(-1.0, 1.0, 8)[:, None].expand(8, 2)
    nets = [nn.Sequential(nn.Identity(), nn.BatchNorm1d(2, momentum=0.01)) for _ in range(3)]
    nets[1].bfloat16()[1].float()
    nets[2].bfloat16()
    for net, transforms, exact in zip(nets, ([lm.precision("bf16")], [], []), (True, True, False), strict=True):
        run = lm.compose(*transforms)(step)
        with contextlib.nullcontext() if exact else pytest.warns(lm.InexactWarning, match=r"'1'.*\('1'\)\.float\(\)"):
            state, mean = run.init(lm.TrainState.create(net, optim.sgd(0.1))), 0.0
        for i in range(2000):
            given = x + i / 1000
            given = given.bfloat16().float()
            state, _ = run(state, given if transforms else given.bfloat16())
            mean = 0.99 * mean + 0.01 * given[:, 0].double().mean().item()
        found = next(each for name, each in state.buffers.items() if name.endswith("running_mean"))
        assert found.dtype == (torch.float32 if exact else torch.bfloat16)
        assert found[0].item() == pytest.approx(mean, rel=2e-3 if exact else 0.4)


def test_statistics_of_16_bits_that_stand_still_anyway_come_without_a_warning() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.InstanceNorm1d(2)).bfloat16()
    with pytest.warns(lm.InexactWarning, match="statistics of '1' are"):
        lm.TrainState.create(lm.pure(net), optim.sgd(0.1))
    lm.TrainState.create(net.eval(), optim.sgd(0.1))
    with pytest.warns(lm.InexactWarning, match=r"statistics of '' are .* net\.float\(\)\."):
        lm.TrainState.create(nn.BatchNorm1d(2).half(), optim.sgd(0.1))


# ----------------------------------------------------------------------------------------- transforms


def linear_step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Its gradient is the mean of the batch's rows, computed in float32 and handed out in the params' dtypes."""

    def loss_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> lm.Mean:
        return lm.Mean.of(sum(batch[name].flatten(1) @ params[name].float().flatten() for name in params))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def half_policy(scale: float) -> lm.Policy:
    return lm.Policy(compute=torch.float32, loss_scale=scale)


@pytest.mark.filterwarnings("ignore:.*never calls state.apply")  # what scales the loss is all that is asked of it
@pytest.mark.parametrize(
    ("transforms", "size", "ulps"),
    [
        ([], 1e-3, 8),
        ([lm.accumulate(3)], 1e-3, 8),
        ([lm.guard("skip"), lm.donate()], 1e-3, 8),
        ([lm.clip(5e-3)], 1e-3, 16),
        ([lm.precision(half_policy(2.0**12))], 1e-6, 8),
        ([lm.accumulate(3), lm.precision(half_policy(2.0**12))], 1e-6, 8),
    ],
    ids=repr,
)
def test_transforms(transforms: list[Any], size: float, ulps: float) -> None:
    """Momentum against float64; also of gradients of 1e-6, of which float16 tells few apart."""
    rows, lr = 7, 1e-3 / size
    tx = optim.sgd(lr, 0.9)
    step = lm.compose(*transforms)(linear_step) if transforms else linear_step
    state = lm.TrainState.create(nn.Linear(2, 2), tx)
    state = state.replace(params=start(), opt_state=tx.init(start()))
    state = step.init(state) if transforms else state
    exact, momentum = {name: p.double() for name, p in start().items()}, dict.fromkeys(DTYPES, 0.0)
    generator = torch.Generator().manual_seed(2)
    drift = torch.randn(SHAPE, generator=generator).sign()
    is_guarded = "guard" in {t.name for t in transforms}
    for i in range(STEPS):
        c = size * (drift + torch.randn(rows, *SHAPE, generator=generator))
        if is_guarded and i % 100 == 50:
            state, _ = step(state, {name: torch.full_like(c, torch.nan) for name in DTYPES})
        state, _ = step(state, dict.fromkeys(DTYPES, c))
        mean = c.double().mean(0)
        bound = min(1.0, 5e-3 / ((2 * mean.square().sum()).sqrt().item() + 1e-6)) if "clip" in repr(transforms) else 1.0
        momentum = {name: 0.9 * m + bound * mean for name, m in momentum.items()}
        exact = rounded({name: p - lr * momentum[name] for name, p in exact.items()})
    assert moved(exact) > 0.1
    assert_near(state.params, exact, ulps)


def test_a_mean_over_rows_that_16_bits_cannot_count() -> None:
    """257 rows: in bfloat16 256; and 70,000, in float16 infinitely many."""

    def step(state: Any, x: Tensor) -> tuple[Any, dict[str, Any]]:
        loss, grads = lm.value_and_grad(lambda p, x: (x * p["w"]).to(loss_dtype).mean())(state, x)
        return grads, {"loss": loss}

    for dtype, loss_dtype, rows in (  # noqa: B007
        (torch.bfloat16, torch.bfloat16, 257),
        (torch.float16, torch.float32, 70_000),
    ):
        grads, metrics = lm.accumulate(microbatch=rows - 1)(step)(
            {"w": torch.ones((), dtype=dtype)}, torch.ones(rows, dtype=dtype) / 4
        )
        assert grads["w"].item() == 0.25
        assert grads["w"].dtype == dtype
        assert metrics["loss"].item() == 0.25
