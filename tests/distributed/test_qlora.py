"""QLoRA under fsdp: codes and scales in shards, gathered and rebuilt where they are used, to the same bits."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.bridges import huggingface, lora
from lumen.core import distributed
from lumen.parallel.fsdp.fsdp import fsdp
from tests.distributed.fsdp_models import DeepGPT
from tests.distributed.models import bare, batches, part, step, transforms
from tests.distributed.test_fsdp_frozen import SIZES, data, kept_whole

pytest.importorskip("torchao")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

LAYERS = ["blocks.*.up", "blocks.*.qkv", "blocks.*.down"]


def small_state(kind):
    """A state of adapters on a base whose blocks are quantized; one quantized layer has none."""
    torch.manual_seed(0)
    net = lora.adapt(DeepGPT(width=8).float(), targets=LAYERS[:2], rank=2)
    return lm.quantize(lm.TrainState.create(net, lm.optim.adam(1e-2)), kind, layers=LAYERS)


def trained(kind, around):
    wrapped = lm.compose(fsdp(), *transforms(around))(step)
    state = wrapped.init(small_state(kind))
    held = sum(state.buffers[name].nbytes for name in state.apply_fn.frozen)
    for batch in batches(3, sum(SIZES), torch.float32):
        state, _ = wrapped(state, part(batch, SIZES, distributed.rank()))
    return bare(wrapped.export(state)), held


def different(kind, around):
    found, held = trained(kind, around)
    with kept_whole():
        wanted, total = trained(kind, around)
    assert found.keys() == wanted.keys()
    return [name for name, leaf in wanted.items() if not torch.equal(leaf, found[name])], held / total


CASES = [("nf4", []), ("nf4", ["remat"]), ("nf4", ["accumulate", "bf16"]), ("int8", ["donate"])]


@pytest.mark.parametrize(("kind", "around"), CASES)
def test_no_bit_depends_on_the_shards(kind, around, world2):
    for names, share in world2.run(different, kind, around):
        assert not names
        assert share < 0.65


def run_on(directory, steps, size):
    """A run, gone on with from where it was left, and its adapters in peft's files."""
    strategy = fsdp(lm.mesh(shard=size, device="cpu")) if size > 1 else lm.ddp(lm.mesh(data=1, device="cpu"))
    checkpoint = lm.Checkpointer(directory, every=lm.Every(steps=2))
    runner = lm.Runner(step, transforms=[strategy, lm.donate()], checkpoint=checkpoint, progress=False)
    result = runner.fit(small_state("nf4"), data(), until=lm.Steps(steps), resume="auto")
    state = runner.step.export(result.state.replace(buffers={}))
    if distributed.rank() == 0:
        huggingface.save_adapters(state, directory / f"adapters-{steps}")
    return bare(result.export())


def test_a_run_stops_resumes_and_is_exported(worlds, tmp_path):
    from safetensors.torch import load_file

    for steps, size in ((2, 2), (4, 1), (6, 2)):
        found = worlds(size).run(run_on, tmp_path / "parts", steps, size)[0]
    wanted = worlds(2).run(run_on, tmp_path / "whole", 6, 2)[0]
    for name, leaf in wanted.items():
        if leaf.is_floating_point():
            torch.testing.assert_close(found[name], leaf, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(found[name], leaf), name
    saved = load_file(tmp_path / "whole" / "adapters-6" / "adapter_model.safetensors")
    assert len(saved) == 12
    name = "blocks.1.up.lora_b"
    assert torch.equal(saved["base_model.model.blocks.1.up.lora_B.weight"], wanted[f"params[{name}]"])
