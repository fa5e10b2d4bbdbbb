"""ring_attention: processes that pass keys and values round attend as one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.context import block_attention
from lumen.parallel.context.ring_attention import ring_attention
from lumen.parallel.tensor.autograd_collectives import TPGroup
from tests.distributed.context_models import batches, state_of, step, train
from tests.distributed.test_context import message_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def random_case(seed):
    """Arguments of attention to all keys, the same on all ranks: tensors, documents, and options."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=g))]

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows, extra, groups, key_heads, length = pick(1, 2), pick((), (2,)), pick(1, 2, 3), pick(1, 2, 3), pick(2, 6, 10)
    lead, heads = (rows, *extra), groups * key_heads
    q, k, v = normal(*lead, heads, length, 3), *(normal(*lead, key_heads, length, n) for n in (3, pick(2, 3)))
    shape = *pick((), (1,), (heads,), (rows, *(1 for _ in extra), heads)), pick(1, length), length
    mask = pick(None, normal(*shape), torch.rand(shape, generator=g) < 0.6)
    documents = pick(None, torch.randint(3, (rows, length), generator=g).cumsum(1))
    return (q, k, v), mask, documents, {"causal": pick(True, False), "scale": pick(None, 0.3)}


def full_attention(tensors, mask, documents, causal, scale):
    q, k, v = tensors
    length = q.shape[-2]
    bias = torch.zeros(length, length, dtype=q.dtype)
    bias = bias.masked_fill(torch.ones_like(bias).triu(1) > 0, -torch.inf) if causal else bias
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    if documents is not None:
        differs = documents[:, None, :] != documents[:, :, None]
        bias = bias.masked_fill(differs.view(len(differs), *[1] * (q.dim() - 3), length, length), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True)


def rings(seeds):
    """The largest differences of results and gradients from attention in one process, for each seed."""
    group = TPGroup(mesh(context=-1, device="cpu").group("context"))
    found = []
    for seed in seeds:
        block_attention._SCORES = 2**24 if seed % 2 else 20  # in chunks
        tensors, mask, documents, options = random_case(seed)
        leaves = [*tensors, *([mask] if mask is not None and mask.dtype.is_floating_point else [])]
        leaves = [x.requires_grad_() for x in leaves]
        out = full_attention(tensors, mask, documents, **options)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
        wanted = torch.autograd.grad((out * weight).sum(), leaves)

        def own(x, dim=-2):
            return x.tensor_split(group.size, dim)[group.index]

        part = mask if mask is None or mask.shape[-2] == 1 else own(mask)
        ours = ring_attention(*map(own, tensors), part, documents, group, **options)
        grads = torch.autograd.grad((ours * own(weight)).sum(), leaves)
        pairs = [(ours, own(out)), *((group.reduce(a, "sum"), b) for a, b in zip(grads, wanted, strict=True))]
        found.append(max(float((a - b).abs().max()) for a, b in pairs))
    block_attention._SCORES = 2**24
    return found


def test_a_ring_attends_as_one_process(world2):
    for found in world2.run(rings, range(24)):
        assert max(found) < 1e-9, found


def refused_rings():
    """What is refused, in words, and what 16 bits and `torch.func` make of a ring."""
    grid = mesh(context=-1, device="cpu")
    group = TPGroup(grid.group("context"))
    data = [{name: x for name, x in batch.items() if name != "documents"} for batch in batches(1)]
    state, x = state_of(heads=1, kv_heads=1), torch.randn(1, 1, 2, 2, requires_grad=True)

    def attended(x):
        return ring_attention(x, x, x, None, None, group, causal=True, scale=None)

    def twice():
        (grad,) = torch.autograd.grad(attended(x).square().sum(), x, create_graph=True)
        grad.sum().backward()

    with torch.autocast("cpu", torch.bfloat16):
        dtype = attended(x).dtype
    by_func = torch.func.grad(lambda x: attended(x).sin().sum())(x.detach())
    grads = by_func, *torch.autograd.grad(attended(x).sin().sum(), x)
    texts = [message_of(train, lm.context_parallel(grid, attention="ulysses")(step), state, data), message_of(twice)]
    return texts, dtype, grads


def test_what_a_ring_cannot_do_is_refused_by_name(world2):
    for (heads, twice), dtype, grads in world2.run(refused_rings):
        assert "divides the heads of attention over the 2 ranks along context, which do not divide 1. Write" in heads
        assert "no second derivatives of ring attention" in twice
        assert dtype == torch.bfloat16
        torch.testing.assert_close(*grads)
