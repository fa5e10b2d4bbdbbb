"""Chunked cross-entropies on two processes: rows divided, params sharded, and a head sharded over the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen.core import distributed as world
from lumen.errors import OrderError
from lumen.parallel import Colwise, Rowwise
from lumen.parallel.comm.mesh import mesh
from tests.distributed.pool import TaskError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

VOCABULARY = 12


class Model(nn.Module):
    def __init__(self, tied=False, bias=False, scale=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.lm_head = nn.Linear(4, VOCABULARY, bias=bias)
        if tied:
            self.lm_head.weight = self.embedding.weight
        self.scale = scale

    def hidden(self, tokens):
        h = self.embedding(tokens)
        for block in self.blocks:
            h = h + block(h).tanh()
        return h

    def forward(self, tokens):
        logits = self.lm_head(self.hidden(tokens))
        return logits if self.scale is None else self.scale * torch.tanh(logits / self.scale)


def of_logits(state, params, tokens):
    out, _ = state.apply(params, tokens)
    losses = F.cross_entropy(out[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none", label_smoothing=0.1)
    return lm.Mean.of(losses, (tokens[:, 1:] != 3).to(losses.dtype))


def summed(state, params, tokens):
    out, _ = state.apply(params, tokens)
    total = F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum", ignore_index=3)
    right = (out.argmax(-1)[:, :-1] == tokens[:, 1:]).sum()
    return lm.Mean(total + 0 * right, (tokens[:, 1:] != 3).sum())


def of_hidden(state, params, tokens):
    apply = state.apply_fn.calling(Model.hidden)
    hidden, _ = apply(params, state.buffers, tokens)
    weight = params.get("lm_head.weight", params["embedding.weight"])
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == 3, -100)
    options = {"z_loss": 0.01, "soft_cap": 3.0, "label_smoothing": 0.2}
    bias = params.get("lm_head.bias")
    return lm.losses.linear_cross_entropy(hidden[:, :-1], weight, targets, bias=bias, chunk=3, **options)


LOSSES = {"of logits": of_logits, "summed": summed, "of hidden": of_hidden}


def step_of(loss):
    def loss_fn(params, tokens, state):
        return LOSSES[loss](state, params, tokens)

    def step(state, tokens):
        loss, grads = lm.value_and_grad(loss_fn)(state.params, tokens, state)
        return state.apply_gradients(grads), {"loss": loss}

    return step


def around(name, form):
    grid = mesh(shard=-1, device="cpu")
    if name == "tensor":
        plan = {"lm_head": Colwise(output="replicate"), "blocks.0": Colwise(output="replicate")}
        plan |= {"embedding": Rowwise()} if form.get("tied") else {}
        return [lm.tensor_parallel(plan, mesh(tensor=-1, device="cpu"))], slice(None)
    rows = slice(world.rank(), None, 2)
    return [lm.ddp(mesh(data=-1, device="cpu"))] if name == "ddp" else [lm.fsdp(grid, stage=int(name[-1]))], rows


def trained(transforms, loss, form, rows=slice(None), dtype=torch.float64):
    torch.manual_seed(0)
    state = lm.TrainState.create(Model(**form).to(dtype), lm.optim.adam(0.05))
    wrapped = lm.compose(*transforms)(step_of(loss))
    state, losses = wrapped.init(state), []
    for batch in torch.randint(VOCABULARY, (3, 6, 5), generator=torch.Generator().manual_seed(3)):
        state, metrics = wrapped(state, batch[rows])
        losses.append(lm.compute_metrics(metrics)["loss"])
    return dict(wrapped.export(state).params), losses


def furthest(name, loss, form, inner, dtype=torch.float64):
    parallel, rows = around(name, form)
    inside = {"none": [], "accumulate": [lm.accumulate(2)], "remat": [lm.accumulate(2), lm.remat("blocks.*")]}[inner]
    chunked = [] if loss == "of hidden" else [lm.chunked_logits(chunk=2)]
    params, losses = trained([*parallel, *inside, *chunked], loss, form, rows, dtype)
    wanted, others = trained([], loss, form, dtype=dtype)
    far = max(float((params[key] - wanted[key]).abs().max()) for key in wanted)
    return max(far, *(abs(float(a) - float(b)) for a, b in zip(losses, others, strict=True)))


FORMS = [{}, {"tied": True}, {"bias": True, "scale": 2.0}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp3", "tensor"])
def test_two_processes_compute_as_one(name, loss, form, world2):
    inner = {"ddp": "none", "fsdp2": "accumulate", "fsdp3": "remat", "tensor": "accumulate"}[name]
    assert max(world2.run(furthest, name, loss, form, inner)) < 1e-10


def _has_memory(x):
    return x.is_floating_point() and x.device.type != "meta"


def largest(loss):
    """The largest tensor that one step of a head sharded over the vocabulary makes."""
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            sizes.extend(x.numel() for x in leaves if isinstance(x, torch.Tensor) and _has_memory(x))
            return out

    parallel, _ = around("tensor", {})
    wrapped = lm.compose(*parallel, lm.chunked_logits(chunk=24))(step_of(loss))
    state = wrapped.init(lm.TrainState.create(Model(), lm.optim.adam(0.05)))
    tokens = torch.randint(VOCABULARY, (20, 5))
    with Sizes():
        wrapped(state, tokens)
    return max(sizes)


def test_no_rank_has_the_logits_of_all_classes(world2):
    # A chunk of half of the classes, 24 * 6, is less than the hidden states.
    assert world2.run(largest, "of logits") == [20 * 5 * 4] * 2


def unit_of_its_own():
    wrapped = lm.compose(lm.fsdp(mesh(shard=-1, device="cpu"), wrap=["blocks.*", "lm_head"]), lm.chunked_logits())(
        step_of("summed")
    )
    wrapped(wrapped.init(lm.TrainState.create(Model(), lm.optim.adam(0.05))), torch.randint(VOCABULARY, (4, 5)))


def test_a_head_that_is_a_unit_of_its_own_is_named(world2):
    with pytest.raises(TaskError, match="lm_head") as caught:
        world2.run(unit_of_its_own, limit=60)
    assert [kind for _, kind, _ in caught.value.errors] == [OrderError.__name__] * 2
