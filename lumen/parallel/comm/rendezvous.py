"""The store through which the ranks of a world find each other, also after `torchrun` has restarted them.

Torchrun's agents keep one store for all restarts, with the keys of earlier attempts: addresses of dead processes, for
one. So the ranks of one attempt first agree on a name that is new, and then use only keys below it. An agent's number
of restarts cannot be that name, as each agent counts its own.
"""

from __future__ import annotations

import datetime as dt
import os
import time
import uuid
from collections.abc import Callable

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from lumen.errors import WorldError

_PAUSE = 0.01


def rendezvous(timeout: dt.timedelta) -> tuple[Store, int, int]:
    """`(store, rank, world size)` from the environment, the store without anything of an earlier attempt."""
    store, rank, size = next(torch_rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store, rank, size
    attempts = PrefixStore("lumen/attempt", store)
    until = time.monotonic() + timeout.total_seconds()
    name = _invite(attempts, size, until) if rank == 0 else _accept(attempts, rank, until)
    return PrefixStore(name, attempts), rank, size


def _invite(store: Store, size: int, until: float) -> str:
    """On rank 0: a new name, sent to each other rank in answer to that rank's newest word."""
    name = uuid.uuid4().hex
    here = PrefixStore(name, store)
    missing = set(range(1, size))

    def all_here() -> bool:
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
