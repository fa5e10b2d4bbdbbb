"""`reduce_on_plateau` beside torch's `ReduceLROnPlateau`: the same table for any series of metrics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumen import optim
from lumen.errors import HyperparameterError, StateError

LR = 0.1

rules = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.0, 0.1, 0.5, 0.9]),
        "patience": st.integers(0, 4),
        "threshold": st.sampled_from([0.0, 1e-4, 0.1]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "mode": st.sampled_from(["min", "max"]),
        "cooldown": st.integers(0, 3),
        "min_scale": st.sampled_from([0.0, 0.05, 0.3]),
    }
)
series = st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), st.floats(-3, 3)), min_size=1, max_size=40)


@given(rules, series)
def test_table_is_torch(rule, metrics):
    torch_rule = dict(rule)
    torch_rule["min_lr"] = torch_rule.pop("min_scale") * LR
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, eps=1e-8 * LR, **torch_rule)
    opt_state = optim.chain(optim.sgd(LR), optim.reduce_on_plateau(**rule)).init({"w": torch.zeros(1)})
    for metric in metrics:
        scheduler.step(metric)
        opt_state = optim.plateau_step(opt_state, metric)
        theirs = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64)
        torch.testing.assert_close(optim.learning_rate(opt_state), theirs, rtol=1e-12, atol=1e-12)


def test_scale_acts_on_the_updates_in_both_lowerings():
    params, grads = {"w": torch.randn(4, 3)}, {"w": torch.randn(4, 3)}
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1), optim.reduce_on_plateau(0.25, patience=0))
    assert tx.fused_fn is not None
    opt_state = tx.init(params)
    whole, _ = tx.apply(grads, opt_state, params)
    alone, _ = optim.chain(*[optim.clip_by_global_norm(1.0), optim.adamw(0.1)]).apply(grads, opt_state[:2], params)
    assert torch.equal(whole["w"], alone["w"])  # a scale of one changes no bit
    for metric in (1.0, 1.0):
        opt_state = optim.plateau_step(opt_state, metric)
    for lowering in (tx, optim.GradientTransformation(tx.init_fn, tx.update_fn)):
        part, _ = lowering.apply(grads, opt_state, params)
        expected = params["w"] + 0.25 * (whole["w"] - params["w"])
        torch.testing.assert_close(part["w"], expected, rtol=1e-6, atol=1e-6)


def test_plateau_is_found_in_a_partition_and_runs_for_many_lanes():
    tx = optim.partition({"a": optim.chain(optim.sgd(1.0), optim.reduce_on_plateau(0.5, 0))}, optim.adam(1.0))
    opt_state = tx.init({"a": torch.zeros(1), "b": torch.zeros(1)})
    lanes = torch.func.vmap(lambda _: opt_state, in_dims=0)(torch.arange(3))
    report = torch.func.vmap(optim.plateau_step)
    lanes = report(report(lanes, torch.tensor([1.0, 1.0, 1.0])), torch.tensor([0.5, 1.0, 2.0]))
    assert lanes.groups[0][1].scale.tolist() == [1.0, 0.5, 0.5]


def test_a_report_that_nothing_takes_is_refused():
    with pytest.raises(StateError, match="reduce_on_plateau"):
        optim.plateau_step(optim.sgd(0.1).init({"w": torch.zeros(1)}), 1.0)


@pytest.mark.parametrize(
    "rule",
    [
        {"factor": 1.0},
        {"factor": float("nan")},
        {"patience": -1},
        {"cooldown": 0.5},
        {"mode": "least"},
        {"threshold_mode": "both"},
        {"min_scale": 2.0},
    ],
)
def test_bad_rules_are_refused(rule):
    with pytest.raises(HyperparameterError):
        optim.reduce_on_plateau(**rule)
