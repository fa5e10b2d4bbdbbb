#!/usr/bin/env bash
# Package:  torchao 0.18.0 with torch 2.13.0, on a CPU.
# Input:    one step of Adam8bit on a bfloat16 param of 64 by 64; then copy.deepcopy(optimizer.state_dict()), as of a script
#           that keeps its best state in memory, torch.zeros_like and torch.isfinite of a moment, and moment.detach().
# Behavior: the moments are tensors without clone, zeros_like, or any arithmetic but lerp: NotImplementedError. detach, which
#           torch.distributed.checkpoint calls, changes the dtype from bfloat16 to float32. torch.save and torch.load work.
# Output:   deepcopy NotImplementedError, zeros_like NotImplementedError, isfinite NotImplementedError, save and load ok
#           dtype torch.bfloat16, of detach() torch.float32
# Upstream: the README of torchao's optimizers calls them drop-in replacements; no issue was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torchao==0.18.0 torch==2.13.0 numpy==2.4.6
export TORCHDYNAMO_DISABLE=1 # no compiler is needed
"$work/venv/bin/python" -W ignore - <<'PY'
import copy
import io

import torch
from torchao.optim import Adam8bit

param = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
optimizer = Adam8bit([param])
param.grad = torch.ones_like(param)
optimizer.step()
moment = optimizer.state[param]["exp_avg"]


def save_and_load():
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file))


def outcome(call):
    try:
        call()
    except NotImplementedError as error:
        return type(error).__name__
    return "ok"


calls = {
    "deepcopy": lambda: copy.deepcopy(optimizer.state_dict()),
    "zeros_like": lambda: torch.zeros_like(moment),
    "isfinite": lambda: torch.isfinite(moment),
    "save and load": save_and_load,
}
seen = {name: outcome(call) for name, call in calls.items()}
dtypes = [moment.dtype, moment.detach().dtype]
print(", ".join(f"{name} {result}" for name, result in seen.items()))
print(f"dtype {dtypes[0]}, of detach() {dtypes[1]}")
if list(seen.values()) != ["NotImplementedError"] * 3 + ["ok"] or dtypes != [torch.bfloat16, torch.float32]:
    raise SystemExit("the behavior has changed")
PY
