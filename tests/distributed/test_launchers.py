"""Processes that only a launcher's own variables describe, without torchrun, train as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid

import pytest
import torch

from lumen.parallel.comm.launchers import TORCH_NAMES, VARIABLES, derive_port
from tests import zygote
from tests.distributed import launched_job

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

JOB = os.getpid()
# Two tasks on two nodes, one of them this machine; the others are on one node.
SRUN = {
    "SLURM_PROCID": "{rank}",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "{rank}",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "localhost,other[07-07]",
    "SLURM_JOB_ID": str(JOB),
    "SLURM_STEP_ID": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "{rank}",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "{rank}",
    "PMIX_NAMESPACE": f"prterun-{uuid.uuid4()}@1",
}
HYDRA = {
    "PMI_RANK": "{rank}",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "{rank}",
    "MPI_LOCALNRANKS": "2",
    "I_MPI_HYDRA_UUID": str(uuid.uuid4()),
}


@pytest.mark.parametrize(("variables", "address"), [(SRUN, "localhost"), (OPEN_MPI, "127.0.0.1"), (HYDRA, "127.0.0.1")])
def test_two_processes_train_as_one_on_all_rows(variables, address, tmp_path):
    inherited = {name: value for name, value in os.environ.items() if name not in {*TORCH_NAMES, *VARIABLES}}
    jobs = [
        zygote.start(
            [sys.executable, launched_job.__file__, str(tmp_path)],
            env={**inherited, **{name: value.format(rank=rank) for name, value in variables.items()}},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        for job in jobs:
            _, said = job.communicate(timeout=100)
            assert job.returncode == 0, said
    finally:
        for job in jobs:
            job.kill()
    state, rows = launched_job.parts()
    expected = launched_job.step(state, rows)[0].params
    for rank in range(2):
        answer = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, value in answer["params"].items():
            torch.testing.assert_close(torch.tensor(value), expected[name])
        told = answer["variables"]
        assert (told["RANK"], told["WORLD_SIZE"], told["MASTER_ADDR"]) == (str(rank), "2", address)
        assert told["LOCAL_RANK"] == ("0" if variables is SRUN else str(rank))
        assert variables is not SRUN or told["MASTER_PORT"] == str(derive_port(JOB, 3))
