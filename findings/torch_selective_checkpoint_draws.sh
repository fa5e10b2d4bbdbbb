#!/usr/bin/env bash
# Package:  torch 2.13.0, on a CPU.
# Input:    torch.utils.checkpoint with create_selective_checkpoint_contexts([torch.ops.aten.bernoulli.default]) around a
#           function that draws a mask by torch.bernoulli and then applies dropout, with preserve_rng_state as by default.
# Behavior: The recomputation takes the kept mask and does not draw it again, so the generator stays one draw behind, and
#           the dropout after it draws another mask than in the forward pass. The gradient is that of another function,
#           without a word. Where nothing is kept, both masks are those of the forward pass.
# Output:   the function is homogeneous of degree 2, so <gradient, x> / value must be 2
#           recomputed whole 2.0000, the draw kept 4.4381
# Upstream: the documentation of the policies does not mention random operations; no issue was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def masked_twice(x):
    mask = torch.bernoulli(torch.full_like(x, 0.5))
    return F.dropout((x * mask).square(), 0.5).sum()


def degree(**options):
    torch.manual_seed(0)
    x = torch.rand(1000, dtype=torch.float64, requires_grad=True)
    value = checkpoint(masked_twice, x, use_reentrant=False, **options)
    value.backward()
    return float((x.grad * x).sum() / value)


keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.bernoulli.default])
whole, kept = degree(), degree(context_fn=keep)
print(f"recomputed whole {whole:.4f}, the draw kept {kept:.4f}")
if abs(whole - 2) > 1e-9 or abs(kept - 2) < 1e-3:
    raise SystemExit("the behavior has changed")
PY
