"""Peak memory of reading published weights into shards: a stack of 500 MB in safetensors files, on several processes.

The figure is the peak of a process's resident memory while `init` reads, less what was resident before, and the maximum
over the processes. "in full" is a model that each process loads before its state is sharded. `bound` is the shard and
one unit. Pages of a mapped file count as resident until they are released. `--quick` takes 50 MB.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import peak, spread
from benchmarks.lora_memory import BLOCKS, QUICK_BLOCKS, WIDTH, Stack
from benchmarks.options import Options
from benchmarks.rows import Row

VARIANTS = ("Lumen: shards from files", "Lumen: in full, then sharded")


def publish(directory: str, count: int) -> None:
    """Write the weights of a stack, a file for each block, with their index."""
    from safetensors.torch import save_file

    weight_map = {}
    for index in range(count):
        name = f"model-{index + 1:05}-of-{count:05}.safetensors"
        blocks = {f"blocks.{index}.{key}": x for key, x in Stack(1).blocks[0].state_dict().items()}
        save_file(blocks, Path(directory) / name)
        weight_map |= dict.fromkeys(blocks, name)
    (Path(directory) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def prepared(label: str, count: int, directory: str) -> Any:
    """The sharded state."""
    from safetensors.torch import load_file

    import lumen as lm

    tx, step = lm.optim.sgd(0.1), lm.fsdp()(lambda state, batch: (state, {}))
    if "files" in label:
        with torch.device("meta"):
            net = Stack(count)
        return step.init(lm.bridges.huggingface.load_pretrained(lm.TrainState.create(net, tx), directory))
    net = Stack(count)
    for file in sorted(Path(directory).glob("*.safetensors")):
        net.load_state_dict(load_file(file), strict=False)
    return step.init(lm.TrainState.create(net, tx))


def measured(label: str, count: int, directory: str, small: str) -> int:
    """The peak of one variant, over the processes."""
    prepared(label, 1, small)  # loads what persists
    dist.barrier()
    peak.settle()
    before = peak.resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    state = prepared(label, count, directory)
    most = torch.tensor(peak.resident("VmHWM") - before)
    del state
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def measure(options: Options) -> list[Row]:
    """Each number of processes and each variant."""
    os.environ.update(peak.ENVIRONMENT)
    count = options.pick(BLOCKS, QUICK_BLOCKS)
    unit = 8 * WIDTH * WIDTH * 4
    rows = []
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as small:
        publish(directory, count)
        publish(small, 1)
        for size in options.sizes(2, 4):
            least = count * unit / size + unit
            for label in VARIANTS:
                if options.only and label not in options.chosen(dict.fromkeys(VARIANTS), ""):
                    continue
                most = spread.world_of(size, measured, label, count, directory, small)
                case = f"weights of {count * unit / 1e6:.0f} MB, {size} processes"
                rows.append(
                    Row("pretrained_memory", case, label, "peak", "MB", most / 1e6, most / least, bound=least / 1e6)
                )
    return rows
