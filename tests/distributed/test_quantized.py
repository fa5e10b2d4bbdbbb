"""Eight bits over processes: what is rounded are the products of each one's rows, with whole weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lumen as lm
from lumen.parallel import Colwise, Rowwise

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

# Scales over all rows are other scales than those over each process's: the weight gradient's, and all of fp8's. And
# where a weight lies between two steps of its scale, the order of a sum decides which it is rounded to.
FAR = {"int8": 0.005, "fp8": 0.05, "qat": 0.002}


def network():
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    return nn.Sequential(nn.Linear(16, 16), blocks, nn.Linear(16, 4))


def data():
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    return {"x": x, "y": x[:, :4].argmax(-1)}


def step(state, batch):
    def loss_fn(params, batch):
        return lm.Mean.of(F.cross_entropy(state.apply(params, batch["x"])[0], batch["y"], reduction="none"))

    loss, grads = lm.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads), {"loss": loss}


def trained(transforms, batch):
    made = lm.compose(*transforms)(step)
    state = made.init(lm.TrainState.create(network(), lm.optim.sgd(0.5)))
    for _ in range(3):
        state, _ = made(state, batch)
    return made.export(state)


def furthest():
    """By strategy and kind: how far params are from one process's, relative to their own norm."""
    rank, size = lm.rank(), lm.world_size()
    part = {key: leaf[rank::size] for key, leaf in data().items()}
    found = {}
    for kind in FAR if not torch.cuda.is_available() else ("fp8", "qat"):  # where int8 products run on the GPU alone
        quantized = lm.quantized_matmul(kind, layers=["0", "1.*"], emulate=kind == "fp8")
        alone = trained([quantized], data()).params
        for name, strategy in (("ddp", lm.ddp()), ("fsdp", lm.fsdp())):
            params = trained([strategy, quantized], part).params
            found[name, kind] = max(float((p - alone[k]).norm() / alone[k].norm()) for k, p in params.items())
    return found


def beside_tensor_parallel():
    """Layers that are cut stay as they are; named, they are refused."""
    plan = {"1.0": Colwise(), "1.2": Rowwise()}

    def cut():
        return lm.tensor_parallel(plan, lm.mesh(tensor=-1, device="cpu"))

    both = trained([cut(), lm.quantized_matmul("qat")], data()).params
    alone = trained([lm.quantized_matmul("qat", layers=["0", "2"])], data()).params
    try:
        trained([cut(), lm.quantized_matmul("qat", layers="1.0")], data())
    except lm.LumenError as error:
        said = str(error)
    return max(float((p - alone[k]).norm()) for k, p in both.items()), said


def test_parts_on_two_processes_are_nearly_the_whole(world2):
    for found in world2.run(furthest):
        assert {name for name, _ in found} == {"ddp", "fsdp"}
        for (name, kind), error in found.items():
            assert error < FAR[kind], (name, kind)


def test_layers_that_are_cut_stay_as_they_are(world2):
    for error, said in world2.run(beside_tensor_parallel):
        assert error < 0.005
        assert "'1.0' has its forward replaced by another transform" in said
