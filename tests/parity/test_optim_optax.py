"""Fifty steps beside optax, or the paper's rule, in float64 to 1e-10, for what torch does not have."""

import math

import jax
import numpy as np
import optax
import pytest
import torch
from optax import contrib

from lumen import optim

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "b.weight": (4, 3, 2), "c": (2, 2)}


@pytest.fixture(autouse=True)
def double_precision():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def arrays(seed):
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}


def to_torch(values):
    return {name: torch.tensor(np.array(value)) for name, value in values.items()}


def their_step(theirs):
    @jax.jit
    def step(grads, state, params):
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def largest_difference(ours, theirs, found=lambda opt_state, params: params, expected=lambda opt_state, params: params):
    """The largest difference over fifty steps of what `found` and `expected` read off either side."""
    their_params = arrays(0)
    params = to_torch(their_params)
    opt_state, their_state = ours.init(params), theirs.init(their_params)
    worst, step_theirs = 0.0, their_step(theirs)
    for step in range(50):
        grads = arrays(step + 1)
        params, opt_state = ours.apply(to_torch(grads), opt_state, params)
        their_params, their_state = step_theirs(grads, their_state, their_params)
        left, right = found(opt_state, params), to_torch(expected(their_state, their_params))
        worst = max(worst, *((left[name] - right[name]).abs().max().item() for name in SHAPES))
    return worst


def schedule(count):
    """For both: an integer tensor of torch's over a number would be float32."""
    count = count.double() if isinstance(count, torch.Tensor) else count
    return 1e-2 * (1 + count) / (10 + count)


CASES = {
    "lion": (optim.lion(1e-3, weight_decay=0.1), optax.lion(1e-3, weight_decay=0.1)),
    "lion betas": (optim.lion(1e-3, (0.8, 0.95)), optax.lion(1e-3, 0.8, 0.95, weight_decay=0.0)),
    "lamb": (optim.lamb(1e-2, weight_decay=0.1), optax.lamb(1e-2, weight_decay=0.1)),
    "adam eps_root": (optim.adam(1e-2, eps_root=1e-3), optax.adam(1e-2, eps_root=1e-3)),
    "adamw schedule": (
        optim.adamw(schedule, weight_decay=0.1),
        optax.adamw(schedule, weight_decay=0.1),
    ),
    "chain": (
        optim.chain(
            optim.clip_by_value(0.7),
            optim.add_decayed_weights(0.1),
            optim.scale_by_adam((0.8, 0.9)),
            optim.trace(0.5, nesterov=True),
            optim.scale_by_schedule(schedule),
            optim.scale(-2.0),
        ),
        optax.chain(
            optax.clip(0.7),
            optax.add_decayed_weights(0.1),
            optax.scale_by_adam(0.8, 0.9),
            optax.trace(0.5, nesterov=True),
            optax.scale_by_schedule(schedule),
            optax.scale(-2.0),
        ),
    ),
    "trust ratio": (
        optim.chain(optim.scale_by_trust_ratio(), optim.scale_by_learning_rate(schedule)),
        optax.chain(optax.scale_by_trust_ratio(), optax.scale_by_learning_rate(schedule)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_plain_lowering_is_optax(case):
    ours, theirs = CASES[case]
    assert largest_difference(optim.GradientTransformation(ours.init_fn, ours.update_fn), theirs) < 1e-10


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_schedule_free_is_optax_in_training_and_evaluation(base):
    if base == "sgd":
        ours, theirs = optim.sgd(0.1), optax.sgd(0.1)
    else:
        ours = optim.adamw(0.01, (0.0, 0.99), weight_decay=0.1)
        theirs = optax.adamw(0.01, 0.0, 0.99, weight_decay=0.1)
    ours, theirs = optim.schedule_free(ours, 0.8), contrib.schedule_free(theirs, 0.1 if base == "sgd" else 0.01, 0.8)
    assert largest_difference(ours, theirs) < 1e-10
    difference = largest_difference(ours, theirs, optim.schedule_free_eval_params, contrib.schedule_free_eval_params)
    assert difference < 1e-10


def test_schedule_free_is_the_papers_recursion_with_a_warmup():
    """The three sequences of the paper, written out; weights are the squares of the learning rates."""
    beta, rates = 0.9, [0.1 * min(1, (t + 1) / 5) for t in range(20)]
    tx = optim.schedule_free(optim.sgd(lambda count: 0.1 * torch.clamp((count.double() + 1) / 5, max=1.0)), beta)
    params = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    opt_state = tx.init(params)
    x = z = y = params["w"]
    total = 0.0
    for rate in rates:
        params, opt_state = tx.apply({"w": y.sin()}, opt_state, params)
        z = z - rate * y.sin()
        total += rate**2
        x = x + rate**2 / total * (z - x)
        y = beta * x + (1 - beta) * z
        torch.testing.assert_close(params["w"], y, rtol=0, atol=1e-12)
    torch.testing.assert_close(optim.schedule_free_eval_params(opt_state, params)["w"], x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_lookahead_is_optax(fused):
    ours = optim.lookahead(optim.adamw(1e-2, weight_decay=0.1), period=4, slow_step=0.3)
    if not fused:
        ours = optim.GradientTransformation(ours.init_fn, ours.update_fn)
    theirs = optax.lookahead(optax.adamw(1e-2, weight_decay=0.1), 4, 0.3)
    their_params = optax.LookaheadParams.init_synced(arrays(0))
    params = to_torch(arrays(0))
    opt_state, their_state, step_theirs = ours.init(params), theirs.init(their_params), their_step(theirs)
    for step in range(50):
        grads = arrays(step + 1)
        params, opt_state = ours.apply(to_torch(grads), opt_state, params)
        their_params, their_state = step_theirs(grads, their_state, their_params)
        for name in SHAPES:
            torch.testing.assert_close(params[name], to_torch(their_params.fast)[name], rtol=0, atol=1e-10)
            slow = optim.lookahead_slow_params(opt_state)[name]
            torch.testing.assert_close(slow, to_torch(their_params.slow)[name], rtol=0, atol=1e-10)


def test_apply_if_finite_is_optax():
    ours = optim.apply_if_finite(optim.adam(1e-2), 2)
    theirs = optax.apply_if_finite(optax.adam(1e-2), 2)
    their_params, params = arrays(0), to_torch(arrays(0))
    opt_state, their_state, step_theirs = ours.init(params), theirs.init(their_params), their_step(theirs)
    for step, bad in enumerate([0, 1, 0, 1, 1, 0, 0]):
        grads = arrays(step + 1)
        if bad:
            grads["a.bias"][1] = math.inf
        params, opt_state = ours.apply(to_torch(grads), opt_state, params)
        their_params, their_state = step_theirs(grads, their_state, their_params)
        assert int(opt_state.consecutive) == int(their_state.notfinite_count)
        assert int(opt_state.total) == int(their_state.total_notfinite)
        for name in SHAPES:
            torch.testing.assert_close(params[name], to_torch(their_params)[name], rtol=0, atol=1e-10)


def test_apply_if_finite_gives_up_after_too_many_in_a_row():
    tx = optim.apply_if_finite(optim.sgd(1.0), 1)
    params = {"w": torch.ones(1)}
    opt_state = tx.init(params)
    bad = {"w": torch.tensor([math.nan])}
    params, opt_state = tx.apply(bad, opt_state, params)
    assert params["w"].isfinite().all()
    params, _ = tx.apply(bad, opt_state, params)
    assert params["w"].isnan().all()


def test_clip_by_global_norm_is_torch():
    for scale in (0.1, 10.0):
        grads = {name: g * scale for name, g in to_torch(arrays(1)).items()}
        tx = optim.clip_by_global_norm(1.0)
        found, _ = tx.update(grads, tx.init(grads), grads)
        leaves = [g.clone().requires_grad_() for g in grads.values()]
        for leaf in leaves:
            leaf.grad = leaf.detach().clone()
        norm = torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        torch.testing.assert_close(optim.global_norm(grads), norm, rtol=1e-12, atol=0)
        for g, leaf in zip(found.values(), leaves, strict=True):
            torch.testing.assert_close(g, leaf.grad, rtol=1e-12, atol=0)


def test_adafactor_keeps_a_row_and_a_column():
    """The paper's memory claim: n + m numbers for a matrix of n · m."""
    opt_state = optim.adafactor(0.1).init({"w": torch.ones(300, 200)})
    assert sum(leaf.numel() for leaf in opt_state.nu["w"].values()) == 500
