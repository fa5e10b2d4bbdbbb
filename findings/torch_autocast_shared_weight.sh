#!/usr/bin/env bash
# Package:  torch 2.13.0, on a CPU.
# Input:    a float32 weight that one forward pass under bfloat16 autocast uses 1000 times, each time with a gradient of 1.
# Behavior: autocast casts the weight once and caches the cast, so the gradients of all uses are summed in bfloat16 before the
#           sum becomes float32: above 256 it stands still. With cache_enabled=False each use is summed in float32. A
#           recurrent cell, a tied layer or a loop over microbatches inside one autocast block uses a weight many times.
# Output:   gradient: 256.0 with the cache (the default), 1000.0 without it
# Upstream: no issue about the sum was found; pytorch pull request 63552 added cache_enabled, for tracing and for speed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch


def gradient(cache):
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        outputs = [layer(torch.ones(1, 1)).float() for _ in range(1000)]
        loss = torch.cat(outputs).sum()
    loss.backward()
    return float(layer.weight.grad)


cached, uncached = gradient(True), gradient(False)
print(f"gradient: {cached} with the cache (the default), {uncached} without it")
if (cached, uncached) != (256.0, 1000.0):
    raise SystemExit("the behavior has changed")
PY
