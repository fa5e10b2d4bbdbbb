"""Models that recompute, and losses that take derivatives themselves, each beside its loop in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lumen as lm

from .cases import Case, Form, params_of, sgd_step, torch_loop

SUPPORT = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)


class Net(nn.Module):
    """Three blocks, of which `recompute(self, h)` runs the middle ones."""

    def __init__(self, recompute: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.inward = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)])
        self.outward = nn.Linear(6, 2)
        self.recompute = recompute

    def middle(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inward(x))
        return self.outward(self.middle(h) if self.recompute is None else self.recompute(self, h))  # type: ignore[no-any-return]


def each_block(net: Net, h: Tensor) -> Tensor:
    for block in net.blocks:
        h = checkpoint(block, h, use_reentrant=False)
    return h


def each_block_reentrant(net: Net, h: Tensor) -> Tensor:
    for block in net.blocks:
        h = checkpoint(block, h, use_reentrant=True)
    return h


def all_at_once(net: Net, h: Tensor) -> Tensor:
    return checkpoint(lambda h: net.middle(h) @ net.inward.weight @ net.inward.weight.T, h, use_reentrant=False)  # type: ignore[no-any-return]


def nested(net: Net, h: Tensor) -> Tensor:
    return checkpoint(lambda h: each_block(net, h), h, use_reentrant=False)  # type: ignore[no-any-return]


def segments(net: Net, h: Tensor) -> Tensor:
    return checkpoint_sequential(net.blocks, 2, h, use_reentrant=False)  # type: ignore[no-any-return]


class Forces(Net):
    """A model that differentiates its own output in its input."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        energy = super().forward(x)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, slope], 1)


Apply = Callable[[Any, Tensor], Tensor]  # of params, and of rows


def squares(apply: Apply, params: Any, x: Tensor) -> Tensor:
    return apply(params, x).square().sum(1)


def penalty(apply: Apply, params: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(apply(params, x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square()


def laplacian(apply: Apply, params: Any, x: Tensor) -> Tensor:
    x.requires_grad_()
    (slope,) = torch.autograd.grad(apply(params, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return second.square().sum(1)


def adversarial(apply: Apply, params: Any, x: Tensor) -> Tensor:
    near = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(squares(apply, params, near).sum(), near, retain_graph=True)
    return squares(apply, params, x + 0.1 * slope)


def func_grad(apply: Apply, params: Any, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: apply(params, x).sum())(x).square().sum(1)


def func_hessian(apply: Apply, params: Any, x: Tensor) -> Tensor:
    second = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda row: apply(params, row[None])[0, 0])))
    return second(x).square().sum((1, 2))


def func_vmap(apply: Apply, params: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: apply(params, row[None])[0])(x).square().sum(1)


def adapted(apply: Apply, params: Any, x: Tensor) -> Tensor:
    """MAML: params after an inner step on other rows, through which the gradient goes."""
    if isinstance(next(iter(params.values())), nn.Parameter):
        inner = squares(apply, params, SUPPORT).mean()
        grads = dict(zip(params, torch.autograd.grad(inner, list(params.values()), create_graph=True), strict=True))
    else:
        _, grads = lm.value_and_grad(lambda p, rows: squares(apply, p, rows).mean())(params, SUPPORT)
    return squares(apply, {name: p - 0.1 * grads[name] for name, p in params.items()}, x)


def net_of(kind: type[Net], recompute: Any) -> Net:
    torch.manual_seed(0)
    return kind(recompute).double()


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, 4, generator=generator, dtype=torch.float64)} for _ in range(2)]


def case(rows: Callable[[Apply, Any, Tensor], Tensor], recompute: Any = None, kind: type[Net] = Net) -> Case:
    """A loss of rows, of a model whose loop in plain PyTorch recomputes nothing."""

    def expected(form: Form) -> dict[str, Tensor]:
        plain = each_at_once if recompute is all_at_once else None
        net = net_of(kind, plain)

        def apply(params: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(net, params, (x,))

        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        return torch_loop(net, optimizer, lambda b: rows(apply, dict(net.named_parameters()), b["x"]), batches(), form)

    return Case(
        make_state=lambda: lm.TrainState.create(net_of(kind, recompute), lm.optim.sgd(0.1)),
        step=sgd_step(lambda state, p, b: rows(lambda p, x: state.apply(p, x)[0], p, b["x"])),
        batches=batches,
        expected=expected,
        read=params_of,
        tolerance=1e-12,
    )


def each_at_once(net: Net, h: Tensor) -> Tensor:
    return net.middle(h) @ net.inward.weight @ net.inward.weight.T


DERIVATIVES = {
    "checkpointed blocks": case(squares, each_block),
    "reentrant checkpoints": case(squares, each_block_reentrant),
    "a checkpoint around all blocks": case(squares, all_at_once),
    "nested checkpoints": case(squares, nested),
    "checkpoint_sequential": case(squares, segments),
    "a penalty of checkpointed blocks": case(penalty, each_block),
    "gradient penalty": case(penalty),
    "second derivatives": case(laplacian),
    "forces": case(squares, kind=Forces),
    "forces of checkpointed blocks": case(squares, each_block, Forces),
    "adversarial rows": case(adversarial),
    "torch.func.grad": case(func_grad),
    "torch.func.jacrev twice": case(func_hessian),
    "torch.vmap": case(func_vmap),
    "MAML": case(adapted),
}
