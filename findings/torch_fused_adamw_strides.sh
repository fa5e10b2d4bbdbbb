#!/usr/bin/env bash
# Package:  torch 2.13.0, on a CPU.
# Input:    AdamW(fused=True), a contiguous param of shape [2, 3] and a gradient with the strides of a transposed tensor.
# Behavior: the fused kernel pairs entries by their place in memory, not by their index, so the params come out permuted;
#           foreach=False pairs them by index. Nothing is raised.
# Output:   largest difference between the two after one step: 0.2 (for a rate of 0.1)
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch


def step(**options):
    param = torch.nn.Parameter(torch.zeros(2, 3))
    param.grad = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0]]).t()
    torch.optim.AdamW([param], lr=0.1, weight_decay=0.0, **options).step()
    return param.detach()


difference = float((step(fused=True) - step(foreach=False)).abs().max())
print(f"largest difference between the two after one step: {difference:.1f}")
if f"{difference:.1f}" != "0.2":
    raise SystemExit("the behavior has changed")
PY
