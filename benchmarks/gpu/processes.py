"""A world of one process: NCCL's collectives under ddp and fsdp, and what a hang dump says of them."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import torch
import torch.distributed as dist

import lumen as lm
from benchmarks.gpu.check import Checks, Setting, agree
from benchmarks.gpu.jobs import gpt, state_of, step, texts, trained
from lumen.parallel.comm import hang_dump

checks = Checks()


def world(setting: Setting, **axes: int) -> Any:
    """The mesh of a world of one process, which is joined by the variables that torchrun sets."""
    if not dist.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
    return lm.mesh(**axes, device=setting.device.type, timeout=60.0)


def same(setting: Setting, *transforms: lm.Transform, tolerance: float = 1e-5, donates: bool = True) -> dict[str, Any]:
    """Three steps under `transforms` are those of the plain step; the state arrives where it should be."""
    batches = texts(setting, 3)
    inner = [lm.donate()] if donates else []
    state, losses = trained(lm.compose(*transforms, *inner)(step), state_of(gpt(setting)), batches)
    expected, expected_losses = trained(step, state_of(gpt(setting)), batches)
    worst = agree(losses, expected_losses, tolerance)
    agree(setting.moved(dict(state.params)), dict(expected.params), 10 * tolerance)
    return {"largest difference of a loss": worst, "backend": str(dist.get_backend())}


@checks("ddp")
def ddp(setting: Setting) -> dict[str, Any]:
    """Gradients through NCCL's all-reduce."""
    return same(setting, lm.ddp(world(setting, data=1)))


@checks("ddp(reduce_dtype='bf16')")
def ddp_bf16(setting: Setting) -> dict[str, Any]:
    """Buckets in bfloat16."""
    return same(setting, lm.ddp(world(setting, data=1), reduce_dtype="bf16"), tolerance=1e-2)


def _add(stage: int) -> None:
    @checks(f"fsdp(stage={stage})")
    def fsdp(setting: Setting) -> dict[str, Any]:
        return same(setting, lm.fsdp(world(setting, shard=1), stage=stage))  # type: ignore[arg-type]


for _stage in (1, 2, 3):
    _add(_stage)


@checks("fsdp, precision, remat")
def fsdp_stack(setting: Setting) -> dict[str, Any]:
    """bfloat16 all-gathers, with blocks recomputed."""
    stack = [lm.fsdp(world(setting, shard=1), param_dtype="bf16"), lm.precision("bf16"), lm.remat()]
    return same(setting, *stack, tolerance=5e-2)


@checks("fsdp(offload=True)", seconds=90)
def fsdp_offload(setting: Setting) -> dict[str, Any]:
    """Shards in pinned memory on the host, where the optimizer runs."""
    return same(setting, lm.fsdp(world(setting, shard=1), offload=True), tolerance=1e-4)


@checks("compile around fsdp", seconds=150)
def fsdp_compiled(setting: Setting) -> dict[str, Any]:
    """Collectives as nodes of the graph."""
    return same(setting, setting.compile(), lm.fsdp(world(setting, shard=1)), tolerance=1e-3)


@checks("a sharded checkpoint", seconds=90)
def checkpoint(setting: Setting) -> dict[str, Any]:
    """Saved as shards, and restored on the device."""
    fast = lm.compose(lm.fsdp(world(setting, shard=1)), lm.donate())(step)
    state = fast.init(state_of(gpt(setting)))
    for batch in texts(setting, 2):
        state, _ = fast(state, batch)
    saved = lm.tree.map(lambda x: x.clone(), state)
    lm.checkpoint.save(setting.directory / "shards", state, step=fast)
    restored = lm.checkpoint.restore(setting.directory / "shards", saved, step=fast)
    agree(restored, saved)
    return {}


@checks("a Runner in a world", seconds=90)
def runner(setting: Setting) -> dict[str, Any]:
    """Metrics, checkpoints and resuming go through the process group."""
    batches = texts(setting, 4)

    def fit(steps: int, resume: str) -> Any:
        keeper = lm.Checkpointer(setting.directory / "run", every=lm.Every(steps=2))
        transforms = [lm.ddp(world(setting, data=1)), lm.donate()]
        run = lm.Runner(step, transforms=transforms, checkpoint=keeper, log_every=1, progress=False)
        return run.fit(state_of(gpt(setting)), batches, until=lm.Steps(steps), resume=resume)

    fit(2, "never")
    found = fit(4, "auto")
    expected, _ = trained(step, state_of(gpt(setting)), batches)
    return {"largest difference of a param": agree(dict(found.export().params), dict(expected.params), 1e-4)}


@checks("collectives of every dtype")
def dtypes(setting: Setting) -> dict[str, Any]:
    """psum, pmax and all_gather, along the mesh's axes, of a world of one."""
    from lumen.parallel.comm import collectives

    world(setting, data=1)
    group = dist.group.WORLD
    assert group is not None
    tried = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    ]
    tried += [torch.uint8, torch.float8_e4m3fn, torch.bool]
    for dtype in tried:
        values = torch.tensor([0, 1, 1, 0], device=setting.device).to(dtype)
        agree(collectives.all_gather(values.clone(), group)().view(torch.uint8), values.view(torch.uint8))
        if dtype not in (torch.float8_e4m3fn, torch.bool):
            for op in ("sum", "max", "min"):
                agree(collectives.all_reduce(values.clone(), op, group)().double(), values.double())
    return {"dtypes": len(tried)}


@checks("hang dumps")
def hang_dumps(setting: Setting) -> dict[str, Any]:
    """The files of a rank that hangs, with the last collectives of the flight recorder."""
    world(setting, data=1)
    for _ in range(3):
        dist.all_reduce(torch.ones(4, device=setting.device))
    setting.synchronize()
    hang_dump.HangDump(setting.directory, 0, 1).write(7)
    dump = json.loads((setting.directory / "hang" / "rank-0.json").read_text())
    entries = [entry for entry in dump["collectives"] if "all_reduce" in entry["operation"]]
    assert entries, f"no all-reduce among {dump['collectives'][-5:]}"
    assert entries[-1]["shapes"] == [[4]], entries[-1]
    assert (setting.directory / "hang" / "rank-0.txt").stat().st_size
    return {"collectives": len(dump["collectives"]), "last": str(entries[-1])}
