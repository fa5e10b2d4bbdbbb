#!/usr/bin/env bash
# Package:  torch 2.13.0, on a CPU.
# Input:    a process joins a world and leaves it, three times (init_process_group, destroy_process_group), as a notebook
#           does, or a job that measures several strategies; then an error goes uncaught.
# Behavior: init_process_group wraps sys.excepthook so that each line of a traceback begins with the rank, and
#           destroy_process_group leaves it wrapped. Every world adds one more prefix to every line, of worlds that are
#           gone, and the hook that was there first is never back. (The same with any backend.)
# Output:   0 worlds: ValueError: an error of the user
#           1 worlds: [rank0]: ValueError: an error of the user
#           3 worlds: [rank0]: [rank0]: [rank0]: ValueError: an error of the user
# Upstream: the documentation of both functions does not mention the hook; no issue was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import subprocess
import sys

JOB = """
import torch.distributed as dist

for _ in range({worlds}):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()
raise ValueError("an error of the user")
"""
for worlds in (0, 1, 3):
    job = subprocess.run([sys.executable, "-c", JOB.format(worlds=worlds)], capture_output=True, text=True)
    last = [line for line in job.stderr.splitlines() if "ValueError: " in line][-1]
    print(f"{worlds} worlds: {last}")
    if last != "[rank0]: " * worlds + "ValueError: an error of the user":
        raise SystemExit("the behavior has changed")
PY
