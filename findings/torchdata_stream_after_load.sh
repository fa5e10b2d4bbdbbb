#!/usr/bin/env bash
# Package:  torchdata 0.11.0 and datasets 5.2.0 with torch 2.13.0.
# Input:    StatefulDataLoader over a Hugging Face stream of 20 rows, saved after 3 batches of 4, loaded into a new one.
# Behavior: the rest of the epoch is right; every later epoch begins in the middle too, as the stream keeps the place it
#           was given. Right are 5 batches.
# Output:   batches of the epochs after the load: [2, 2, 2]
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torchdata==0.11.0 datasets==5.2.0 torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import datasets
from torchdata.stateful_dataloader import StatefulDataLoader

datasets.disable_progress_bars()


def make():
    rows = datasets.Dataset.from_dict({"i": list(range(20))}).with_format("torch")
    return StatefulDataLoader(rows.to_iterable_dataset(num_shards=2), batch_size=4)


first = make()
batches = iter(first)
for _ in range(3):
    next(batches)
second = make()
second.load_state_dict(first.state_dict())
seen = [sum(1 for _ in second) for _ in range(3)]
print("batches of the epochs after the load:", seen)
if seen != [2, 2, 2]:
    raise SystemExit("the behavior has changed")
PY
