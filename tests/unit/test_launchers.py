"""Launchers other than torchrun: what they tell a process of its place, and what is refused by name."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import lumen as lm
from lumen.cli.doctor.processes import check_environment
from lumen.parallel.comm.hostlist import expand_hosts
from lumen.parallel.comm.init import join
from lumen.parallel.comm.launchers import (
    LAUNCHERS,
    TORCH_NAMES,
    VARIABLES,
    Launch,
    LaunchError,
    derive_port,
    read_launch,
)

# As Slurm 22.05 sets them for a task, Open MPI 5.0 and MPICH 5.0 for a process.
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[09-10]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "1",
    "SLURM_NTASKS": "4",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-vm-13563@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "11"}
ADDRESS = {"MASTER_ADDR": "there", "MASTER_PORT": "29501"}


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


def step(state, batch):
    return state, {"sum": batch.sum()}


@pytest.fixture
def told(monkeypatch):
    """Set what a launcher tells, and nothing else."""
    for name in (*TORCH_NAMES, "LOCAL_RANK", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


# ----------------------------------------------------------------------------------------------- lists of hosts


def written(prefix, runs):
    """A list of hosts in Slurm's notation, and its names: `runs` are first numbers, widths and lengths."""
    ranges = [f"{n:0{w}d}" if length == 1 else f"{n:0{w}d}-{n + length - 1:0{w}d}" for n, w, length in runs]
    return f"{prefix}[{','.join(ranges)}]", [f"{prefix}{n + i:0{w}d}" for n, w, length in runs for i in range(length)]


NAMES = st.sampled_from(["n", "node", "gpu-a", "rack7.", "x0"])
RUNS = st.tuples(st.integers(0, 120), st.integers(1, 4), st.integers(1, 5))
HOSTS = st.one_of(NAMES.map(lambda n: (n, [n])), st.builds(written, NAMES, st.lists(RUNS, min_size=1, max_size=3)))


@given(st.lists(HOSTS, min_size=1, max_size=4))
@example([written("node", [(1, 2, 4), (7, 2, 1)]), ("other", ["other"])])
@example([written("x", [(9, 1, 3)]), written("x", [(99, 2, 2)])])
def test_a_list_of_hosts_is_what_was_written(hosts):
    assert expand_hosts(",".join(text for text, _ in hosts)) == [name for _, names in hosts for name in names]


@given(st.text("a1-,[] ", max_size=12))
def test_any_text_is_a_list_of_hosts_or_is_refused(text):
    try:
        names = expand_hosts(text)
    except ValueError:
        return
    assert names
    assert not any(set(name) & set("[],") or not name for name in names)
    assert expand_hosts(",".join(names)) == names


@pytest.mark.parametrize("text", ["", "a,,b", "a[", "a[1-2", "a]1", "a[2-1]", "a[x]", "a[]", "a[1-2-3]", "a[[1]]"])
def test_what_is_no_list_of_hosts_is_refused(text):
    with pytest.raises(ValueError, match=r"node\[01-04,07\],other|such as 01-04"):
        expand_hosts(text)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm is not installed")
@pytest.mark.parametrize("text", ["node[01-04,07],other", "rack[0-1]n[1-2]", "x[9-11]", "x[09-11]", "x[3,1]"])
def test_slurm_reads_a_list_of_hosts_alike(text):
    said = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True, check=True)
    assert expand_hosts(text) == said.stdout.split()


# ------------------------------------------------------------------------------------------------------- ports


@given(st.integers(0, 2**31), st.integers(1, 12762), st.integers(0, 5000), st.integers(0, 5000))
def test_jobs_and_steps_have_ports_of_their_own(job, apart, step, other):
    assert derive_port(job) != derive_port(job + apart)
    assert (derive_port(job, step) == derive_port(job, other)) is (step == other)
    assert 20000 <= derive_port(job, step) < 32768  # below those of outgoing connections


# ---------------------------------------------------------------------------------------- what a launcher tells


def test_srun_tells_everything():
    run = "Slurm job 4711.1, restart 0"
    assert read_launch(SLURM) == Launch("srun", 2, 4, 0, "node09", derive_port(4711, 1), run)
    again = read_launch({**SLURM, "SLURM_RESTART_COUNT": "1"})
    assert again.run == "Slurm job 4711.1, restart 1"
    one_node = {**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "node09"}
    assert read_launch(one_node).address == "127.0.0.1"
    assert read_launch({**SLURM, **ADDRESS}).variables() == {
        "RANK": "2",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        **ADDRESS,
    }


@pytest.mark.parametrize(("variables", "name"), [(OPEN_MPI, "mpirun"), (HYDRA, "mpiexec")])
def test_mpi_on_one_node_needs_no_address(variables, name):
    launch = read_launch(variables)
    assert (launch.launcher, launch.rank, launch.size, launch.local_rank) == (name, 1, 2, 1)
    assert launch.address == "127.0.0.1"
    other = read_launch({**variables, "PMIX_NAMESPACE": "prterun-vm-14000@1"})
    assert launch.port != other.port, "two runs on a node"
    assert launch.run != other.run


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.rank)
def test_each_launcher_is_known_by_what_it_tells(launcher):
    told = {launcher.rank: "3", launcher.size: "8", launcher.local_rank[0]: "1", **ADDRESS}
    launch = read_launch(told)
    assert (launch.launcher, launch.rank, launch.size, launch.local_rank) == (launcher.name, 3, 8, 1)
    assert (launch.address, launch.port) == ("there", 29501)
    assert read_launch({**told, "LOCAL_RANK": "0"}).local_rank == 0
    assert read_launch({**told, launcher.rank: "0", launcher.size: "1"}) is None


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script, which srun did not start
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"MASTER_ADDR": "there", "MASTER_PORT": "29500", "WORLD_SIZE": "1"},
    ],
)
def test_one_process_is_alone(variables):
    assert read_launch(variables) is None
    assert check_environment(variables).detail.startswith("no launcher")


def test_torchrun_wins_over_the_srun_that_started_it():
    torchrun = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", **ADDRESS, "TORCHELASTIC_RUN_ID": "x"}
    assert read_launch({**SLURM, **torchrun}) == Launch("torchrun", 5, 16, 1, "there", 29501, "x")


def test_mpirun_wins_over_the_srun_that_started_its_daemons():
    """Inside a job Open MPI and Hydra start one daemon on each node by srun, and its processes inherit srun's."""
    daemon = {**SLURM, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    launch = read_launch({**daemon, **OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4", **ADDRESS})
    assert (launch.launcher, launch.rank, launch.size) == ("mpirun", 1, 4)
    both = {**SLURM, "PMI_RANK": "2", "PMI_SIZE": "4"}  # srun --mpi=pmi2
    assert read_launch(both) == read_launch(SLURM)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({**SLURM, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 must be less than SLURM_STEP_NUM_TASKS=4"),
        ({**SLURM, "SLURM_PROCID": "two"}, "SLURM_PROCID='two' must be a number.*env -u SLURM_PROCID"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "-4"}, "SLURM_STEP_NUM_TASKS='-4' must be a number"),
        ({**SLURM, "SLURM_LOCALID": "x"}, "SLURM_LOCALID='x' must be a number"),
        (without(SLURM, "SLURM_LOCALID"), "not SLURM_LOCALID, .*set LOCAL_RANK"),
        (without(SLURM, "SLURM_STEP_NUM_TASKS"), "SLURM_PROCID=2 says .* SLURM_STEP_NUM_TASKS is not set"),
        (without(SLURM, "SLURM_JOB_ID"), "SLURM_JOB_ID is not set: export MASTER_PORT"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST: .*export MASTER_ADDR=HOST"),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[9"}, "SLURM_STEP_NODELIST: 'node\\[9' is not a list of hosts"),
        ({**SLURM, "SLURM_STEP_NODELIST": "node9"}, "disagree.*SLURM_STEP_NUM_NODES=2, SLURM_STEP_NODELIST=node9"),
        ({**SLURM, "SLURM_PROCID": "0"}, "rank 0 is on node 1 of SLURM_STEP_NODELIST.*export MASTER_ADDR=HOST"),
        ({**SLURM, "SLURM_HET_SIZE": "2"}, "heterogeneous job.*export MASTER_ADDR=HOST"),
        ({**SLURM, "WORLD_SIZE": "8"}, "disagree.*SLURM_STEP_NUM_TASKS=4, WORLD_SIZE=8.*env -u WORLD_SIZE"),
        ({**SLURM, "RANK": "0"}, "disagree.*SLURM_PROCID=2, SLURM_STEP_NUM_TASKS=4, RANK=0"),
        ({**SLURM, **OPEN_MPI}, "disagree.*SLURM_PROCID=2, .*OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2"),
        ({**OPEN_MPI, **HYDRA, "PMI_SIZE": "3"}, "disagree.*OMPI_COMM_WORLD_SIZE=2, PMI_RANK=1, PMI_SIZE=3"),
        ({**OPEN_MPI, "PMIX_RANK": "0"}, "disagree.*PMIX_RANK=0"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "several nodes.*mpirun -x MASTER_ADDR=HOST -x MASTER_PORT"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"), "several nodes.*mpirun -x MASTER_ADDR=HOST"),
        (without(HYDRA, "MPI_LOCALNRANKS"), "several nodes.*mpiexec -env MASTER_ADDR HOST"),
        ({"PMIX_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is not set: start it with mpirun, .*env -u PMIX_RANK"),
        ({"RANK": "0"}, "WORLD_SIZE is not set: start it as: torchrun.*env -u RANK"),
        ({"WORLD_SIZE": "2"}, "RANK is not set: start it as: torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT is not set: start it as: torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2", **ADDRESS}, "RANK=2 must be less than WORLD_SIZE=2"),
        ({"RANK": "two", "WORLD_SIZE": "2", **ADDRESS}, "RANK='two' must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", **ADDRESS, "LOCAL_RANK": ""}, "LOCAL_RANK='' must be a number"),
        ({**OPEN_MPI, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        ({**OPEN_MPI, "MASTER_PORT": "http"}, "MASTER_PORT='http' must be a number"),
    ],
)
def test_what_cannot_be_right_is_refused(variables, match, told):
    with pytest.raises(lm.LumenError, match=match) as caught:
        read_launch(variables)
    assert isinstance(caught.value, LaunchError)
    finding = check_environment(variables)
    assert (finding.status, f"{finding.detail}: {finding.fix}") == ("broken", str(caught.value)), "doctor says the same"
    told(variables)
    with pytest.raises(lm.LumenError, match=match):
        join("cpu", timeout=1.0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: lm.Runner(step, progress=False).fit({}, [torch.ones(1)], until=lm.Steps(1)),
        lambda: lm.evaluate(lambda state, batch: {}, {}, [torch.ones(1)]),
        lambda: list(lm.predict(lambda state, batch: batch, {}, [torch.ones(1)])),
    ],
    ids=["fit", "evaluate", "predict"],
)
def test_processes_of_srun_do_not_train_alone(ask, told):
    told(SLURM)
    with pytest.raises(lm.LumenError, match=r"one of 4 that were started together, and nothing joins them.*lm\.ddp"):
        ask()


# ------------------------------------------------------------------------------------------------------ devices


def test_a_process_that_sees_one_gpu_uses_it(monkeypatch):
    """As under `srun --gpus-per-task=1`; torchrun's processes see all GPUs of their node."""
    launch = read_launch({**SLURM, "SLURM_LOCALID": "1"})
    assert [launch.gpu(count) for count in (1, 2)] == [0, 1]
    assert read_launch({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **ADDRESS}).gpu(1) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check_environment({**SLURM, "SLURM_LOCALID": "1"}).status == "ok"


def test_doctor_says_how_a_launcher_joins():
    finding = check_environment(SLURM)
    port = derive_port(4711, 1)
    assert finding.detail == f"srun: RANK=2, WORLD_SIZE=4, MASTER_ADDR=node09, MASTER_PORT={port}, LOCAL_RANK=0"
