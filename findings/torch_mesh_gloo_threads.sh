#!/usr/bin/env bash
# Package:  torch 2.13.0, backend Gloo, one process on Linux.
# Input:    init_process_group, init_device_mesh of 1 by 1, destroy_process_group; the mesh is still held.
# Behavior: threads of Gloo stay alive for as long as somebody holds the mesh (torch keeps meshes in a cache, too), though
#           the group was destroyed. Without a mesh there are none left.
# Output:   threads left: without a mesh 0, with a mesh more than 0
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import os
import tempfile

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as file:
            names.append(file.read().strip())
    return sorted(names)


def left(with_mesh):
    with tempfile.TemporaryDirectory() as place:
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b")) if with_mesh else None
        dist.destroy_process_group()
        return threads(), mesh


before = threads()
without, _ = left(False)
after, mesh = left(True)
print("threads left: without a mesh", len(without) - len(before), "with a mesh", len(after) - len(before))
if len(without) != len(before) or len(after) <= len(before):
    raise SystemExit("the behavior has changed")
PY
