"""`fsdp(offload=True)` where the device is the CPU: bitwise the step without it, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.core import distributed
from lumen.errors import HyperparameterError, OrderError
from lumen.parallel.comm.mesh import mesh
from lumen.parallel.fsdp.fsdp import fsdp
from lumen.parallel.tensor.tensor_parallel import tensor_parallel
from tests.distributed import fsdp_models
from tests.distributed.models import batches, make_state, part, step, transforms

pytestmark = pytest.mark.distributed

assert fsdp_models  # its models are registered where it is imported

AROUND = ["accumulate", "clip", "ema", "guard", "remat", "donate"]


def bits(around, prefetch, offload, model="deep"):
    """Every leaf after three steps, and of the exported state."""
    inner = [lm.donate()] if around == "donate" else transforms([around] if around else [])
    wrapped = lm.compose(fsdp(prefetch=prefetch, offload=offload), *inner)(step)
    state = wrapped.init(make_state(model, tx=lm.optim.adam(1e-2)))
    for batch in batches(3, 8):
        state, metrics = wrapped(state, part(batch, [5, 3], distributed.rank()))
    exported = wrapped.export(state)
    return [leaf.clone() for leaf in lm.tree.tensors((state, exported, metrics))]


def same(cases):
    found = []
    for case in cases:
        ours, theirs = (bits(*case[:2], offload, *case[2:]) for offload in (True, False))
        found.append(len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)))
    return found


def test_on_the_cpu_it_is_bitwise_the_step_without_it(world2):
    cases = [("", 0), ("", 1), ("", 2), ("", 1, "outside"), *((each, 1) for each in AROUND)]
    for found in world2.run(same, cases):
        assert dict(zip(cases, found, strict=True)) == dict.fromkeys(cases, True)


def meta_saved_and_restored(path):
    """A model begun on the meta device, offloaded, saved, and restored without; and back."""
    with torch.device("meta"):
        state = make_state("mlp", torch.float32)
    offloaded, plain = lm.compose(fsdp(offload=True, param_dtype="bf16"))(step), fsdp()(step)
    init_from_meta = offloaded.init(state)
    init_from_meta, _ = offloaded(init_from_meta, part(batches(1, 8, torch.float32)[0], [4, 4], distributed.rank()))
    lm.checkpoint.save(path / "a", init_from_meta, step=offloaded)
    restored = lm.checkpoint.restore(path / "a", plain.init(make_state("mlp", torch.float32)), step=plain)
    lm.checkpoint.save(path / "b", restored, step=plain)
    again = lm.checkpoint.restore(path / "b", offloaded.init(make_state("mlp", torch.float32)), step=offloaded)
    pairs = [zip(lm.tree.tensors(each), lm.tree.tensors(init_from_meta), strict=True) for each in (restored, again)]
    return all(torch.equal(a, b) for pair in pairs for a, b in pair)


def test_from_the_meta_device_through_checkpoints(world2, tmp_path):
    assert world2.run(meta_saved_and_restored, tmp_path) == [True, True]


def refuse_compile():
    wrapped = lm.compose(lm.compile(), fsdp(offload=True))(step)
    with pytest.raises(OrderError, match=r"Leave out lm\.compile"):
        wrapped.init(make_state("deep"))
    return True


def test_compiled_steps_are_refused(world2):
    assert world2.run(refuse_compile) == [True, True]


@pytest.mark.parametrize("stage", [1, 2])
def test_whole_params_are_refused(stage):
    with pytest.raises(HyperparameterError, match=r"lm\.fsdp\(stage=3, offload=True\)"):
        fsdp(stage=stage, offload=True)


def test_tensor_parallel_inside_is_refused():
    with pytest.raises(OrderError, match=r"lm\.fsdp\(\) around it"):
        lm.compose(fsdp(mesh(device="cpu"), offload=True), tensor_parallel({"up": lm.parallel.Colwise()}))(step)
