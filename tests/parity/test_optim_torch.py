"""Fifty steps beside `torch.optim`: the fused lowering bitwise, the plain lowering in float64 to 1e-10."""

from functools import partial

import pytest
import torch

import lumen as lm
from lumen import optim

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "b.weight": (4, 3, 2, 2), "b.gain": ()}
MATRICES = {"a.weight": (5, 3), "b.weight": (3, 6), "c.weight": (4, 4)}


def tensors(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in shapes.items()}


def largest_difference(tx, make_torch, *, dtype, shapes=SHAPES, steps=50, schedule=None):
    """The largest difference between params after each of `steps` steps of both."""
    params = tensors(shapes, dtype, 0)
    theirs = {name: p.clone().requires_grad_() for name, p in params.items()}
    torch_optimizer = make_torch(list(theirs.values()))
    scheduler = schedule(torch_optimizer) if schedule else None
    opt_state = tx.init(params)
    worst = 0.0
    for step in range(steps):
        grads = tensors(shapes, dtype, step + 1)
        params, opt_state = tx.apply(grads, opt_state, params)
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        torch_optimizer.step()
        if scheduler:
            scheduler.step()
        worst = max(worst, *((params[name] - p).abs().max().item() for name, p in theirs.items()))
    assert int(opt_state.count) == steps
    return worst


def plain(tx):
    return optim.GradientTransformation(tx.init_fn, tx.update_fn)


FUSED = {
    "adamw": (optim.adamw(1e-2, weight_decay=0.1), partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)),
    "adamw amsgrad": (
        optim.adamw(1e-2, (0.8, 0.99), 1e-6, amsgrad=True),
        partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, amsgrad=True),
    ),
    "adam": (optim.adam(1e-2), partial(torch.optim.Adam, lr=1e-2)),
    "adam decay": (
        optim.adam(1e-2, weight_decay=0.1, amsgrad=True),
        partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1, amsgrad=True),
    ),
    "sgd": (optim.sgd(1e-1), partial(torch.optim.SGD, lr=1e-1)),
    "sgd momentum": (optim.sgd(1e-1, 0.9), partial(torch.optim.SGD, lr=1e-1, momentum=0.9)),
    "sgd nesterov decay": (
        optim.sgd(1e-1, 0.9, nesterov=True, weight_decay=0.01),
        partial(torch.optim.SGD, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "sgd dampening": (
        optim.sgd(1e-1, 0.9, dampening=0.3, weight_decay=0.01),
        partial(torch.optim.SGD, lr=1e-1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    ),
    "adagrad": (optim.adagrad(1e-1), partial(torch.optim.Adagrad, lr=1e-1)),
    "adagrad decays": (
        optim.adagrad(1e-1, lr_decay=0.1, weight_decay=0.01, initial_accumulator=0.5, eps=1e-6),
        partial(torch.optim.Adagrad, lr=1e-1, lr_decay=0.1, weight_decay=0.01, initial_accumulator_value=0.5, eps=1e-6),
    ),
}


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_lowering_is_bitwise_torch_fused(case, dtype):
    tx, make = FUSED[case]
    assert largest_difference(tx, partial(make, fused=True), dtype=dtype) == 0.0


@pytest.mark.parametrize("case", FUSED)
def test_fused_lowering_of_16_bit_params_is_torch_in_float32_rounded_once(case):
    """Torch's own 16-bit kernels keep moments in 16 bits, and SGD's skips most entries on the CPU."""
    tx, make = FUSED[case]
    dtypes = {"a.weight": torch.bfloat16, "a.bias": torch.float16, "b.weight": torch.float16, "b.gain": torch.bfloat16}
    params = {name: p.to(dtypes[name]) for name, p in tensors(SHAPES, torch.float32, 0).items()}
    theirs = {name: p.float().requires_grad_() for name, p in params.items()}
    torch_optimizer, opt_state = make(list(theirs.values()), fused=True), tx.init(params)
    for step in range(10):
        grads = {name: g.to(dtypes[name]) for name, g in tensors(SHAPES, torch.float32, step + 1).items()}
        params, opt_state = tx.apply(grads, opt_state, params)
        for name, p in theirs.items():
            p.grad = grads[name].float()
        torch_optimizer.step()
        for name, p in theirs.items():
            p.data.copy_(p.data.to(dtypes[name]))
            assert torch.equal(params[name], p.to(dtypes[name])), (name, step)


PLAIN = FUSED | {
    "rmsprop": (optim.rmsprop(1e-2), partial(torch.optim.RMSprop, lr=1e-2)),
    "rmsprop all": (
        optim.rmsprop(1e-2, 0.9, momentum=0.8, centered=True, weight_decay=0.1, eps=1e-5),
        partial(torch.optim.RMSprop, lr=1e-2, alpha=0.9, momentum=0.8, centered=True, weight_decay=0.1, eps=1e-5),
    ),
    "nadam": (optim.nadam(1e-2), partial(torch.optim.NAdam, lr=1e-2)),
    "nadam decay": (optim.nadam(1e-2, weight_decay=0.1), partial(torch.optim.NAdam, lr=1e-2, weight_decay=0.1)),
    "nadam decoupled": (
        optim.nadam(1e-2, weight_decay=0.1, decoupled=True, momentum_decay=0.01),
        partial(torch.optim.NAdam, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True, momentum_decay=0.01),
    ),
    "radam": (optim.radam(1e-2), partial(torch.optim.RAdam, lr=1e-2)),
    "radam decay": (optim.radam(1e-2, weight_decay=0.1), partial(torch.optim.RAdam, lr=1e-2, weight_decay=0.1)),
    "radam decoupled": (
        optim.radam(1e-2, (0.8, 0.9), weight_decay=0.1, decoupled=True),
        partial(torch.optim.RAdam, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "adafactor": (optim.adafactor(1e-1), partial(torch.optim.Adafactor, lr=1e-1)),
    "adafactor all": (
        optim.adafactor(1e-1, -0.7, (1e-10, 1e-2), 1.5, 0.1),
        partial(torch.optim.Adafactor, lr=1e-1, beta2_decay=-0.7, eps=(1e-10, 1e-2), d=1.5, weight_decay=0.1),
    ),
}


@pytest.fixture
def float64_default():
    """Torch keeps NAdam's scalars in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_default")
@pytest.mark.parametrize("case", PLAIN)
def test_plain_lowering_is_torch_to_1e_10(case):
    tx, make = PLAIN[case]
    assert largest_difference(plain(tx), partial(make, foreach=False), dtype=torch.float64) < 1e-10


@pytest.mark.parametrize("case", [name for name in PLAIN if not name.startswith(("sgd", "adagrad"))])
def test_plain_lowering_in_bfloat16_is_torch_in_float32_to_its_resolution(case):
    """Half types are computed in float32, so that only what is kept is rounded."""
    tx, make = PLAIN[case]
    params = {name: p.bfloat16() for name, p in tensors(SHAPES, torch.float32, 0).items()}
    theirs = {name: p.float().requires_grad_() for name, p in params.items()}
    torch_optimizer, opt_state = make(list(theirs.values()), foreach=False), tx.init(params)
    for step in range(3):
        grads = {name: g.bfloat16() for name, g in tensors(SHAPES, torch.float32, step + 1).items()}
        params, opt_state = plain(tx).apply(grads, opt_state, params)
        for name, p in theirs.items():
            p.grad = grads[name].float()
        torch_optimizer.step()
    for name, p in theirs.items():
        assert params[name].dtype is torch.bfloat16
        torch.testing.assert_close(params[name].float(), p.detach(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torch_muon(adjust, nesterov):
    """To 1e-5 in float32: both orthogonalise in bfloat16, in the same order of operations."""
    tx = optim.muon(0.02, 0.9, 0.05, nesterov=nesterov, adjust_lr=adjust)
    make = partial(torch.optim.Muon, lr=0.02, momentum=0.9, weight_decay=0.05, nesterov=nesterov, adjust_lr_fn=adjust)
    assert largest_difference(tx, make, dtype=torch.float32, shapes=MATRICES) < 1e-5


def test_muon_beside_adamw_for_what_is_no_matrix():
    tx = optim.partition({"*.weight": optim.muon(0.02)}, default=optim.adamw(3e-4))
    params = tensors(MATRICES | {"a.bias": (5,)}, torch.float32, 0)
    new, _ = tx.apply(tensors(MATRICES | {"a.bias": (5,)}, torch.float32, 1), tx.init(params), params)
    muon = optim.muon(0.02)
    matrices = {name: p for name, p in params.items() if name != "a.bias"}
    grads = tensors(MATRICES | {"a.bias": (5,)}, torch.float32, 1)
    alone, _ = muon.apply({name: grads[name] for name in matrices}, muon.init(matrices), matrices)
    assert all(torch.equal(new[name], alone[name]) for name in matrices)


def test_scheduled_learning_rate_is_torch_scheduler_over_fused_adamw():
    """Bitwise up to the schedule's own rounding in float64, which float32 params hardly ever see."""
    tx = optim.adamw(optim.cosine(1e-2, 50))
    difference = largest_difference(
        tx,
        partial(torch.optim.AdamW, lr=1e-2, fused=True),
        dtype=torch.float32,
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50),
    )
    assert difference < 1e-6


def test_fused_lowering_works_on_gradients_of_any_layout():
    """Torch's own kernel misreads them: it walks memory as if all tensors had the params' strides."""
    params = {"w": torch.randn(4, 3)}
    grad = torch.randn(3, 4)
    for strided in (grad.t(), grad[:1, :1].expand(4, 3)):
        for tx in (optim.adamw(0.1), optim.sgd(0.1, 0.9), optim.adagrad(0.1), optim.rmsprop(0.1), optim.lion(0.1)):
            found, _ = tx.apply({"w": strided}, tx.init(params), params)
            expected, _ = tx.apply({"w": strided.contiguous()}, tx.init(params), params)
            assert torch.equal(found["w"], expected["w"])


def test_fused_lowering_gives_way_for_params_of_another_layout():
    base = torch.randn(3, 4)
    grads = {"w": torch.randn(4, 3)}
    for tx in (optim.adamw(0.1), optim.sgd(0.1), optim.rmsprop(0.1)):
        found, opt_state = tx.apply(grads, tx.init({"w": base.t()}), {"w": base.t()})
        expected, _ = tx.apply(grads, tx.init({"w": base.t().contiguous()}), {"w": base.t().contiguous()})
        torch.testing.assert_close(found["w"], expected["w"], rtol=1e-6, atol=1e-6)
        assert lm.tree.structure(opt_state) == lm.tree.structure(tx.init({"w": base}))
