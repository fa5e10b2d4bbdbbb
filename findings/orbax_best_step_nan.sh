#!/usr/bin/env bash
# Package:  orbax-checkpoint 0.12.8 with jax 0.10.2.
# Input:    CheckpointManager with max_to_keep=2, a best_fn that returns the loss, and best_mode="min"; three saves with the
#           losses 1, NaN, 2, and in another folder with 2, 1, NaN.
# Behavior: checkpoints are sorted by the number that best_fn returns. As NaN compares as false with everything, the order
#           is that of chance: the best checkpoint is deleted, and best_step() is the one whose loss is NaN.
#           Right are best_step() 0 and 1, neither of them deleted.
# Output:   losses [1.0, nan, 2.0]: kept [1, 2], best_step() 2
#           losses [2.0, 1.0, nan]: kept [1, 2], best_step() 2
# Upstream: the documentation of best_fn does not mention NaN; no issue was found.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PY'
import tempfile

import numpy as np
import orbax.checkpoint as ocp

options = ocp.CheckpointManagerOptions(
    max_to_keep=2, best_fn=lambda metrics: metrics["loss"], best_mode="min", enable_async_checkpointing=False
)


def train(losses):
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder, options=options) as manager:
        for step, loss in enumerate(losses):
            manager.save(step, args=ocp.args.StandardSave({"w": np.full(2, step)}), metrics={"loss": loss})
        return sorted(manager.all_steps()), manager.best_step()


seen = []
for losses in ([1.0, float("nan"), 2.0], [2.0, 1.0, float("nan")]):
    kept, best = train(losses)
    seen.append((kept, best))
    print(f"losses {losses}: kept {kept}, best_step() {best}")
if seen != [([1, 2], 2), ([1, 2], 2)]:
    raise SystemExit("the behavior has changed")
PY
