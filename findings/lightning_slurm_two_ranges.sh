#!/usr/bin/env bash
# Package:  lightning 2.6.6, with torch 2.13.0.
# Input:    SLURMEnvironment.resolve_root_node_address of two node lists with two ranges in a name, as the manual page
#           of slurm.conf writes them (rack[0-63]_blade[0-41]); `scontrol show hostnames` expands them.
# Behavior: All between the first opening bracket and the last closing one is replaced by the first number of the first
#           range. What comes out is the name of no node, and the processes of a job wait for an address that does not
#           exist. Right are the first nodes of the lists: rack1_blade3 and r0n4x.
# Output:   rack1 r0x
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile lightning==2.6.6 torch==2.13.0
"$work/venv/bin/python" -W ignore - <<'PY'
from lightning.fabric.plugins.environments import SLURMEnvironment

lists = ["rack[1-2]_blade[3-4]", "r[0-1]n[4,7]x"]
hosts = [SLURMEnvironment.resolve_root_node_address(nodes) for nodes in lists]
print(*hosts)
if hosts != ["rack1", "r0x"]:
    raise SystemExit("the behavior has changed")
PY
