"""lr_find: it sweeps as it says, suggests what trains, ends in time, and leaves everything as it was."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lumen as lm
from lumen.errors import BatchError, HyperparameterError, StepError
from lumen.optim import learning_rate
from lumen.train.lr_find import LRFinderResult, _steepest, lr_find
from tests import zygote

EAGER = lm.compile(backend="eager")


def make_step(loss=lambda out, batch: F.mse_loss(out, batch["y"])):
    def step(state, batch):
        def loss_fn(params, batch):
            return loss(state.apply(params, batch["x"])[0], batch)

        value, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": value}

    return step


def state_of(tx=None, net=None):
    return lm.TrainState.create(net or nn.Linear(3, 1), tx or lm.optim.sgd(0.1))


def batches(n=20):
    w = torch.tensor([[1.0], [-2.0], [0.5]])
    xs = torch.randn(n, 16, 3)
    return [{"x": x, "y": x @ w} for x in xs]


def scripted(losses):
    """A step whose losses are given, whatever the learning rate."""
    left = iter(losses)

    def step(state, batch):
        return state.replace(step=state.step + 1), {"loss": torch.tensor(next(left), dtype=torch.float64)}

    return step


def test_it_sweeps_the_learning_rate_in_equal_factors():
    rates = []

    def step(state, batch):
        rates.append(float(learning_rate(state.opt_state)))
        return make_step()(state, batch)

    found = lr_find(step, state_of(), batches(), low=1e-5, high=1e-1, steps=41)
    assert rates == pytest.approx(found.lrs, rel=1e-12)
    assert (rates[0], rates[-1]) == (pytest.approx(1e-5), pytest.approx(1e-1))
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([10 ** (1 / 10)] * 40)
    assert found.reason == "all 41 steps are complete"


def test_losses_are_those_of_a_loop_by_hand():
    state, data = state_of(), batches()
    found = lr_find(make_step(), state, data, low=1e-4, high=1e-2, steps=12, smoothing=0.5)
    net = nn.Linear(3, 1)
    net.load_state_dict(state.params)
    losses = []
    for lr, batch in zip(found.lrs, data, strict=False):
        losses.append(F.mse_loss(net(batch["x"]), batch["y"]))
        grads = torch.autograd.grad(losses[-1], list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p -= lr * g
    losses = [x.item() for x in losses]
    assert found.losses == pytest.approx(losses)
    weights = [[0.5 ** (n - i) for i in range(n + 1)] for n in range(12)]
    means = [sum(w * x for w, x in zip(ws, losses, strict=False)) / sum(ws) for ws in weights]
    assert found.smoothed == pytest.approx(means)


@pytest.mark.parametrize(
    ("make", "low", "high"),
    # The rates with which training works, found by training with each.
    [(lm.optim.sgd, 0.1, 2.0), (lambda lr: lm.optim.sgd(lr, momentum=0.9), 0.01, 0.5), (lm.optim.adamw, 2e-3, 0.1)],
    ids=["sgd", "momentum", "adamw"],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_suggestion_trains_a_classifier(make, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(10, 32, generator=generator)
    labels = torch.randint(0, 10, (50, 64), generator=generator)
    data = [{"x": centers[y] + torch.randn(64, 32, generator=generator), "y": y} for y in labels]
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    step = make_step(lambda out, batch: F.cross_entropy(out, batch["y"]))
    found = lr_find(step, state_of(make(1.0), net), data)
    assert low < found.suggestion < high
    state = state_of(make(found.suggestion), net)
    for batch in data * 2:
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.3 < found.losses[0]


@given(st.integers(1, 10), st.integers(0, 40), st.floats(0.5, 3.0))
def test_the_steepest_point_of_a_fall_is_its_middle(reach, shift, width):
    # A logistic fall centered at 40 + shift, its plateau, then a blow-up with a second fall.
    center = 40 + shift
    losses = [1 / (1 + math.exp((i - center) / width)) for i in range(center + 30)] + [50.0, 40.0, 20.0, 5.0, 1.0] * 4
    smoothed = losses[: center + 30] + [60.0] * 20
    assert abs(_steepest(losses, smoothed, reach) - center) <= 1


def test_no_suggestion_where_the_loss_does_not_fall_or_there_is_too_little():
    rising = lr_find(scripted(1.0 + 0.01 * i for i in range(100)), state_of(), [None])
    assert rising.suggestion is None
    assert "suggestion=None" in repr(rising)
    short = lr_find(scripted([3.0, 2.0, math.nan]), state_of(), [None])
    assert (short.index, len(short.lrs)) == (None, 2)


def test_it_ends_where_the_loss_diverges():
    found = lr_find(scripted([1.0] * 30 + [1000.0] * 70), state_of(), [None], smoothing=0.5)
    assert len(found.lrs) == 31
    assert found.reason == f"the loss diverged at a learning rate of {found.lrs[-1]:.3g}"
    assert len(lr_find(scripted([1.0] * 30 + [1000.0] * 70), state_of(), [None], diverge=None).lrs) == 100


def test_a_negative_loss_may_fall_and_a_rise_by_as_much_ends_it():
    falling = lr_find(scripted(-1.0 - 0.1 * i for i in range(100)), state_of(), [None], smoothing=0.0)
    assert len(falling.lrs) == 100
    found = lr_find(scripted([-1.0] * 20 + [1.9, 2.1] * 40), state_of(), [None], smoothing=0.0)
    assert len(found.lrs) == 22


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_it_ends_where_the_loss_is_not_finite(bad):
    found = lr_find(scripted([1.0] * 30 + [bad]), state_of(), [None])
    assert len(found.lrs) == 30
    assert "the loss was not finite at a learning rate of" in found.reason
    assert all(map(math.isfinite, found.smoothed))


def test_what_guard_raises_ends_it():
    data = batches()
    data[5]["x"] = data[5]["x"] * math.nan
    found = lr_find(lm.guard("raise")(make_step()), lm.guard("raise").init(state_of()), data)
    assert len(found.lrs) == 5
    assert "not finite" in found.reason


@pytest.mark.parametrize(
    "wrap",
    [lambda step: step, lm.donate(), EAGER, lambda step: EAGER(lm.donate()(step)), lm.accumulate(2)],
    ids=["plain", "donate", "compile", "compile_donate", "accumulate"],
)
def test_the_state_and_the_generators_stay_as_they_were(wrap):
    def step(state, batch):
        return make_step()(state, {**batch, "y": batch["y"] + 0.01})

    wrapped = wrap(step)
    state = state_of(lm.optim.adamw(1e-3))
    state = getattr(wrapped, "init", lambda state: state)(state)
    before, data = lm.tree.map(torch.clone, state), batches()
    torch.rand(1)
    generator = torch.get_rng_state()
    found = lr_find(wrapped, state, data)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip(lm.tree.leaves(before), lm.tree.leaves(state), strict=True))
    assert found.losses == pytest.approx(lr_find(step, before, data).losses, rel=1e-4)
    wrapped(state, data[0])  # it can be used still


def test_dropout_draws_are_put_back():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    generator = torch.get_rng_state()
    data = batches()
    torch.set_rng_state(generator)
    lr_find(make_step(), state_of(net=net), data)
    assert torch.equal(torch.get_rng_state(), generator)


def test_batches_are_iterated_again_and_a_generator_once():
    data = batches(7)
    assert len(lr_find(make_step(), state_of(), data, high=1e-2).lrs) == 100
    found = lr_find(make_step(), state_of(), iter(data))
    assert (len(found.lrs), found.reason) == (7, "the batches ended")
    taken = []
    lr_find(make_step(), state_of(), (taken.append(1) or batch for batch in batches(30)), steps=12, high=1e-2)
    assert len(taken) == 12  # none is taken in vain


def test_a_loader_and_a_typed_metric_of_another_name():
    def step(state, batch):
        state, metrics = make_step()(state, batch)
        return state, {"nll": lm.Mean.of(metrics["loss"].expand(3))}

    w, x = torch.tensor([[1.0], [-2.0], [0.5]]), torch.randn(40, 3)
    loader = lm.Loader({"x": x, "y": x @ w}, batch_size=8, seed=0)
    assert lr_find(step, state_of(), loader, metric="nll").suggestion is not None
    with pytest.raises(StepError, match=r"'loss'.*'nll'"):
        lr_find(step, state_of(), loader)


def test_the_plot_is_an_image_and_leaves_the_backend_alone(tmp_path):
    code = (
        "import sys; from lumen.train.lr_find import LRFinderResult;"
        "LRFinderResult((1e-3, 1e-2, 1e-1), (2., 1., 3.), (2., 1.5, 2.), 1, 'x').plot(sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    path = tmp_path / "lr.png"
    assert zygote.run([sys.executable, "-c", code, str(path)], bare=True).returncode == 0
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    other = tmp_path / "other.svg"
    lr_find(make_step(), state_of(), batches(), plot=other)
    assert "<svg" in other.read_text()


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        LRFinderResult((1.0,), (1.0,), (1.0,), None, "").plot(tmp_path / "lr.png")


def test_what_is_refused():
    with pytest.raises(HyperparameterError, match="is a schedule"):
        lr_find(make_step(), state_of(lm.optim.sgd(lm.optim.cosine(0.1, 10))), batches())
    with pytest.raises(BatchError, match="no batch"):
        lr_find(make_step(), state_of(), [])
    members = lm.ensemble(2)
    with pytest.raises(StepError, match=r"one number for 'loss', not \[2\]"):
        lr_find(members(make_step()), members.init(state_of()), batches())


@pytest.mark.parametrize(
    "rule",
    [
        {"low": 0.0},
        {"low": math.nan},
        {"high": 1e-8},
        {"high": 1e-7},
        {"steps": 9},
        {"smoothing": 1.0},
        {"diverge": 1.0},
    ],
)
def test_bad_values_are_refused(rule):
    with pytest.raises(HyperparameterError, match=next(iter(rule))):
        lr_find(make_step(), state_of(), batches(), **rule)
