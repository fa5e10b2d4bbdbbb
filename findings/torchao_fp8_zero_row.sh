#!/usr/bin/env bash
# Package:  torchao 0.18.0 with torch 2.13.0, on a CPU.
# Input:    Float8WeightOnlyConfig on a Linear(8, 3) whose second row of weights is zero (pruned, or initialized so).
# Behavior: the row's scale is 0, the weights are divided by it, and its output is NaN. Int8WeightOnlyConfig gives 0.
# Output:   fp8: [False, True, False] is NaN; int8: [False, False, False]
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torchao==0.18.0 torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

seen = {}
for name, config in (("fp8", Float8WeightOnlyConfig()), ("int8", Int8WeightOnlyConfig())):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0
    quantize_(layer, config)
    seen[name] = layer(torch.ones(1, 8))[0].isnan().tolist()
    print(f"{name}: {seen[name]} is NaN")
if seen != {"fp8": [False, True, False], "int8": [False, False, False]}:
    raise SystemExit("the behavior has changed")
PY
