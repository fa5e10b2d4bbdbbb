"""Bad input ends in a clear error at the earliest point."""

import math
import re

import pytest
import torch

import lumen as lm
from lumen import optim
from lumen.errors import HyperparameterError, ParamsError

NAN = math.nan


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.adamw(NAN),
        lambda: optim.adamw(-1e-3),
        lambda: optim.adamw(math.inf),
        lambda: optim.adamw("fast"),
        lambda: optim.adamw(torch.tensor(NAN)),
        lambda: optim.adamw(torch.tensor(-1.0)),
        lambda: optim.adamw(torch.ones(3)),
        lambda: optim.adamw(torch.tensor(1)),
        lambda: optim.adamw(0.1, (1.0, 0.999)),
        lambda: optim.adamw(0.1, (0.9, -0.1)),
        lambda: optim.adamw(0.1, (0.9, NAN)),
        lambda: optim.adamw(0.1, (lambda count: 0.9, 0.999)),
        lambda: optim.adamw(0.1, eps=-1e-8),
        lambda: optim.adamw(0.1, weight_decay=NAN),
        lambda: optim.adam(0.1, eps_root=-1.0),
        lambda: optim.sgd(NAN),
        lambda: optim.sgd(0.1, momentum=1.0),
        lambda: optim.sgd(0.1, nesterov=True),
        lambda: optim.sgd(0.1, 0.9, nesterov=True, dampening=0.1),
        lambda: optim.sgd(0.1, 0.9, dampening=1.5),
        lambda: optim.lion(0.1, (0.9, 1.0)),
        lambda: optim.rmsprop(0.1, alpha=1.0),
        lambda: optim.adagrad(0.1, lr_decay=-1.0),
        lambda: optim.adagrad(0.1, initial_accumulator=NAN),
        lambda: optim.adafactor(0.1, beta2_decay=0.5),
        lambda: optim.adafactor(0.1, clip_threshold=0.5),
        lambda: optim.adafactor(0.1, eps=(-1.0, 1e-3)),
        lambda: optim.nadam(-1.0),
        lambda: optim.radam(0.1, (0.9, 2.0)),
        lambda: optim.lamb(NAN),
        lambda: optim.muon(0.1, momentum=1.0),
        lambda: optim.muon(0.1, adjust_lr="none"),
        lambda: optim.lookahead(optim.sgd(0.1), period=0),
        lambda: optim.lookahead(optim.sgd(0.1), slow_step=1.5),
        lambda: optim.schedule_free(optim.sgd(0.1), beta=0.0),
        lambda: optim.schedule_free(optim.sgd(0.1), beta=1.0),
        lambda: optim.apply_if_finite(optim.sgd(0.1), -1),
        lambda: optim.clip_by_global_norm(-1.0),
        lambda: optim.clip_by_value(NAN),
        lambda: optim.trace(1.0),
        lambda: optim.scale(NAN),
        lambda: optim.scale_by_learning_rate(-1.0),
        lambda: optim.add_decayed_weights(-0.1),
        lambda: optim.constant(NAN),
    ],
)
def test_bad_hyperparameters_are_refused_at_construction(make):
    with pytest.raises(HyperparameterError, match=r"is not allowed|must be|needs momentum"):
        make()


def test_messages_name_what_was_given_and_what_is_allowed():
    with pytest.raises(HyperparameterError, match=re.escape("lr=nan is not allowed: give a number in [0, inf)")):
        optim.adamw(NAN)
    with pytest.raises(HyperparameterError, match=re.escape("beta1=1.0 is not allowed: give a number in [0, 1)")):
        optim.adamw(0.1, (1.0, 0.999))
    with pytest.raises(HyperparameterError, match=re.escape("lm.sweep(lr=values)(step)")):
        optim.adamw(torch.ones(3))


def test_allowed_edges():
    optim.adamw(0.0, (0.0, 0.0), eps=0.0, weight_decay=0.0)
    optim.scale(-1.0)
    optim.lookahead(optim.sgd(1), period=1, slow_step=1.0)


@pytest.mark.parametrize(
    "make", [lambda: optim.adamw(0.1), lambda: optim.chain(optim.sgd(0.1)), lambda: optim.freeze()]
)
def test_integer_params_are_refused_at_init(make):
    with pytest.raises(ParamsError, match=r"params\['steps'\] is torch.int64"):
        make().init({"w": torch.ones(2), "steps": torch.tensor(1)})


def test_muon_is_for_matrices():
    with pytest.raises(ParamsError, match=r"'conv' has shape \(2, 3, 3, 3\).*partition"):
        optim.muon(0.1).init({"w": torch.ones(2, 2), "conv": torch.ones(2, 3, 3, 3)})


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_muon_leaves_empty_matrices_empty(shape):
    tx = optim.muon(0.02)
    params = {"w": torch.zeros(shape), "v": torch.ones(2, 3)}
    for donate in (False, True):
        new, _ = tx.apply(lm.tree.map(torch.ones_like, params), tx.init(params), params, donate=donate)
        assert new["w"].shape == shape
        assert new["v"].isfinite().all()


def test_no_params_are_refused():
    with pytest.raises(ParamsError, match="nothing to train"):
        optim.adamw(0.1).init({})


@pytest.mark.parametrize("grads", [{"w": torch.ones(2)}, {"w": torch.ones(2), "c": torch.ones(2)}])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adagrad"])
def test_grads_of_another_structure_are_refused(name, grads):
    params = {"w": torch.ones(2), "b": torch.ones(2)}
    tx = getattr(optim, name)(0.1)
    before = lm.tree.map(torch.clone, params)
    with pytest.raises(ParamsError, match="missing b"):
        tx.apply(grads, tx.init(params), params, donate=True)
    assert all(torch.equal(before[key], params[key]) for key in params)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adagrad", "nadam"])
def test_grads_of_another_shape_are_refused(name):
    """Torch's fused kernels would read beyond the end of the smaller tensor."""
    params = {"w": torch.ones(4), "b": torch.ones(2)}
    tx = getattr(optim, name)(0.1)
    with pytest.raises(ParamsError, match=re.escape("gradient of 'w' has shape (1,) where the parameter has (4,)")):
        tx.apply({"w": torch.ones(1), "b": torch.ones(2)}, tx.init(params), params)


def test_a_state_of_another_shape_is_refused():
    tx = optim.adamw(0.1)
    with pytest.raises(RuntimeError, match="size"):
        tx.apply({"w": torch.ones(4)}, tx.init({"w": torch.ones(2)}), {"w": torch.ones(4)})


def test_a_mistaken_learning_rate_in_the_state_is_not_read_as_zero():
    """A NaN that is written into the state later shows in the params, it is not swallowed."""
    tx, params = optim.sgd(0.1), {"w": torch.ones(2)}
    opt_state = tx.init(params).replace(hparams={"lr": torch.tensor(NAN, dtype=torch.float64)})
    assert tx.apply({"w": torch.ones(2)}, opt_state, params)[0]["w"].isnan().all()
