"""The store through which the ranks of a world find each other, also after `torchrun` has restarted them.

Torchrun's agents keep one store for all restarts, with the keys of earlier attempts: addresses of dead processes, for
one. So the ranks of one attempt first agree on a name that is new, and then use only keys below it. An agent's number
of restarts cannot be that name, as each agent counts its own.

Without an agent rank 0 serves the store. At its address there may be something else: another job, an earlier run of
this one, or a service that never answers. So each rank first checks whose store it has reached, and that no other
process has its rank.
"""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from lumen.errors import WorldError
from lumen.parallel.comm.launchers import Launch

_PAUSE = 0.01


def rendezvous(launch: Launch, timeout: dt.timedelta) -> Store:
    """The store of this launch's ranks, without anything of an earlier attempt.

    Raises `WorldError` where they have not all come in time, or another run has this one's address.
    """
    until = time.monotonic() + timeout.total_seconds()
    if launch.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, *_ = next(torch_rendezvous("env://", timeout=timeout))
        return _agree(store, launch, until)
    store = _connect(launch, timeout)
    try:
        _check_world(PrefixStore("lumen/world", store), launch, until)
        return _agree(store, launch, until)
    except dist.DistError as error:
        raise WorldError(f"{_where(launch)} has ended while processes joined: see its output. {error}") from error


def _where(launch: Launch) -> str:
    return f"rank 0, at {launch.address}:{launch.port},"


def _connect(launch: Launch, timeout: dt.timedelta) -> Store:
    """Rank 0's store; in a thread, as torch's (2.13) waits forever for the answer of a service that is no store."""
    results: list[Store | Exception] = []

    def connect() -> None:
        try:
            results.append(
                TCPStore(
                    launch.address,
                    launch.port,
                    is_master=launch.rank == 0,
                    timeout=timeout,
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            )
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=connect, daemon=True, name="lumen-connect")
    thread.start()
    thread.join(timeout.total_seconds() + 1.0)  # torch's own error comes first
    match results:
        case [Exception() as error]:
            raise WorldError(_unreachable(launch)) from error
        case [Store() as store]:
            return store
    raise WorldError(_unreachable(launch))


def _unreachable(launch: Launch) -> str:
    if launch.rank == 0:
        return (
            f"rank 0 cannot listen on port {launch.port}: another run may use it, or a process of an earlier run has"
            " not ended. End it, or choose another port: export MASTER_PORT=29500"
        )
    return (
        f"rank {launch.rank} has not reached {_where(launch)} in time. It may have failed before lm.mesh(): see its"
        f" output. Or {launch.address} may not be its node: export MASTER_ADDR=HOST MASTER_PORT=29500. Or allow more"
        " time: lm.mesh(timeout=1200)."
    )


def _check_world(store: Store, launch: Launch, until: float) -> None:
    """Raise `WorldError` if this store is not that of this run's rank 0, or another process has this rank."""
    mine = f"{launch.size} processes of {launch.run or 'one run'}"
    if launch.rank == 0:
        store.set("world", mine)
    elif not _wait_for(lambda: store.check(["world"]), until):
        raise WorldError(_unreachable(launch))
    theirs = store.get("world").decode()
    if theirs != mine:
        if theirs.partition(" ")[2] == mine.partition(" ")[2]:
            store.set("other size", f"rank {launch.rank} is one of {mine}")
        raise WorldError(
            f"rank {launch.rank} is one of {mine}, but {_where(launch)} serves {theirs}. Another run may use this port,"
            " or a process of an earlier run has not ended. End it, start all processes alike, or choose another port:"
            " export MASTER_PORT=29500"
        )
    process = f"process {os.getpid()} on {socket.gethostname()}"
    holder = store.compare_set(f"rank/{launch.rank}", "", process).decode()
    if holder != process:
        raise WorldError(
            f"{process} has rank {launch.rank}, which {holder} has, too. Each process of a world needs a rank of its"
            " own, and one that has failed is started again together with the others."
        )


def _agree(store: Store, launch: Launch, until: float) -> Store:
    """The store below a name that the ranks of this attempt agree on."""
    attempts = PrefixStore("lumen/attempt", store)
    world = PrefixStore("lumen/world", store)
    name = _invite(attempts, world, launch.size, until) if launch.rank == 0 else _accept(attempts, launch.rank, until)
    return PrefixStore(name, attempts)


def _invite(store: Store, world: Store, size: int, until: float) -> str:
    """On rank 0: a new name, sent to each other rank in answer to that rank's newest word."""
    name = uuid.uuid4().hex
    here = PrefixStore(name, store)
    missing = set(range(1, size))

    def all_here() -> bool:
        if world.check(["other size"]):
            raise WorldError(
                f"{world.get('other size').decode()}, and rank 0 one of {size}: start all with the same WORLD_SIZE."
            )
        for rank in [*missing]:
            if here.check([f"here/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):  # perhaps of an earlier attempt: checked again until it answers
                store.set(f"answer/{rank}", f"{store.get(f'hello/{rank}').decode()} {name}")
        return not missing

    if not _wait_for(all_here, until):
        raise WorldError(
            f"ranks {sorted(missing)} of {size} have not joined this world in time. They may have failed before"
            " lm.mesh(): see their output. Or allow more time: lm.mesh(timeout=1200)."
        )
    return name


def _accept(store: Store, rank: int, until: float) -> str:
    """On other ranks: publish a unique word, and return the name that rank 0 answers it with."""
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    names: list[str] = []

    def answered() -> bool:
        if store.check([f"answer/{rank}"]):
            answer, _, name = store.get(f"answer/{rank}").decode().partition(" ")
            names.extend([name] if answer == word else [])
        return bool(names)

    if not _wait_for(answered, until):
        raise WorldError(
            f"rank 0 has not joined this world, so rank {rank} cannot. It may have failed before lm.mesh(): see its"
            " output. Or allow more time: lm.mesh(timeout=1200)."
        )
    PrefixStore(names[0], store).set(f"here/{rank}", "")
    return names[0]


def _wait_for(condition: Callable[[], bool], until: float) -> bool:
    while not (done := condition()) and time.monotonic() < until:
        time.sleep(_PAUSE)
    return done
