"""Launchers other than torchrun: a process that would train alone says so before its first step."""

from __future__ import annotations

import pytest
import torch

import lumen as lm
from lumen.parallel.comm.init import _LAUNCHERS, check_launcher

SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}


def step(state, batch):
    return state, {"sum": batch.sum()}


@pytest.fixture
def told(monkeypatch):
    """Set what a launcher tells, and nothing else."""
    for name in ("RANK", "WORLD_SIZE", *(name for launcher in _LAUNCHERS for name in launcher[1:])):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    "ask",
    [
        lambda: lm.mesh(device="cpu"),
        lambda: lm.Runner(step, progress=False).fit({}, [torch.ones(1)], until=lm.Steps(1)),
        lambda: lm.evaluate(lambda state, batch: {}, {}, [torch.ones(1)]),
        lambda: list(lm.predict(lambda state, batch: batch, {}, [torch.ones(1)])),
    ],
    ids=["mesh", "fit", "evaluate", "predict"],
)
def test_processes_of_srun_do_not_train_alone(ask, told):
    told(SLURM)
    with pytest.raises(lm.LumenError, match=r"SLURM_STEP_NUM_TASKS=4, SLURM_PROCID=2\).*srun .*torchrun --nnodes"):
        ask()


@pytest.mark.parametrize(("launcher", "size", "rank"), _LAUNCHERS)
def test_each_launcher_is_known_by_what_it_tells(launcher, size, rank, told):
    told({size: "2", rank: "0"})
    with pytest.raises(lm.LumenError, match=f"one of 2 that {launcher} started.*env -u {size}"):
        check_launcher()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, which srun did not start
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {**SLURM, "RANK": "0", "WORLD_SIZE": "1"},  # torchrun below srun
    ],
)
def test_one_process_and_those_of_torchrun_are_let_pass(variables, told):
    told(variables)
    check_launcher()
