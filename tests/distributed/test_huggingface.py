"""Models of transformers themselves under ddp, fsdp and tensor_parallel: several processes are one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lumen as lm
from lumen.core import distributed
from lumen.parallel.tensor import plans
from tests.distributed.models import furthest, part, train
from tests.tiers import pick

pytest.importorskip("transformers")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS, ROWS, TIME = 3, 7, 8


def make_net(name):
    """No dropout, as cut heads draw other numbers; no float64, as Llama's norms compute in float32 anyway."""
    from tests.parity.hf_models import gpt2, llama

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    net = gpt2(**none).double() if name.startswith("gpt2") else llama()
    if name.endswith("-lora"):
        return lm.bridges.lora.adapt(net, targets="*.attn.c_attn" if name.startswith("gpt2") else "*.[qv]_proj")
    return net


def data(name):
    from tests.parity.hf_models import text

    generator = torch.Generator().manual_seed(3)
    return [text(ROWS, TIME, generator) for _ in range(STEPS)]


def step(state, batch):
    def loss_fn(params, batch):
        out, _ = state.apply(params, batch["input_ids"], attention_mask=batch["attention_mask"])
        targets = batch["labels"][:, 1:].flatten()  # transformers' own loss would be in float32
        losses = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="none")
        return lm.Mean.of(losses, targets != -100)

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


PLANS = {
    ("gpt2", False): plans.hf_gpt2(vocabulary=True),
    ("gpt2", True): plans.hf_gpt2(sequence=True),
    ("llama", False): plans.hf_llama(),
    ("llama", True): plans.hf_llama(sequence=True),
}


def strategies(name):
    """The transforms by name, the axes of their mesh, and the rows of each process (all of them under tensor)."""
    if name == "ddp":
        return {"data": 2}, lambda mesh, _: [lm.ddp(mesh), lm.accumulate(2)], [5, 2]
    if name == "fsdp":
        return {"shard": 2}, lambda mesh, _: [lm.fsdp(mesh)], [5, 2]
    if name == "fsdp-remat":
        return {"shard": 2}, lambda mesh, _: [lm.fsdp(mesh), lm.accumulate(2), lm.remat()], [7, 0]
    if name == "fsdp-bf16":
        return {"shard": 2}, lambda mesh, _: [lm.fsdp(mesh), lm.precision("bf16")], [4, 3]
    cut = name == "tensor-sequence"
    return {"tensor": 2}, lambda mesh, net: [lm.tensor_parallel(PLANS[net, cut], mesh)], [7]


def law(cases):
    """For each case how far several processes are from one: the losses, and the furthest leaf."""
    found = []
    for name, strategy in cases:
        axes, make, sizes = strategies(strategy)
        parallel = make(lm.mesh(**axes, device="cpu"), name)
        state = lm.TrainState.create(make_net(name), lm.optim.adam(1e-2, eps=1e-4))
        batches = data(name)
        wrapped = lm.compose(*parallel)(step)
        rows = [part(batch, sizes, distributed.rank() if len(sizes) > 1 else 0) for batch in batches]
        losses, after = train(wrapped, state, rows)
        after = wrapped.export(after)
        one = lm.compose(*[lm.precision("bf16")] * (strategy == "fsdp-bf16"))(step)
        wanted, other = train(one, lm.TrainState.create(make_net(name), lm.optim.adam(1e-2, eps=1e-4)), batches)
        gap = furthest({**after.params}, {**other.params})
        found.append((float((losses - wanted).abs().max()), *gap))
    return found


CASES = [
    *(("gpt2", strategy, 1e-10) for strategy in ("ddp", "fsdp-remat", "tensor", "tensor-sequence")),
    *(("llama", strategy, 2e-5) for strategy in ("fsdp", "tensor", "tensor-sequence")),
    ("llama", "fsdp-bf16", 2e-2),
    ("gpt2-lora", "fsdp", 1e-10),
]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_two_processes_train_as_one(name, world2):
    cases = [case for case in CASES if case[0].startswith(name)]
    for found in world2.run(law, [case[:2] for case in cases]):
        for (model, strategy, tolerance), (losses, worst, leaf) in zip(cases, found, strict=True):
            assert losses < tolerance, (model, strategy)
            # Where rounding is coarse, Adam makes a whole step of a sign that changed; losses tell.
            assert worst < tolerance or strategy == "fsdp-bf16", (model, strategy, leaf)


def refused():
    """What the plan says of layers with adapters."""
    state = lm.TrainState.create(make_net("llama-lora"), lm.optim.adam(1e-2))
    wrapped = lm.tensor_parallel(plans.hf_llama(), lm.mesh(tensor=2, device="cpu"))(step)
    try:
        wrapped.init(state)
    except lm.LumenError as error:
        return str(error)
    return ""


def families(names):
    """What fsdp makes of each family beside a raw loop that adds up the gradients of both processes' rows."""
    from tests.parity.hf_families import cell

    return [cell(name, "fsdp") for name in names]


def test_families_train_under_fsdp_as_in_a_raw_loop(world2):
    from tests.parity.hf_families import FAMILIES

    names = pick(["t5", "mixtral", "whisper", "resnet"], list(FAMILIES))
    assert all(set(answers) == {"equal"} for answers in world2.run(families, names))


def test_adapters_in_cut_layers_are_refused(world2):
    assert all("is a LoraLinear" in said for said in world2.run(refused))
