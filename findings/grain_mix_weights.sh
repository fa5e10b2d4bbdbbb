#!/usr/bin/env bash
# Package:  grain 0.2.18.
# Input:    grain.MapDataset.mix of two data sets with weights=[0.502, 0.498]; and of 700 and 300 rows with [0.7, 0.3].
# Behavior: weights are multiplied by 100 / min(weights) and cut to integers, without a message. So weights that differ by
#           less than 1% are equal, and 0.7 to 0.3 is 233 to 100, by which a row of the mixture that fits is lost.
#           Right are 5020 and 4980 rows, and 1000. IterDataset.mix cuts weights in the same way.
# Output:   of 10000 rows with weights 0.502 and 0.498: 5000 and 5000
#           rows of a mixture of 700 and 300 with weights 0.7 and 0.3: 999
# Upstream: the documentation of mix says "with the given weights"; no issue was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile grain==0.2.18 array-record==0.8.6 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import grain


def rows(name, count):
    return grain.MapDataset.source([name] * count)


mixture = grain.MapDataset.mix([rows("a", 10_000), rows("b", 10_000)], weights=[0.502, 0.498])
first = [mixture[i] for i in range(10_000)]
counts = first.count("a"), first.count("b")
length = len(grain.MapDataset.mix([rows("a", 700), rows("b", 300)], weights=[0.7, 0.3]))
print("of 10000 rows with weights 0.502 and 0.498:", *counts[:1], "and", *counts[1:])
print("rows of a mixture of 700 and 300 with weights 0.7 and 0.3:", length)
if (counts, length) != ((5000, 5000), 999):
    raise SystemExit("the behavior has changed")
PY
