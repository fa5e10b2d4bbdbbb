#!/usr/bin/env bash
# Package:  torchmetrics 1.9.0 with torch 2.13.0.
# Input:    BinaryAccuracy of the same six logits, all at once and in batches of 3, 2 and 1.
# Behavior: predictions are taken for logits where one of a batch lies outside [0, 1], else for probabilities, batch by
#           batch: a logit of 0.2 counts as positive or as negative by what is beside it. The result depends on the batch size.
# Output:   {6: 0.667, 3: 0.667, 2: 0.833, 1: 1.0}
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import torch
from torchmetrics.classification import BinaryAccuracy

logits, labels = torch.tensor([-2.0, -0.5, 0.2, 0.9, 0.3, 3.0]), torch.tensor([0, 0, 0, 1, 0, 1])
seen = {}
for size in (6, 3, 2, 1):
    metric = BinaryAccuracy()
    for batch, target in zip(logits.split(size), labels.split(size)):
        metric.update(batch, target)
    seen[size] = round(float(metric.compute()), 3)
print(seen)
if seen != {6: 0.667, 3: 0.667, 2: 0.833, 1: 1.0}:
    raise SystemExit("the behavior has changed")
PY
