#!/usr/bin/env bash
# Package:  torch 2.13.0, backend Gloo, two processes on one machine.
# Input:    all_reduce with MAX and MIN of 64 floats, all NaN on one rank and 1 on the other.
# Behavior: whether the result is NaN depends on the rank that holds it and on the entry's place: Gloo compares by `<`.
#           torch.maximum of the same two tensors is NaN everywhere.
# Output:   NaN of 64: MAX, 1 entry: {rank 0: 1, rank 1: 0}; MAX, 64 entries: {rank 0: 32, rank 1: 32}; MIN alike
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import subprocess
import sys
import tempfile

WORKER = """
import sys, torch, torch.distributed as dist
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
for name, op in (("MAX", dist.ReduceOp.MAX), ("MIN", dist.ReduceOp.MIN)):
    for size in (1, 64):
        found = {}
        for holder in (0, 1):
            values = torch.full((size,), float("nan") if rank == holder else 1.0)
            dist.all_reduce(values, op)
            found[f"rank {holder}"] = int(values.isnan().sum())
        if rank == 0:
            print(name, size, "entries, NaN by the rank that has them:", found, flush=True)
dist.destroy_process_group()
"""
with tempfile.TemporaryDirectory() as place:
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    other = subprocess.Popen([*command, "1", f"{place}/store"])
    seen = subprocess.run([*command, "0", f"{place}/store"], check=True, capture_output=True, text=True).stdout
    other.wait()
print(seen, end="")
wanted = "".join(
    f"{name} {size} entries, NaN by the rank that has them: {found}\n"
    for name in ("MAX", "MIN")
    for size, found in ((1, {"rank 0": 1, "rank 1": 0}), (64, {"rank 0": 32, "rank 1": 32}))
)
if seen != wanted:
    raise SystemExit("the behavior has changed")
PY
