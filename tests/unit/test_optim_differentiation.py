"""Meta-gradients: derivatives through updates, against finite differences in float64."""

import pytest
import torch

from lumen import optim

OPTIMIZERS = {
    "sgd": lambda lr: optim.sgd(lr, 0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda lr: optim.adamw(lr, (0.8, 0.9)),
    "adam eps_root": lambda lr: optim.adam(lr, eps_root=1e-3, amsgrad=True),
    "rmsprop": lambda lr: optim.rmsprop(lr, 0.9, momentum=0.5),
    "adagrad": lambda lr: optim.adagrad(lr, lr_decay=0.1),
    "radam": lambda lr: optim.radam(lr, (0.8, 0.9)),
    "lamb": lambda lr: optim.lamb(lr, weight_decay=0.1),
    "lookahead": lambda lr: optim.lookahead(optim.adam(lr), period=2),
    "schedule_free": lambda lr: optim.schedule_free(optim.sgd(lr)),
    "scheduled": lambda lr: optim.adamw(optim.cosine(lr, 10)),
    "clipped": lambda lr: optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(lr)),
    "partition": lambda lr: optim.partition({"w": optim.adamw(lr)}, optim.sgd(lr)),
}


def after_training(make, start, lr):
    """A loss after six updates whose gradients depend on where the params are."""
    tx = make(lr)
    params = {"w": start[:3], "b": start[3:]}
    opt_state = tx.init(params)
    for _ in range(6):
        grads = {"w": torch.sin(params["w"]) + params["b"].sum(), "b": params["b"] ** 3 - 1}
        params, opt_state = tx.apply(grads, opt_state, params)
    return (params["w"] ** 2).sum() + params["b"].prod()


def finite_difference(fn, x, step=1e-5):
    slopes = torch.zeros_like(x)
    for i in range(x.numel()):
        nudge = torch.zeros_like(x).view(-1)
        nudge[i] = step
        nudge = nudge.view_as(x)
        slopes.view(-1)[i] = (fn(x + nudge) - fn(x - nudge)) / (2 * step)
    return slopes


@pytest.mark.parametrize("engine", ["func", "autograd"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradient_is_the_finite_difference(name, engine):
    make = OPTIMIZERS[name]
    start = torch.tensor([0.5, -1.0, 2.0, 0.7, 1.3], dtype=torch.float64)
    lr = torch.tensor(0.05, dtype=torch.float64)
    by_start = finite_difference(lambda x: after_training(make, x, lr), start)
    by_lr = finite_difference(lambda x: after_training(make, start, x), lr)
    if engine == "func":
        found = torch.func.grad(lambda x, rate: after_training(make, x, rate), argnums=(0, 1))(start, lr)
    else:
        inputs = start.clone().requires_grad_(), lr.clone().requires_grad_()
        found = torch.autograd.grad(after_training(make, *inputs), inputs)
    torch.testing.assert_close(found[0], by_start, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1], by_lr, rtol=1e-6, atol=1e-8)
    assert by_lr.abs() > 1e-6


def test_learning_rate_alone_can_be_differentiated():
    """Neither params nor grads ask for gradients here, so only the state tells that the fused kernels must not run."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for tx in (
        optim.adamw(lr),
        optim.sgd(lr, 0.9),
        optim.adagrad(lr),
        optim.lion(lr),
        optim.rmsprop(lr),
        optim.sgd(optim.cosine(lr, 9)),
    ):
        params = {"w": torch.ones(3, dtype=torch.float64)}
        new, _ = tx.apply({"w": torch.ones(3, dtype=torch.float64)}, tx.init(params), params)
        (slope,) = torch.autograd.grad(new["w"].sum(), lr)
        assert slope < -1


def test_eps_root_keeps_the_meta_gradient_finite_where_a_gradient_is_zero():
    def trained(start, eps_root):
        tx = optim.adam(0.1, eps_root=eps_root)
        params, _ = tx.apply({"w": start * 0.0}, tx.init({"w": start}), {"w": start})
        return params["w"].sum()

    start = torch.ones(2, dtype=torch.float64)
    assert torch.func.grad(trained)(start, 0.0).isnan().any()
    assert torch.func.grad(trained)(start, 1e-8).isfinite().all()
