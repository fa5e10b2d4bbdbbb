#!/usr/bin/env bash
# Package:  torch 2.13.0, backend Gloo, one process.
# Input:    broadcast of two ones in every dtype.
# Behavior: RuntimeError "Invalid scalar type" for some, which names neither the dtype nor the tensor.
# Output:   refused: int16, uint16, uint32, uint64, float8_e4m3fn, float8_e5m2
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import tempfile

import torch
import torch.distributed as dist

names = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64"
names += " float8_e4m3fn float8_e5m2"
refused = []
with tempfile.TemporaryDirectory() as place:
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
    for name in names.split():
        try:
            dist.broadcast(torch.ones(2).to(getattr(torch, name)), 0)
        except RuntimeError as error:
            assert "Invalid scalar type" in str(error), error
            refused.append(name)
    dist.destroy_process_group()
print("refused:", ", ".join(refused))
if refused != "int16 uint16 uint32 uint64 float8_e4m3fn float8_e5m2".split():
    raise SystemExit("the behavior has changed")
PY
