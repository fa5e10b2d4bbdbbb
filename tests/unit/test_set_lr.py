"""with_learning_rate: the step it gives is that of an optimizer built with that learning rate."""

import pytest
import torch

import lumen as lm
from lumen.errors import HyperparameterError
from lumen.optim import learning_rate
from lumen.optim._with_learning_rate import with_learning_rate

optim = lm.optim
MAKE = {
    "sgd": optim.sgd,
    "adamw": optim.adamw,
    "chain": lambda lr: optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(lr, weight_decay=0.1)),
    "parts": lambda lr: optim.chain(optim.scale_by_adam(), optim.scale_by_learning_rate(lr)),
    "partition": lambda lr: optim.partition({"w": optim.lion(lr)}, optim.sgd(lr, momentum=0.9)),
    "schedule_free": lambda lr: optim.schedule_free(optim.adamw(lr, betas=(0.0, 0.999))),
    "lookahead": lambda lr: optim.lookahead(optim.sgd(lr), 2, 0.5),
    "finite": lambda lr: optim.apply_if_finite(optim.sgd(lr), 3),
    "plateau": lambda lr: optim.chain(optim.sgd(lr), optim.reduce_on_plateau()),
    "torch": lambda lr: optim.from_torch(torch.optim.Adamax, lr=lr),
}


@pytest.mark.parametrize("name", MAKE)
def test_it_is_the_optimizer_with_that_learning_rate(name):
    params, grads = ({"w": torch.randn(3, 2), "b": torch.randn(3)} for _ in range(2))
    tx, other = MAKE[name](0.5), MAKE[name](0.03)
    old = tx.init(params)
    opt_state, expected = with_learning_rate(old, 0.03), other.init(params)
    assert learning_rate(old).item() == 0.5
    assert learning_rate(opt_state).item() == 0.03
    mine, theirs = params, params
    for _ in range(3):
        mine, opt_state = tx.apply(grads, opt_state, mine)
        theirs, expected = other.apply(grads, expected, theirs)
    assert all(torch.equal(mine[k], theirs[k]) for k in params)


def test_a_whole_state_and_all_of_its_learning_rates():
    tx = optim.partition({"weight": optim.sgd(0.1)}, optim.sgd(0.2))
    state = lm.TrainState.create(torch.nn.Linear(2, 1), tx)
    new = with_learning_rate(state, torch.tensor(0.7))
    rates = [t for path, t in lm.tree.named_tensors(new) if path.endswith("hparams[lr]")]
    assert [round(float(t), 6) for t in rates] == [0.7, 0.7]
    assert rates[0].data_ptr() != rates[1].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(new.params.values(), state.params.values(), strict=True))


def test_lanes_and_dtypes_are_kept():
    lanes = lm.ensemble(3).init(lm.TrainState.create(torch.nn.Linear(2, 1), optim.sgd(0.1)))
    old, new = learning_rate(lanes.opt_state), learning_rate(with_learning_rate(lanes, 0.5).opt_state)
    assert new.tolist() == [0.5] * 3
    assert (new.dtype, new.device) == (old.dtype, old.device)


def test_what_is_refused():
    params = {"w": torch.ones(2)}
    with pytest.raises(HyperparameterError, match="is a schedule"):
        with_learning_rate(optim.adamw(optim.cosine(0.1, 10)).init(params), 0.1)
    with pytest.raises(HyperparameterError, match="no learning rate"):
        with_learning_rate(optim.scale_by_adam().init(params), 0.1)
