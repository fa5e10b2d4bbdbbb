"""`EarlyStop` beside Lightning's `EarlyStopping`: the same decision at each report of any series."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lumen.train.callbacks import CallbackContext
from lumen.train.clock import Clock
from lumen.train.early_stop import EarlyStop

NAN, INF = float("nan"), float("inf")

# The report at which Lightning 2.6.6 ends the run (None: it does not), and what Lumen says then.
TABLE = [
    ([6, 5, 5, 5, 5, 5], {"patience": 3}, 4, "val/loss has not improved on 5 for 3 reports"),
    ([6, 5, 4, 4, 3, 3], {"patience": 1}, 3, "val/loss has not improved on 4 for 1 report"),
    ([6, 5, 6, 5, 5, 5], {"patience": 3}, 4, "val/loss has not improved on 5 for 3 reports"),
    ([1, 2, 3, 3, 2, 1], {"patience": 3, "mode": "max"}, 5, "val/loss has not improved on 3 for 3 reports"),
    ([6, 5.5, 5.2, 4.9, 4.8], {"patience": 2, "min_delta": 1.0}, 2, "val/loss has not improved on 6 for 2 reports"),
    ([6, 5, 5.5], {"patience": 2, "min_delta": 1.0}, 2, "val/loss has not improved on 6 for 2 reports"),
    ([6, 4, 2, 1], {"threshold": 2}, 3, "val/loss is 1, better than the threshold 2"),
    ([1, 2, 4], {"mode": "max", "threshold": 3}, 2, "val/loss is 4, better than the threshold 3"),
    ([1, 9, 11], {"divergence": 10}, 2, "val/loss is 11, worse than 10: it diverges"),
    ([1, 0, -2], {"mode": "max", "divergence": -1}, 2, "val/loss is -2, worse than -1: it diverges"),
    ([5, NAN], {}, 1, "val/loss is nan, not finite; the best was 5"),
    ([5, INF], {}, 1, "val/loss is inf, not finite; the best was 5"),
    ([5, NAN, NAN, 4, 4], {"check_finite": False, "patience": 3}, None, ""),
    ([5, NAN, NAN, NAN], {"check_finite": False, "patience": 3}, 3, "val/loss has not improved on 5 for 3 reports"),
    ([NAN, NAN], {"check_finite": False, "patience": 2}, 1, "val/loss has not improved on inf for 2 reports"),
    ([-INF, -INF], {"check_finite": False, "patience": 1}, 1, "val/loss has not improved on -inf for 1 report"),
    ([5, 4, 3, 2], {"patience": 1}, None, ""),
]

values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, NAN, INF, -INF]), st.floats(-4, 4, width=32))
rules = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "patience": st.integers(1, 5),
        "min_delta": st.sampled_from([0.0, 0.1, 1.0]),
        "threshold": st.sampled_from([None, -3.0, 3.0]),
        "divergence": st.sampled_from([None, -2.0, 2.0]),
        "check_finite": st.booleans(),
    }
)


def _lightning(early_stopping, series, rule):
    """At which report theirs stops, with its best and its count there."""
    names = {"threshold": "stopping_threshold", "divergence": "divergence_threshold"}
    theirs = early_stopping("val/loss", **{names.get(name, name): value for name, value in rule.items()})
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, **_: decision)
    trainer = SimpleNamespace(fast_dev_run=False, should_stop=False, strategy=strategy, current_epoch=0)
    for i, value in enumerate(series):
        trainer.callback_metrics = {"val/loss": torch.tensor(value, dtype=torch.float64)}
        theirs._run_early_stopping_check(trainer)
        if trainer.should_stop:
            return i, float(theirs.best_score), theirs.wait_count
    return None, float(theirs.best_score), theirs.wait_count


def _ours(series, rule):
    """The same for ours, and the reason."""
    mine, reasons = EarlyStop(monitor="val/loss", **rule), []
    for i, value in enumerate(series):
        mine.on_log(CallbackContext(Clock(step=i + 1), None, {"val/loss": value}, stop=reasons.append))
        if reasons:
            break
    memory = mine.state_dict()
    return (i if reasons else None), float(memory["best"]), memory["bad"], "".join(reasons)


@pytest.mark.parametrize(("series", "rule", "at", "reason"), TABLE)
def test_recorded_decisions(series, rule, at, reason):
    found, _, _, said = _ours(series, rule)
    assert (found, said) == (at, reason)


@pytest.fixture(scope="module")
def early_stopping():
    pytest.importorskip("lightning", reason="the bench extra is not installed", exc_type=ImportError)
    from lightning.pytorch.callbacks import EarlyStopping

    return EarlyStopping


@pytest.mark.parametrize(("series", "rule", "at"), [row[:3] for row in TABLE])
def test_the_record_is_lightnings(early_stopping, series, rule, at):
    assert _lightning(early_stopping, series, rule)[0] == at


@given(rule=rules, series=st.lists(values, min_size=1, max_size=40))
def test_every_decision_is_lightnings(early_stopping, rule, series):
    assert _ours(series, rule)[:3] == _lightning(early_stopping, series, rule)
