#!/usr/bin/env bash
# Package:  grain 0.2.18.
# Input:    A DataLoader with an IndexSampler over 5 records, num_epochs=1 or 2, for each of two ShardOptions with
#           drop_remainder=False, which "will distribute the remainder N over the first N shards".
# Behavior: Each shard gives num_epochs * 5 // 2 records: in one epoch the third record of the first shard never comes;
#           in two its second epoch is cut short, and the second shard begins a third one.
# Output:   1 epoch: [0, 1] [3, 4]
#           2 epochs: [0, 1, 2, 0, 1] [3, 4, 3, 4, 3]
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile grain==0.2.18 array-record==0.8.6 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import grain


def shard(index, epochs):
    options = grain.sharding.ShardOptions(shard_index=index, shard_count=2, drop_remainder=False)
    sampler = grain.samplers.IndexSampler(5, shard_options=options, num_epochs=epochs, seed=0)
    return [int(row) for row in grain.DataLoader(data_source=list(range(5)), sampler=sampler, worker_count=0)]


seen = [[shard(index, epochs) for index in range(2)] for epochs in (1, 2)]
for number, shards in enumerate(seen, 1):
    print(f"{number} epoch{'s' * (number > 1)}:", *shards)
if seen != [[[0, 1], [3, 4]], [[0, 1, 2, 0, 1], [3, 4, 3, 4, 3]]]:
    raise SystemExit("the behavior has changed")
PY
