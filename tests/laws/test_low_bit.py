"""Low-bit states and stochastic rounding: a bound for each entry, exact on average, and every transform's law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lumen as lm
from lumen import optim
from lumen.errors import ArgumentError, HyperparameterError, ParamsError
from lumen.optim._quantized import Quantized, dequantize, quantize, round_to_bf16
from lumen.random._rounding_bits import counted_keys, rounding_bits

from .models import assert_same

BETAS = (0.9, 0.999)
WIDE = 64
SHAPES = [(64, 64), (40, 300), (16, 3, 10, 10), (1, 4096), (128, 33)]
LEVELS = {True: (127, 2), False: (255, 4)}  # of a mean, and of a mean of squares: the codes, and the power


def plain(tx: optim.GradientTransformation) -> optim.GradientTransformation:
    return optim.GradientTransformation(tx.init_fn, tx.update_fn)


def opened(moment: Any) -> Tensor:
    return dequantize(moment) if isinstance(moment, Quantized) else moment


def by_hand(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The levels below and above the magnitude of each entry of `x`, in float64, a block at a time."""
    largest_code, power = LEVELS[signed]
    rows = x.double().abs().reshape(len(x), -1)
    count = -(-rows.shape[1] // 256)
    low, high = torch.zeros_like(rows), torch.zeros_like(rows)
    for chunk in torch.arange(rows.shape[1]).split(-(-rows.shape[1] // count)):
        block = rows[:, chunk]
        s = block.amax(1, keepdim=True)
        code = (largest_code * (block / s.clamp(min=1e-300)) ** (1 / power)).floor()
        code = code - (s * (code / largest_code) ** power > block).double()  # where the root was rounded up
        low[:, chunk] = s * (code / largest_code) ** power
        high[:, chunk] = s * ((code + 1).clamp(max=largest_code) / largest_code) ** power
        if not signed:
            least = s * (2 / largest_code) ** power
            high[:, chunk] = torch.where(block > 0, high[:, chunk].maximum(least), 0.0)
            low[:, chunk] = torch.where(block > 0, low[:, chunk].maximum(least), 0.0)
    return low.reshape(x.shape), high.reshape(x.shape)


def gradient(shape: tuple[int, ...], scale: float, decades: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=random) * scale * 10 ** (-decades * torch.rand(shape, generator=random))
    return g * (torch.rand(shape[0], *[1] * (len(shape) - 1), generator=random) > 0.2)


# ------------------------------------------------------------------------------------------- rounding


@settings(max_examples=25)
@given(
    shape=st.sampled_from(SHAPES),
    scale=st.sampled_from([1e-8, 1e-3, 1.0, 1e4]),
    decades=st.sampled_from([0, 3, 8]),
    seed=st.integers(0, 99),
    fused=st.booleans(),
)
def test_each_moment_is_one_of_the_two_levels_next_to_the_exact_one(
    shape: tuple[int, ...], scale: float, decades: int, seed: int, fused: bool
) -> None:
    """Also for blocks of zeros, and for tiny entries beside large ones; a positive square never becomes zero."""
    tx = optim.adamw(1e-3, BETAS, state_dtype="int8")
    params, g = {"w": torch.ones(shape)}, gradient(shape, scale, decades, seed)
    _, state = (tx if fused else plain(tx)).apply({"w": g}, tx.init(params), params)
    for moment, exact in ((state.mu["w"], (1 - BETAS[0]) * g), (state.nu["w"], (1 - BETAS[1]) * g * g)):
        assert isinstance(moment, Quantized)
        assert moment.codes.shape == shape
        signed = moment.codes.dtype == torch.int8
        found, (low, high) = opened(moment).double(), by_hand(exact, signed)
        near = 1e-5 * exact.double().abs().maximum(found.abs()) + 1e-37
        assert (((found.abs() - low).abs() <= near) | ((found.abs() - high).abs() <= near)).all()
        assert (found * exact >= 0).all()
        rows = exact.double().abs().reshape(len(exact), -1).amax(1).reshape(-1, *[1] * (len(shape) - 1))
        assert ((found - exact).abs() <= rows / 63).all()
        assert not signed or (found[exact == 0] == 0).all()
        assert signed or ((found > 0) == (exact > 0)).all()


@settings(max_examples=25)
@given(scale=st.sampled_from([1e-20, 1.0, 1e20]), decades=st.sampled_from([0, 6]), seed=st.integers(0, 99))
def test_bfloat16_is_one_of_the_two_numbers_next_to_the_exact_one(scale: float, decades: int, seed: int) -> None:
    x = gradient((50, 7), scale, decades, seed)
    found = round_to_bf16(x, rounding_bits(lm.random.key(seed), x.shape) & 0xFFFF).double()
    # Towards zero, and the next number away from it.
    low = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    high = ((x.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert ((found == low.double()) | ((found == high.double()) & (low != x))).all()


@pytest.mark.parametrize("start", [torch.nan, torch.inf, -torch.inf, 0.0, 3.3e38])
def test_bfloat16_keeps_what_is_no_number(start: float) -> None:
    x = torch.full((64,), start)
    found = round_to_bf16(x, rounding_bits(lm.random.key(0), x.shape) & 0xFFFF)
    assert found.dtype == torch.bfloat16
    wanted = x if start != 3.3e38 else found.float().clamp(3.2e38, 3.4e38)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0, equal_nan=True)


def test_a_moment_that_is_not_finite_spoils_its_block_and_no_other() -> None:
    x = torch.ones(2, 512)
    x[0, 3], x[1, 300] = torch.nan, torch.inf
    found = dequantize(quantize(x, torch.zeros(x.shape, dtype=torch.int32), signed=True))
    assert found[0, :256].isnan().all()
    assert found[1, 256:].isnan().all()
    assert torch.equal(found[0, 256:], torch.ones(256))
    assert torch.equal(found[1, :256], torch.ones(256))


KEYS = 4096


def over_keys(function: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of `function(key)` over many keys."""
    keys = counted_keys(lm.random.key(3), torch.tensor(0), KEYS)
    return torch.vmap(function, chunk_size=256)(keys).double().mean(0)


def test_roundings_are_exact_on_average_over_keys() -> None:
    """The error of the mean is at most five standard deviations, of which one is half a spacing or less."""
    x = gradient((2, 300), 1.0, 3, 0)
    x[1] = x[1].abs() + 0.01
    for signed in (True, False):
        y = x if signed else x.square()

        def rounded(key: Tensor, y: Tensor = y, signed: bool = signed) -> Tensor:
            return dequantize(quantize(y, rounding_bits(key, y.shape) & 0xFFFF, signed))

        low, high = by_hand(y, signed)
        spacing = high - low
        above_least = (y.double().abs() >= low) & (spacing > 0)
        error = (over_keys(rounded) - y.double()).abs()
        bound = 5 * 0.5 * spacing / KEYS**0.5 + 2e-5 * spacing + 1e-6 * y.double().abs()
        assert above_least.double().mean() > 0.4
        assert (error <= bound)[above_least].all()
        # Rounded to nearest they would not be: this test can fail.
        nearest = dequantize(quantize(y, torch.full(y.shape, 1 << 15), signed)).double()
        assert ((nearest - y.double()).abs() > bound)[above_least].double().mean() > 0.5
    spacing = (2.0 ** (x.double().abs().log2().floor() - 7)).nan_to_num(0.0)
    error = (over_keys(lambda key: round_to_bf16(x, rounding_bits(key, x.shape) & 0xFFFF).float()) - x.double()).abs()
    assert (error <= 5 * 0.5 * spacing / KEYS**0.5).all()


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
def test_an_update_is_exact_on_average_over_keys(rule: str) -> None:
    """Of bfloat16 params, by steps that are a tenth of their spacing."""
    tx = {
        "adamw": optim.adamw(4e-4, weight_decay=0.0, stochastic_rounding=True),
        "lion": optim.lion(4e-4, stochastic_rounding=True),
        "sgd": optim.sgd(4e-4, stochastic_rounding=True),
    }[rule]
    params, grads = {"w": torch.ones(6, 8).bfloat16()}, {"w": torch.full((6, 8), -1.0).bfloat16()}
    state = tx.init(params)

    def updated(key: Tensor) -> Tensor:
        with_key = state.replace(hparams={**state.hparams, "rounding_key": key})
        new, _ = tx.apply(grads, with_key, params)
        return new["w"].float() - 1

    mean = over_keys(updated)
    spacing = 2.0**-7
    assert ((mean - 4e-4).abs() <= 5 * (4e-4 * spacing) ** 0.5 / KEYS**0.5).all()


def test_random_bits_are_uniform_and_independent() -> None:
    """Each bit is a fair coin over keys and over entries, and so is whether neighbors, or two updates, agree."""
    keys = counted_keys(lm.random.key(0), torch.tensor(7), 512)
    later = counted_keys(lm.random.key(0), torch.tensor(8), 512)
    words = torch.stack([rounding_bits(key, (512,)) for key in keys])
    others = torch.stack([rounding_bits(key, (512,)) for key in later])
    bits = (words.unsqueeze(-1) >> torch.arange(32)) & 1
    next_bits = (others.unsqueeze(-1) >> torch.arange(32)) & 1
    for dim in (0, 1):
        assert (bits.double().mean(dim) - 0.5).abs().max() < 6 * 0.5 / 512**0.5
    pairs = [
        (bits[:, :-1], bits[:, 1:]),
        (bits[:-1], bits[1:]),
        (bits, next_bits),
        (bits[..., :-1], bits[..., 1:]),
        (bits[..., :16], bits[..., 16:]),
    ]
    for one, other in pairs:
        assert abs((one ^ other).double().mean() - 0.5) < 6 * 0.5 / one.numel() ** 0.5


def test_keys_are_those_of_fold_in() -> None:
    key = lm.random.key(9)
    for n in (3, 40):  # as Python numbers, and as tensors
        found = counted_keys(key, torch.tensor(5), n)
        assert torch.equal(found, torch.stack([lm.random.fold_in(key, (5 << 32) + i) for i in range(n)]))


# ------------------------------------------------------------------------------------- under transforms


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE)).to(dtype)


def data(rows: int = 12, number: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = torch.randn(rows, WIDE, generator=torch.Generator().manual_seed(number))
    return {"x": x.to(dtype), "y": x.roll(1, 1).tanh().to(dtype)}


def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    def loss_fn(params: Any, batch: Any) -> lm.Mean:
        out, _ = state.apply(params, batch["x"])
        return lm.Mean.of((out.float() - batch["y"].float()).square().mean(1))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


RULES: dict[str, tuple[torch.dtype, Callable[[], optim.GradientTransformation]]] = {
    "adamw int8": (torch.float32, lambda: optim.adamw(1e-3, state_dtype="int8")),
    "adam int8": (torch.float32, lambda: optim.adam(1e-3, weight_decay=0.1, state_dtype="int8")),
    "adamw bf16": (torch.float32, lambda: optim.adamw(1e-3, state_dtype="bf16", decay_mask="*.weight")),
    "lion int8": (torch.float32, lambda: optim.lion(1e-4, weight_decay=0.1, state_dtype="int8")),
    "sgd int8": (torch.float32, lambda: optim.sgd(0.1, 0.9, nesterov=True, state_dtype="int8")),
    "lamb int8": (torch.float32, lambda: optim.lamb(1e-3, state_dtype="int8")),
    "adamw params": (torch.bfloat16, lambda: optim.adamw(1e-3, stochastic_rounding=True)),
    "adamw both": (torch.bfloat16, lambda: optim.adamw(1e-3, state_dtype="int8", stochastic_rounding=True)),
    "lion both": (torch.bfloat16, lambda: optim.lion(1e-4, state_dtype="bf16", stochastic_rounding=True)),
    "sgd both": (torch.bfloat16, lambda: optim.sgd(0.1, 0.9, state_dtype="bf16", stochastic_rounding=True)),
}


def fresh(name: str) -> lm.TrainState:
    dtype, make = RULES[name]
    return lm.TrainState.create(network(dtype), make(), seed=1)


def run(stepper: Any, name: str, steps: int = 4, state: Any = None) -> Any:
    state = fresh(name) if state is None else state
    state = stepper.init(state) if hasattr(stepper, "init") else state
    for number in range(steps):
        state, _ = stepper(state, data(number=number, dtype=RULES[name][0]))
    return state


def far(found: Any, wanted: Any) -> float:
    """How far the params of two runs are apart, as a share of the way that they went: a root mean square."""
    begin = [p.double() for p in network().state_dict().values()]
    a, b = ([p.double() for p in s.params.values()] for s in (found, wanted))
    apart = sum((x - y).square().sum() for x, y in zip(a, b, strict=True))
    moved = sum((x - y).square().sum() for x, y in zip(b, begin, strict=True))
    return float((apart / moved).sqrt())


@pytest.mark.parametrize("name", RULES)
def test_both_lowerings_round_with_the_same_bits(name: str) -> None:
    """They compute in other orders, so few entries fall on two sides of a threshold; other bits would move most."""
    one = run(step, name, steps=3)
    tx = plain(RULES[name][1]())
    other = run(step, name, steps=3, state=fresh(name).replace(tx=tx))
    rekeyed = lm.tree.map(lambda x: x + 1 if x.dtype == torch.int64 and x.shape == (2,) else x, fresh(name).opt_state)
    third = run(step, name, steps=3, state=fresh(name).replace(opt_state=rekeyed))
    assert far(other, one) < 0.2 * far(third, one)


@pytest.mark.parametrize("name", RULES)
def test_donate_is_bitwise_the_step(name: str) -> None:
    assert_same(run(lm.donate()(step), name), run(step, name), exact=True)


@pytest.mark.parametrize("name", ["adamw int8", "adamw both", "sgd both"])
def test_guard_skips_all_or_nothing(name: str) -> None:
    poisoned = data(dtype=RULES[name][0])
    poisoned["x"][0] = torch.nan
    for stack in (lm.guard(), lm.compose(lm.guard(), lm.donate())):
        guarded = stack(step)
        state = guarded.init(run(step, name, steps=2))
        before = [x.clone() for x in lm.tree.tensors((state.params, state.opt_state))]
        state, _ = guarded(state, poisoned)
        for old, new in zip(before, lm.tree.tensors((state.params, state.opt_state)), strict=True):
            assert torch.equal(old, new)


@pytest.mark.parametrize("name", ["adamw int8", "adamw bf16", "lion int8", "adamw both"])
def test_accumulate_and_compile_are_the_step_up_to_rounding(name: str) -> None:
    wanted = run(step, name)
    for transform in (lm.accumulate(3), lm.compile(backend="eager")):
        assert far(run(transform(step), name), wanted) < 0.05


def test_a_compiled_step_has_the_bits_of_the_plain_lowering() -> None:
    state = fresh("adamw both").replace(tx=plain(RULES["adamw both"][1]()))
    assert_same(run(lm.compile(backend="eager")(step), "adamw both", state=state), run(step, "adamw both", state=state))


@pytest.mark.parametrize("name", ["adamw int8", "adamw both", "lion both"])
def test_each_lane_is_a_run_by_itself(name: str) -> None:
    ensemble = lm.ensemble(2)(step)
    state = ensemble.init(fresh(name))
    found = run(ensemble, name, state=state)
    wanted = run(step, name)
    for lane in range(2):
        single = lm.tree.map(lambda x, lane=lane: x[lane], found.params)
        assert far(fresh(name).replace(params=single), wanted) < 0.05


def test_a_sweep_sets_the_learning_rate_of_each_lane() -> None:
    swept = lm.sweep(lr=[1e-3, 1e-2])(step)
    found = run(swept, "adamw int8", state=fresh("adamw int8"))
    faster = lm.TrainState.create(network(), optim.adamw(1e-2, state_dtype="int8"), seed=1)
    for lane, wanted in enumerate((run(step, "adamw int8"), run(step, "adamw int8", state=faster))):
        single = lm.tree.map(lambda x, lane=lane: x[lane], found.params)
        assert far(wanted.replace(params=single), wanted) < 0.05


@pytest.mark.parametrize("name", ["adamw int8", "adamw both", "lion both"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    wanted = run(step, name, steps=4)
    lm.checkpoint.save(tmp_path / "a", run(step, name, steps=2))
    state = lm.checkpoint.restore(tmp_path / "a", fresh(name))
    for number in (2, 3):
        state, _ = step(state, data(number=number, dtype=RULES[name][0]))
    assert_same(state, wanted, exact=True)


# --------------------------------------------------------------------------------------------- training


def trained(tx: optim.GradientTransformation, dtype: torch.dtype, steps: int = 500) -> float:
    """The loss after small steps, computed in float32 from the params as they are."""
    state = lm.TrainState.create(network(dtype), tx)
    fast = lm.donate()(step)
    state = fast.init(state)
    for number in range(steps):
        state, _ = fast(state, data(rows=16, number=number, dtype=dtype))
    held_out = data(rows=64, number=10**6)
    params = {name: p.float() for name, p in state.params.items()}
    out = torch.func.functional_call(network(), params, (held_out["x"],))
    return float(F.mse_loss(out, held_out["y"]))


def test_500_small_steps_reach_the_loss_of_float32() -> None:
    """With a step of a few thousandths of a param, plain bfloat16 params stay behind."""
    first = trained(optim.adamw(1e-4), torch.float32, steps=0)
    wanted = trained(optim.adamw(1e-4), torch.float32)
    assert first - wanted > 0.3 * first
    for state_dtype in ("int8", "bf16"):
        assert abs(trained(optim.adamw(1e-4, state_dtype=state_dtype), torch.float32) - wanted) < 0.01 * wanted
    both = optim.adamw(1e-4, state_dtype="int8", stochastic_rounding=True)
    assert trained(both, torch.bfloat16) - wanted < 0.02 * (first - wanted)
    assert trained(optim.adamw(1e-4), torch.bfloat16) - wanted > 0.5 * (first - wanted)


@pytest.mark.parametrize("state_dtype", ["int8", "bf16"])
def test_a_second_moment_follows_smaller_gradients(state_dtype: Any) -> None:
    """Rounded to nearest, it would keep the size that the first gradients had."""
    tx = optim.adamw(1e-3, (0.9, 0.995), state_dtype=state_dtype)
    params = {"w": torch.ones(64, 64)}
    state = tx.init(params)
    random = torch.Generator().manual_seed(0)
    for number in range(700):
        size = torch.ones(64, 64)
        size[:, ::2] = 1.0 if number < 100 else 0.5  # beside entries whose size stays, so that scales do
        grads = {"w": size * torch.randn(64, 64, generator=random).sign()}
        params, state = tx.apply(grads, state, params, donate=True)
    found, decay = opened(state.nu["w"])[:, ::2].double().mean().item(), 0.995**600
    wanted = decay * (1 - 0.995**100) + 0.25 * (1 - decay)
    assert found == pytest.approx(wanted, rel=0.02)


# ---------------------------------------------------------------------------------------------- memory


def nbytes(values: Any) -> int:
    return sum(x.nbytes for x in lm.tree.tensors(values))


@pytest.mark.parametrize(("state_dtype", "share"), [("int8", 0.30), ("bf16", 0.50)])
def test_bytes_of_the_moments(state_dtype: Any, share: float) -> None:
    params = {"a": torch.ones(256, 512), "b": torch.ones(128, 33), "c": torch.ones(64, 3, 7, 7)}
    whole, small = (optim.adamw(1e-3, state_dtype=each).init(params) for each in (None, state_dtype))
    assert nbytes((small.mu, small.nu)) <= share * nbytes((whole.mu, whole.nu))


def test_small_leaves_keep_float32() -> None:
    params = {
        "bias": torch.ones(8192),
        "small": torch.ones(63, 64),
        "narrow": torch.ones(512, 31),
        "large": torch.ones(64, 64),
    }
    mu = optim.adamw(1e-3, state_dtype="int8").init(params).mu
    assert {name: type(leaf) is Quantized for name, leaf in mu.items()} == {
        "bias": False,
        "small": False,
        "narrow": False,
        "large": True,
    }
    assert mu["bias"].dtype == mu["small"].dtype == mu["narrow"].dtype == torch.float32


def test_the_plan_counts_the_bytes() -> None:
    batch = data()
    found = {
        state_dtype: lm.plan(
            lm.donate()(step),
            lm.TrainState.create(network(), optim.adamw(1e-3, state_dtype=state_dtype)),
            batch,
            world_size=1,
        )
        for state_dtype in (None, "int8")
    }
    saved = found[None].peak.by_category["optimizer"] - found["int8"].peak.by_category["optimizer"]
    assert saved >= 0.7 * 2 * 4 * 2 * WIDE * WIDE


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("make", [optim.adam, optim.adamw, optim.lion, lambda lr, **k: optim.sgd(lr, 0.9, **k)])
@pytest.mark.parametrize("state_dtype", ["int4", "fp8", torch.float16, torch.int32])
def test_an_unknown_dtype_is_named(make: Any, state_dtype: Any) -> None:
    with pytest.raises((HyperparameterError, ArgumentError), match="state_dtype.*int8"):
        make(1e-3, state_dtype=state_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_stochastic_rounding_needs_bfloat16(dtype: torch.dtype) -> None:
    with pytest.raises(ParamsError, match="rounds bfloat16 params, and these are float"):
        optim.adamw(1e-3, stochastic_rounding=True).init({"w": torch.ones(3, dtype=dtype)})


def test_float32_params_beside_bfloat16_ones_keep_their_rounding() -> None:
    params = {"norm": torch.ones(4), "w": torch.ones(4).bfloat16()}
    grads = {"norm": torch.ones(4), "w": torch.ones(4).bfloat16()}
    tx = optim.sgd(1e-6, stochastic_rounding=True)
    for lowering in (tx, plain(tx)):
        new, _ = lowering.apply(grads, tx.init(params), params)
        assert torch.equal(new["norm"], torch.ones(4) - 1e-6)
        assert new["w"].dtype == torch.bfloat16


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(HyperparameterError, match="amsgrad=True keeps the largest"):
        optim.adamw(1e-3, amsgrad=True, state_dtype="int8")
    with pytest.raises(HyperparameterError, match="momentum buffer, and there is none"):
        optim.sgd(1e-3, state_dtype="int8")
    rounding = optim.adamw(1e-3, stochastic_rounding=True)
    with pytest.raises(HyperparameterError, match="chain changes the updates"):
        optim.chain(rounding, optim.reduce_on_plateau())
    for wrapper in (optim.lookahead, optim.schedule_free):
        with pytest.raises(HyperparameterError, match="changes the updates"):
            wrapper(optim.chain(optim.clip_by_global_norm(1.0), rounding))


def test_a_differentiated_update_is_refused() -> None:
    tx = optim.adamw(1e-3, state_dtype="int8")
    params = {"w": torch.ones(64, 64)}

    def moved(grad: Tensor) -> Tensor:
        return tx.apply({"w": grad}, tx.init(params), params)[0]["w"].sum()

    with pytest.raises(HyperparameterError, match="has no derivative"):
        torch.func.grad(moved)(torch.ones(64, 64))
    with pytest.raises(HyperparameterError, match="has no derivative"):
        moved(torch.ones(64, 64, requires_grad=True))
