"""The graph of one stage and microbatch, behind a single node of the graph that torch's schedule differentiates.

An error in the stage's backward pass thus ends in that node, where it can be kept: if it left the schedule, the
processes of other stages would wait for gradients that are never sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StageGraph:
    """What a stage computes for one microbatch from the `received` activation, with a graph of its own."""

    def __init__(self, received: Tensor | None) -> None:
        self.received = None if received is None else received.detach().requires_grad_()
        self.sent: Tensor | None = None

    def backward(self, grad: Tensor) -> None:
        """Add the gradients of the leaves, and free the graph."""
        sent, self.sent = self.sent, None
        if sent is not None:
            torch.autograd.backward([sent], [grad])

    def take_grad(self) -> Tensor | None:
        """The gradient of what was received, if there is one, and free it: torch keeps the nodes of a last stage."""
        received, self.received = self.received, None
        return None if received is None else received.grad


def as_node(graph: StageGraph, received: Tensor | None, sent: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
    """`sent`, as a function of `received`: its gradient is passed to `backward`, which must not raise."""
    root = torch.zeros((), device=sent.device, requires_grad=True) if received is None else received
    node: Tensor = _Node.apply(root, sent.detach(), graph, backward)  # type: ignore[no-untyped-call]
    return node


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, sent: Tensor, graph: StageGraph, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.graph, ctx.backward, ctx.root = graph, backward, (root.shape, root.dtype, root.device)
        return sent

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.backward(grad)
        received_grad = ctx.graph.take_grad()
        if received_grad is None:
            shape, dtype, device = ctx.root
            received_grad = torch.zeros(shape, dtype=dtype, device=device)
        return received_grad, None, None, None
