#!/usr/bin/env bash
# Package:  comet-ml 3.58.8.
# Input:    OfflineExperiment twice with one experiment_key and one directory, as a script that is started again makes it:
#           loss 1.0 at step 1, then loss 2.0 at step 2.
# Behavior: the second replaces the archive of the first, when it starts, without a message. What the first logged is lost.
# Output:   1 archive: [2.0]
# Upstream: https://github.com/comet-ml/issue-tracking/issues/348 suggests this way to continue an offline experiment.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile comet-ml==3.58.8 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import json
import pathlib
import zipfile

import comet_ml

quiet = dict.fromkeys(("log_code", "log_graph", "log_env_details", "log_git_metadata", "auto_output_logging"), False)
for loss in (1.0, 2.0):
    experiment = comet_ml.OfflineExperiment(offline_directory="runs", experiment_key="a" * 32, **quiet)
    experiment.log_metric("loss", loss, step=int(loss))
    experiment.end()
archives = sorted(pathlib.Path("runs").glob("*.zip"))
messages = [json.loads(line) for path in archives for line in zipfile.ZipFile(path).read("messages.json").splitlines()]
metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
losses = [metric["metricValue"] for metric in metrics if metric["metricName"] == "loss"]
print(f"{len(archives)} archive:", losses)
if (len(archives), losses) != (1, [2.0]):
    raise SystemExit("the behavior has changed")
PY
