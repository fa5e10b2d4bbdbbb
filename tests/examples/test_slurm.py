"""The sbatch script of the examples, with a `srun` that starts processes here: a stopped job is queued and resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lumen as lm
from lumen.parallel.comm.launchers import TORCH_NAMES, VARIABLES
from tests import zygote
from tests.examples import slurm_job

SCRIPT = Path(__file__).parents[2] / "examples/slurm/train.sbatch"
# Leaves its arguments for the test, which starts the processes and answers with their exit code.
SRUN = """
printf "%s\\n" "$@" > asked.new
mv asked.new asked
until [ -e answer ]; do sleep 0.02; done
exit $(cat answer)
"""


def start_batch(folder, job, restart):
    """The script as Slurm starts it, on a node of its own."""
    for name, body in {"srun": SRUN, "scontrol": 'echo "$@" >> queued'}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name not in {*TORCH_NAMES, *VARIABLES}}
    environment = {
        **inherited,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job),
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_CPUS_PER_TASK": "8",
        **({"SLURM_RESTART_COUNT": str(restart)} if restart else {}),
    }
    command = ["bash", str(SCRIPT), slurm_job.__file__, "run"]
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True), environment


def wait_for(condition):
    until = time.monotonic() + 100.0
    while not condition():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.01)


def play(folder, job=7, restart=0, preempt=False):
    """Run the script; what it asked of srun, its exit code, and what its processes said."""
    batch, environment = start_batch(folder, job, restart)
    tasks = []
    try:
        wait_for((folder / "asked").exists)
        asked = (folder / "asked").read_text().split("\n")[:-1]
        program = [sys.executable, *asked[asked.index("python") + 1 :]]
        for rank in range(2):
            step = {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_STEP_NODELIST": "node07",
                "SLURM_STEP_ID": "0",
            }
            tasks.append(
                zygote.start(
                    program, cwd=folder, env={**environment, **step}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
            )
        if preempt:
            wait_for(lambda: all((folder / f"run/waits{rank}").exists() for rank in range(2)))
            for task in tasks:
                task.send_signal(signal.SIGTERM)
            (folder / "run/go on").touch()
        said = [task.communicate(timeout=100)[1] for task in tasks]
        (folder / "answer").write_text(str(max(task.returncode % 256 for task in tasks)))
        return asked, batch.wait(timeout=60), said
    finally:
        for task in tasks:
            task.kill()
        batch.kill()
        batch.wait()


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_preempted_job_is_queued_again_and_resumes(tmp_path):
    (tmp_path / "run").mkdir()
    job = os.getpid()
    asked, code, said = play(tmp_path, job, preempt=True)
    assert code == 75, said
    assert asked[:2] == ["--kill-on-bad-exit=0", "--cpus-per-task=8"]
    assert (tmp_path / "queued").read_text() == f"requeue {job}\n"
    assert 4 <= lm.Checkpointer(tmp_path / "run").store.latest() < slurm_job.STEPS
    for name in ("asked", "answer", "queued"):
        (tmp_path / name).unlink()
    _, code, said = play(tmp_path, job, restart=1)
    assert code == 0, said
    assert not (tmp_path / "queued").exists()
    resumed = lm.checkpoint.load(lm.Checkpointer(tmp_path / "run").latest())
    uninterrupted = slurm_job.train(tmp_path / "alone").state  # one process on all rows
    for name, value in uninterrupted.params.items():
        torch.testing.assert_close(resumed["params"][name], value)


@pytest.mark.parametrize(("code", "queued"), [(0, False), (1, False), (143, False), (75, True)])
def test_only_code_75_queues_a_job_again(code, queued, tmp_path):
    batch, _ = start_batch(tmp_path, 7, 0)
    (tmp_path / "answer").write_text(str(code))
    assert batch.wait(timeout=60) == code
    assert (tmp_path / "queued").exists() is queued


def test_the_page_on_clusters_has_the_script():
    text = SCRIPT.read_text()
    assert text[text.index("#SBATCH") :] in (SCRIPT.parents[2] / "docs/clusters.md").read_text()
