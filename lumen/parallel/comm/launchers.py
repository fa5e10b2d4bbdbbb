"""How a process learns its rank, the world size and rank 0's address from the launcher that started it.

torchrun sets RANK and WORLD_SIZE for torch.distributed to read. `srun`, `mpirun` and others say the same in variables
of their own, from which `read_launch` derives what torchrun would have set.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lumen.errors import WorldError
from lumen.parallel.comm.hostlist import expand_hosts

TORCH_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN = "start it as: torchrun --nproc-per-node=2 train.py"


class LaunchError(WorldError):
    """Variables of a launcher that do not say where this process belongs: what is wrong, and how to start it."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}: {fix}")
        self.problem, self.fix = problem, fix


@dataclass(frozen=True)
class Launch:
    """One process of several: what torchrun sets in variables, and the name of the run, the same for all of them."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    run: str

    def variables(self) -> dict[str, str]:
        """The variables that torchrun would have set for this process."""
        numbers = (self.rank, self.size, self.address, self.port, self.local_rank)
        return dict(zip((*TORCH_NAMES, "LOCAL_RANK"), map(str, numbers), strict=True))

    def gpu(self, count: int) -> int:
        """The index of this process's GPU among the `count` that it sees.

        Slurm may show each process its own GPU alone, as with --gpus-per-task=1.
        """
        return 0 if count == 1 and self.launcher != "torchrun" else self.local_rank


@dataclass(frozen=True)
class _Launcher:
    """The variables in which a launcher passes numbers to its processes; of several names, the first that is set."""

    name: str
    size: str
    rank: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()  # if it is the world size, there is one node
    nodes: tuple[str, ...] = ()

    def names(self) -> Iterator[str]:
        yield from (self.size, self.rank, *self.local_rank, *self.local_size, *self.nodes)


# SLURM_NTASKS would not do: Slurm sets it in a batch script too, where one process runs. Only srun sets
# SLURM_STEP_NUM_TASKS. Hydra, of MPICH and Intel MPI, sets MPI_LOCALRANKID; Cray's PALS sets PMI_LOCAL_RANK.
_SRUN = _Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", ("SLURM_LOCALID",), nodes=("SLURM_STEP_NUM_NODES",))
_OTHERS = (
    *(
        _Launcher(name, f"{prefix}_SIZE", f"{prefix}_RANK", (f"{prefix}_LOCAL_RANK",), (f"{prefix}_LOCAL_SIZE",))
        for name, prefix in (("mpirun", "OMPI_COMM_WORLD"), ("mpirun", "MV2_COMM_WORLD"), ("jsrun", "JSM_NAMESPACE"))
    ),
    _Launcher(
        "mpiexec", "PMI_SIZE", "PMI_RANK", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
    ),
    _Launcher("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK", ("FLUX_TASK_LOCAL_ID",), nodes=("FLUX_JOB_NNODES",)),
)
LAUNCHERS = (_SRUN, *_OTHERS)
VARIABLES = tuple(dict.fromkeys(["PMIX_RANK", *(name for launcher in LAUNCHERS for name in launcher.names())]))
# What names a run of a launcher other than srun, the same in all its processes.
_RUN_IDS = ("PMIX_NAMESPACE", "I_MPI_HYDRA_UUID", "FLUX_JOB_ID", "LSB_JOBID", "PBS_JOBID", "SLURM_JOB_ID")
# Below the ports that Linux gives to outgoing connections, 32768 to 60999. With a prime number of them the steps of a
# job have different ports, too.
_FIRST_PORT, _PORTS, _STRIDE = 20000, 12763, 4099


def derive_port(job: int, step: int = 0) -> int:
    """The port of a job's step: jobs whose ids differ by less than 12763 have different ports, and so do a job's steps.

    >>> derive_port(4711), derive_port(4712), derive_port(4711, step=1)
    (24711, 24712, 28810)
    """
    return _FIRST_PORT + (job + _STRIDE * step) % _PORTS


def read_launch(variables: Mapping[str, str]) -> Launch | None:
    """This process as one of several, or None where no launcher has started more than one.

    RANK and WORLD_SIZE together are torchrun's, and win over other launchers. MASTER_ADDR, MASTER_PORT and LOCAL_RANK
    win over derived values.

    Raises `LaunchError` where variables contradict each other or give no address.

    >>> launch = read_launch({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"})
    >>> launch.launcher, launch.rank, launch.size, launch.address
    ('mpiexec', 1, 2, '127.0.0.1')
    """
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return _read_torchrun(variables)
    answer = _find_launcher(variables)
    if answer is None:
        _check_alone(variables)
        return None
    launcher, rank, size = answer
    if size == 1:
        return None
    one_node = _is_one_node(launcher, variables, size)
    run = _run(launcher, variables)
    return Launch(
        launcher.name,
        rank,
        size,
        _local_rank(launcher, variables),
        variables.get("MASTER_ADDR") or ("127.0.0.1" if one_node else _address(launcher, variables, rank)),
        _port(variables) or _derived_port(launcher, variables, run),
        run,
    )


def _read_torchrun(variables: Mapping[str, str]) -> Launch:
    missing = [name for name in TORCH_NAMES if not variables.get(name)]
    if missing:
        raise LaunchError(
            f"this process is one of WORLD_SIZE={variables['WORLD_SIZE']}, but {', '.join(missing)} is not set",
            f"{_TORCHRUN}, or as a single process: env -u RANK -u WORLD_SIZE python train.py",
        )
    rank, size = _rank_and_size(variables, "RANK", "WORLD_SIZE")
    local_rank = _number(variables, "LOCAL_RANK") if "LOCAL_RANK" in variables else 0
    run = variables.get("TORCHELASTIC_RUN_ID", "")
    return Launch("torchrun", rank, size, local_rank, variables["MASTER_ADDR"], _port(variables), run)


def _find_launcher(variables: Mapping[str, str]) -> tuple[_Launcher, int, int] | None:
    """The launcher that started this process, its rank and the world size; all that say so must agree."""
    present = [launcher for launcher in LAUNCHERS if launcher.size in variables and launcher.rank in variables]
    claims = {launcher: _rank_and_size(variables, launcher.rank, launcher.size) for launcher in present}
    if len(set(claims.values())) > 1 and _SRUN in present and _starts_daemons(variables, claims[_SRUN][1]):
        present.remove(_SRUN)
    if not present:
        return None
    launcher, *others = present
    rank, size = claims[launcher]
    for other in others:
        if claims[other] != (rank, size):
            raise _contradiction(variables, [launcher.rank, launcher.size, other.rank, other.size])
    for name, expected in (("RANK", rank), ("WORLD_SIZE", size), ("PMIX_RANK", rank)):
        if name in variables and _number(variables, name) != expected:
            raise _contradiction(variables, [launcher.rank, launcher.size, name])
    return launcher, rank, size


def _starts_daemons(variables: Mapping[str, str], tasks: int) -> bool:
    """Whether srun may have started one daemon of another launcher on each node, as mpirun has it do inside a job."""
    return variables.get("SLURM_STEP_NUM_NODES") == str(tasks)


def _check_alone(variables: Mapping[str, str]) -> None:
    """Raise `LaunchError` if a variable says that this process is one of several, but not of how many."""
    for rank, size, stray in (
        ("RANK", "WORLD_SIZE", True),
        ("WORLD_SIZE", "RANK", variables.get("WORLD_SIZE") != "1"),
        ("SLURM_PROCID", _SRUN.size, variables.get("SLURM_PROCID") != "0"),  # a batch script has SLURM_PROCID=0
        ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE", True),
    ):
        if rank in variables and stray:
            start = "start it with mpirun" if rank == "PMIX_RANK" else _TORCHRUN
            raise LaunchError(
                f"{rank}={variables[rank]} says that this process is one of several, but {size} is not set",
                f"{start}, or as a single process: env -u {rank} python train.py",
            )


def _local_rank(launcher: _Launcher, variables: Mapping[str, str]) -> int:
    names = [name for name in ("LOCAL_RANK", *launcher.local_rank) if name in variables]
    if not names:
        raise LaunchError(
            f"{launcher.name} has set {launcher.rank}={variables[launcher.rank]}, but not {launcher.local_rank[0]},"
            " by which the processes of a node share its GPUs",
            "set LOCAL_RANK, which is 0 for a node's first process",
        )
    return _number(variables, names[0])


def _is_one_node(launcher: _Launcher, variables: Mapping[str, str], size: int) -> bool:
    nodes = [_number(variables, name) for name in launcher.nodes if name in variables]
    local_sizes = [_number(variables, name) for name in launcher.local_size if name in variables]
    return nodes[:1] == [1] or local_sizes[:1] == [size]


def _address(launcher: _Launcher, variables: Mapping[str, str], rank: int) -> str:
    """The node of rank 0 of several nodes: only srun says which that is."""
    fix = f"name the node of rank 0, HOST in this line: {_assign_address(launcher)}"
    if launcher is not _SRUN:
        raise LaunchError(f"{launcher.name} may have started processes on several nodes, but names no address", fix)
    if variables.get("SLURM_HET_SIZE", "1") != "1":
        raise LaunchError("the steps of a heterogeneous job have several lists of nodes", fix)
    if rank == 0 and variables.get("SLURM_NODEID", "0") != "0":
        problem = f"rank 0 is on node {variables['SLURM_NODEID']} of SLURM_STEP_NODELIST, not on the first"
        raise LaunchError(problem, fix)
    nodes = variables.get("SLURM_STEP_NODELIST", "")
    try:
        hosts = expand_hosts(nodes)
    except ValueError as error:
        raise LaunchError(f"SLURM_STEP_NODELIST: {error}", fix) from None
    if str(len(hosts)) != variables.get("SLURM_STEP_NUM_NODES"):
        raise _contradiction(variables, ["SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST"])
    return hosts[0]


def _assign_address(launcher: _Launcher) -> str:
    """The line that sets an address in all processes of a launcher."""
    if launcher.size == "OMPI_COMM_WORLD_SIZE":
        return "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 python train.py"
    if launcher.size == "PMI_SIZE":
        return "mpiexec -env MASTER_ADDR HOST -env MASTER_PORT 29500 python train.py"
    return "export MASTER_ADDR=HOST MASTER_PORT=29500"


def _run(launcher: _Launcher, variables: Mapping[str, str]) -> str:
    if launcher is _SRUN:
        restart = variables.get("SLURM_RESTART_COUNT", "0")
        return f"Slurm job {variables.get('SLURM_JOB_ID')}.{variables.get('SLURM_STEP_ID')}, restart {restart}"
    run_id = next((variables[name] for name in _RUN_IDS if name in variables), f"of user {os.getuid()}")
    return f"{launcher.name} {run_id}"


def _derived_port(launcher: _Launcher, variables: Mapping[str, str], run: str) -> int:
    if launcher is not _SRUN:
        return derive_port(zlib.crc32(run.encode()))
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name not in variables]
    if missing:
        problem = f"a port is derived from the job's id and its step's, and {', '.join(missing)} is not set"
        raise LaunchError(problem, "export MASTER_PORT=29500")
    return derive_port(_number(variables, "SLURM_JOB_ID"), _number(variables, "SLURM_STEP_ID"))


def _port(variables: Mapping[str, str]) -> int:
    """MASTER_PORT, or 0 where it is not set."""
    if not variables.get("MASTER_PORT"):
        return 0
    port = _number(variables, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise LaunchError(f"MASTER_PORT={port} is not a port, 1 to 65535", "export MASTER_PORT=29500")
    return port


def _rank_and_size(variables: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _number(variables, rank_name), _number(variables, size_name)
    if rank >= size:
        raise LaunchError(f"{rank_name}={rank} must be less than {size_name}={size}", _unset([rank_name, size_name]))
    return rank, size


def _number(variables: Mapping[str, str], name: str) -> int:
    value = variables[name]
    if not (value.isascii() and value.isdecimal()):
        raise LaunchError(f"{name}={value!r} must be a number", _unset([name]))
    return int(value)


def _contradiction(variables: Mapping[str, str], names: Sequence[str]) -> LaunchError:
    settings = ", ".join(f"{name}={variables.get(name, '')}" for name in dict.fromkeys(names))
    return LaunchError(f"launchers disagree about this process: {settings}", _unset(names[-1:]))


def _unset(names: Sequence[str]) -> str:
    return f"unset what does not belong to this run, such as: env {' '.join(f'-u {n}' for n in names)} python train.py"
