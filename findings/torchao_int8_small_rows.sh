#!/usr/bin/env bash
# Package:  torchao 0.18.0 with torch 2.13.0, on a CPU.
# Input:    Int8WeightOnlyConfig on rows of weights of size 1 and of size 1e-7.
# Behavior: no scale is smaller than 1.2e-7 (float32's eps), so small rows keep two or three values.
# Output:   largest error by the row's largest weight: 0.004 for size 1; about 0.6 for size 1e-7
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torchao==0.18.0 torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

seen = []
for size in (1.0, 1e-7):
    layer = torch.nn.Linear(256, 1, bias=False)
    layer.weight.data = size * torch.linspace(-1, 1, 256).reshape(1, 256)
    exact = layer.weight.detach().clone()
    quantize_(layer, Int8WeightOnlyConfig())
    error = float((layer.weight.dequantize() - exact).abs().max() / exact.abs().max())
    seen.append(error)
    print(f"largest error by the row's largest weight, for size {size:g}: {error:.3f}")
if not (seen[0] < 0.0041 and seen[1] > 0.4):
    raise SystemExit("the behavior has changed")
PY
