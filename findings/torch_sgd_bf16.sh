#!/usr/bin/env bash
# Package:  torch 2.13.0, on a CPU.
# Input:    SGD(fused=True) on bfloat16 and float16 params of 65 entries, all 1, with gradients of 1 and a rate of 0.5.
# Behavior: full blocks of a vector register (16 entries, 32 with AVX-512) are not updated; the rest is. Right is 0.5 everywhere, as foreach=False gives.
# Output:   torch.bfloat16: fused [1.0, 0.5], plain [0.5]; the same for torch.float16
# Upstream: pytorch issue 191763.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch


def step(dtype, **options):
    param = torch.nn.Parameter(torch.ones(65, dtype=dtype))
    param.grad = torch.ones_like(param)
    torch.optim.SGD([param], lr=0.5, **options).step()
    return sorted(set(param.tolist()), reverse=True)


for dtype in (torch.bfloat16, torch.float16):
    fused, plain = step(dtype, fused=True), step(dtype, foreach=False)
    print(f"{dtype}: fused {fused}, plain {plain}")
    if (fused, plain) != ([1.0, 0.5], [0.5]):
        raise SystemExit("the behavior has changed")
PY
