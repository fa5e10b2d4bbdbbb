#!/usr/bin/env bash
# Package:  torch 2.13.0, on a CPU.
# Input:    Adam with its default settings on a param of zeros: one gradient of 1, then 5000 of 0.001; in float32 and bfloat16.
# Behavior: the second moment has the dtype of the param. Multiplying a bfloat16 number by 0.999 and rounding gives the same
#           number, so the second moment never falls: after one large gradient a param hardly moves for the rest of training.
# Output:   torch.float32: second moment 1.0e-03, then 7.7e-06; param -0.66
#           torch.bfloat16: second moment 1.0e-03, then 1.0e-03; param -0.02
# Upstream: no issue of pytorch's was found about the second moment that stands still.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch

seen = []
for dtype in (torch.float32, torch.bfloat16):
    param = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = torch.optim.Adam([param])
    moments = []
    for gradient in [1.0] + 5000 * [0.001]:
        param.grad = torch.full_like(param, gradient)
        optimizer.step()
        moments.append(float(optimizer.state[param]["exp_avg_sq"]))
    seen.append((f"{moments[0]:.1e}", f"{moments[-1]:.1e}", f"{float(param):.2f}"))
    print(f"{dtype}: second moment {seen[-1][0]}, then {seen[-1][1]}; param {seen[-1][2]}")
if seen != [("1.0e-03", "7.7e-06", "-0.66"), ("1.0e-03", "1.0e-03", "-0.02")]:
    raise SystemExit("the behavior has changed")
PY
