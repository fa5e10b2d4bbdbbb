#!/usr/bin/env bash
# Package:  torch 2.13.0, on a CPU.
# Input:    torch.utils.flop_counter.FlopCounterMode around products and layers that do the same work in different ways.
# Behavior: What its table does not list counts as 0, without a word: products in place (addmm_, baddbmm_), addbmm,
#           products with a vector (mv, addmv, dot), and a whole nn.LSTM, while an nn.GRU of the same size is counted.
#           So a model's FLOPs, and a utilization computed from them, can be any fraction of the truth.
# Output:   [8, 16] @ [16, 4]: torch.addmm 1024, addmm_ 0; [3, 8, 16] @ [3, 16, 4]: baddbmm 3072, baddbmm_ 0, addbmm 0
#           [8, 16] @ [16]: 0; as a matrix of one column 256
#           GRU 1536 (products of the input and of the hidden state), LSTM 0
# Upstream: the class's documentation does not say what is left out; no issue was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

a, b, v = torch.ones(8, 16), torch.ones(16, 4), torch.ones(16)
many_a, many_b = torch.ones(3, 8, 16), torch.ones(3, 16, 4)
sequence = torch.ones(2, 1, 8)
cases = {
    "addmm": lambda: torch.addmm(torch.zeros(8, 4), a, b),
    "addmm_": lambda: torch.zeros(8, 4).addmm_(a, b),
    "baddbmm": lambda: torch.baddbmm(torch.zeros(3, 8, 4), many_a, many_b),
    "baddbmm_": lambda: torch.zeros(3, 8, 4).baddbmm_(many_a, many_b),
    "addbmm": lambda: torch.addbmm(torch.zeros(8, 4), many_a, many_b),
    "vector": lambda: a @ v,
    "column": lambda: a @ v[:, None],
    "GRU": lambda: nn.GRU(8, 8)(sequence),
    "LSTM": lambda: nn.LSTM(8, 8)(sequence),
}
counts = {}
for name, case in cases.items():
    with FlopCounterMode(display=False) as counter:
        case()
    counts[name] = counter.get_total_flops()
print(counts)
expected = {"addmm": 1024, "addmm_": 0, "baddbmm": 3072, "baddbmm_": 0, "addbmm": 0, "vector": 0, "column": 256, "GRU": 1536, "LSTM": 0}
if counts != expected:
    raise SystemExit("the behavior has changed")
PY
