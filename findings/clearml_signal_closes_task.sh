#!/usr/bin/env bash
# Package:  clearml 2.1.12.
# Input:    A script with a handler for SIGTERM that only takes note, as one that finishes its step and saves. It starts an
#           offline task, reports loss 1.0 at step 1, receives one SIGTERM, and reports loss 2.0 at step 2.
# Behavior: Task.init puts a handler of its own before the script's. At the signal it closes the task, and calls the script's
#           handler twice. What is reported afterwards is missing, without an error.
# Output:   handler calls: 2
#           reported: [(1, 1.0)]
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile clearml==2.1.12 numpy==2.4.6 pillow==12.3.0
export CLEARML_CACHE_DIR="$work/cache"
"$work/venv/bin/python" -W ignore - <<'PY'
import json
import os
import signal
import time

from clearml import Task

calls = []
signal.signal(signal.SIGTERM, lambda *_: calls.append("noted"))
Task.set_offline(True)
task = Task.init("project", "task", auto_connect_frameworks=False, auto_resource_monitoring=False)
logger = task.get_logger()
logger.report_scalar("loss", "train", 1.0, iteration=1)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1)  # for the handlers, which Python runs between two instructions
logger.report_scalar("loss", "train", 2.0, iteration=2)
task.close()
lines = (task.get_offline_mode_folder() / "metrics.jsonl").read_text().splitlines()
reported = [(event["iter"], event["value"]) for line in lines for event in json.loads(line)]
print("handler calls:", len(calls))
print("reported:", reported)
if (len(calls), reported) != (2, [(1, 1.0)]):
    raise SystemExit("the behavior has changed")
PY
