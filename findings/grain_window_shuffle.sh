#!/usr/bin/env bash
# Package:  grain 0.2.18.
# Input:    grain.experimental.WindowShuffleMapDataset over 10 rows with window_size=4, for three seeds.
# Behavior: The last window reaches beyond the end, where indices wrap round to the first rows: an epoch has some rows
#           twice, and others not at all. Right is each row once, as the class promises for a window.
# Output:   different rows of 10, seeds 0 to 2: [9, 8, 10]
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile grain==0.2.18 array-record==0.8.6 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import grain

seen = []
for seed in range(3):
    rows = grain.experimental.WindowShuffleMapDataset(grain.MapDataset.range(10), window_size=4, seed=seed)
    seen.append(len(set(rows)))
print("different rows of 10, seeds 0 to 2:", seen)
if seen != [9, 8, 10]:
    raise SystemExit("the behavior has changed")
PY
