#!/usr/bin/env bash
# Package:  deepspeed 0.19.8 with torch 2.13.0, on a CPU, one process over Gloo.
# Input:    deepspeed.initialize with ZeRO stage 3 on a small model, then engine.destroy(). Afterwards a Linear layer that
#           has nothing to do with the engine: its Hessian by torch.func, and one forward pass under bfloat16 autocast.
# Behavior: initialize() replaces torch.nn.functional.linear for the whole process, and destroy() does not restore it. Every
#           other Linear layer runs through the replacement: forward-mode differentiation (jvp, jacfwd, hessian) raises
#           NotImplementedError, and autocast keeps the input of each layer in float32 for the backward pass, not in bfloat16.
# Output:   before: torch's own linear True, Hessian ok, input saved in torch.bfloat16
#           after:  torch's own linear False, Hessian NotImplementedError, input saved in torch.float32
# Upstream: DeepSpeed issue 975 (open) asks how to exempt a module; since pull request 8189 initialize() does what only
#           zero.Init() did before. Issue 7913 is about torch.func.grad and vmap, which now work; none was found about
#           forward mode, or about destroy().
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile deepspeed==0.19.8 torch==2.13.0 numpy==2.4.6
export DS_ACCELERATOR=cpu LOCAL_RANK=0 TORCH_EXTENSIONS_DIR="$work/extensions"
"$work/venv/bin/python" -W ignore - <<'PY'
import tempfile

import torch
import torch.distributed as dist
from torch import nn

torchs_own = nn.functional.linear


def look(when):
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    try:
        torch.func.hessian(lambda row: layer(row).square().sum())(x[0])
        hessian = "ok"
    except NotImplementedError:
        hessian = "NotImplementedError"
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    [dtype] = {t.dtype for t in saved if t.shape == x.shape}
    own = nn.functional.linear is torchs_own
    print(f"{when} torch's own linear {own}, Hessian {hessian}, input saved in {dtype}")
    return own, hessian, dtype


before = look("before:")
import deepspeed  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel for several processes, compiled at first use
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(8, 8))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.destroy()
    del engine
    after = look("after: ")
    dist.destroy_process_group()
if (before, after) != ((True, "ok", torch.bfloat16), (False, "NotImplementedError", torch.float32)):
    raise SystemExit("the behavior has changed")
PY
