"""What goes wrong on several processes first: an error by name on every rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lumen as lm
from lumen.core import distributed
from lumen.errors import LumenError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]


class Counting(nn.Linear):
    """A layer that counts its rows."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.rows += len(x)
        return super().forward(x)


def state_of(net=None):
    torch.manual_seed(0)
    merge = {"rows": "sum"} if isinstance(net, Counting) else None
    return lm.TrainState.create(net or nn.Linear(4, 2), lm.optim.sgd(0.1), merge=merge)


def contrastive(*axes):
    """Each row against the rows of all ranks along `axes`."""

    def step(state, batch):
        def loss_fn(params, batch):
            own = everyone = state.apply(params, batch)[0]
            for axis in axes:
                everyone = lm.all_gather(everyone, axis)
            return lm.Mean.of((own @ everyone.T).logsumexp(1))

        loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
        return state.apply_gradients(grads), {"loss": loss}

    return step


def counting(state, batch):
    def loss_fn(params, batch):
        out, buffers = state.apply(params, batch)
        return out.square().mean(), lm.Aux(buffers=buffers)

    (loss, aux), grads = lm.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return state.apply_gradients(grads, buffers=aux.buffers), {"loss": loss}


def message_of(transforms, step, state=None, rows=3):
    wrapped = lm.compose(*transforms)(step)
    x = torch.arange(rows * 4.0).view(rows, 4) / 8 + distributed.rank()
    try:
        for _ in range(2):
            state, _ = wrapped(wrapped.init(state_of() if state is None else state), x)
    except LumenError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run_of(transforms, step):
    rows = lm.data.per_rank([torch.ones(3, 4)] * 2)
    try:
        lm.Runner(step, transforms=transforms, progress=False).fit(state_of(), rows, until=lm.Steps(2))
    except LumenError as error:
        return str(error)
    return "nothing"


def mistakes():
    one_rank = 0.5 if distributed.rank() else 0.9
    sequential = lambda: state_of(nn.Sequential(nn.Linear(4, 2)))  # noqa: E731
    blocks = [lm.ddp(), lm.remat("0", budget=100)]
    return {
        "data under fsdp": message_of([lm.fsdp()], contrastive("data")),
        "shard under ddp": message_of([lm.ddp()], contrastive("shard")),
        "no axis, at each stage": [message_of([lm.fsdp(stage=n)], contrastive("dta")) for n in (1, 2, 3)],
        "no axis, in a run": run_of([lm.fsdp()], contrastive("dta")),
        "both axes": [message_of([t], contrastive("shard", "data")) for t in (lm.ddp(), lm.fsdp())],
        "outer": message_of([lm.local(every=2, outer=lm.optim.sgd(1.0, momentum=one_rank))], contrastive()),
        "context": message_of([lm.ddp(lm.mesh(context=-1, device="cpu"))], counting, state_of(Counting())),
        "budget of one rank": message_of(blocks, contrastive(), sequential(), 3 + 9 * distributed.rank()),
    }


FOUND = {
    "data under fsdp": "AxisError: the step called lm.all_gather or lm.psum over 'data', along which there is one",
    "shard under ddp": "AxisError: the step called lm.all_gather or lm.psum over 'shard', along which there is one",
    "no axis, at each stage": ["AxisError: the axis 'dta' is bound nowhere"] * 3,
    "no axis, in a run": "the axis 'dta' is bound nowhere",
    "both axes": ["nothing"] * 2,
    "outer": "WorldError: the processes of lm.local differ: rank 0 has outer.init_fn.hyper._constants.momentum = 0.9",
    "context": "OrderError: lm.ddp(lm.mesh(context=2)) has 2 processes along context",
    "budget of one rank": "HyperparameterError: on rank 1: lm.remat('0', budget=100) is less than the 192 B",
}


def test_each_mistake_is_the_same_error_on_every_rank(world2):
    for found in world2.run(mistakes, limit=120):
        for name, expected in FOUND.items():
            texts = found[name] if isinstance(expected, list) else [found[name]]
            for text, begin in zip(texts, expected if isinstance(expected, list) else [expected], strict=True):
                assert text.startswith(begin), (name, text)
