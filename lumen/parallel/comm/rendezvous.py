"""The store through which a world's processes find each other, also after `torchrun` has started them again.

Torchrun's agents keep one store for all restarts, and what the processes of an earlier attempt have written is still
there: the addresses of the dead, for one. So those of one attempt first agree on a name that nobody has used, and then
see only keys below it. How often an agent has restarted cannot be that name, as each agent counts its own restarts.
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
    meeting = PrefixStore("lumen/attempt", store)
    until = time.monotonic() + timeout.total_seconds()
    name = _invite(meeting, size, until) if rank == 0 else _accept(meeting, rank, until)
    return PrefixStore(name, meeting), rank, size


def _invite(store: Store, size: int, until: float) -> str:
    """The first process's part: a name, given to each other process in answer to the newest thing it said."""
    name = uuid.uuid4().hex
    here = PrefixStore(name, store)
    missing = set(range(1, size))

    def all_here() -> bool:
        for rank in [*missing]:
            if here.check([f"here/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):  # perhaps that of an earlier attempt: it is asked again
                store.set(f"answer/{rank}", f"{store.get(f'hello/{rank}').decode()} {name}")
        return not missing

    if not _wait_for(all_here, until):
        raise WorldError(
            f"ranks {sorted(missing)} of {size} have not come to join this world in time. They may have failed before"
            " lm.mesh(), see their output; or give more time: lm.mesh(timeout=1200)."
        )
    return name


def _accept(store: Store, rank: int, until: float) -> str:
    """The others' part: say hello by a word that nobody else says, and take the name that comes in answer to it."""
    word = uuid.uuid4().hex
    store.set(f"hello/{rank}", word)
    found: list[str] = []

    def answered() -> bool:
        if store.check([f"answer/{rank}"]):
            answer, _, name = store.get(f"answer/{rank}").decode().partition(" ")
            found.extend([name] if answer == word else [])
        return bool(found)

    if not _wait_for(answered, until):
        raise WorldError(
            f"rank 0 has not come to join this world, so rank {rank} cannot. It may have failed before lm.mesh(), see"
            " its output; or give more time: lm.mesh(timeout=1200)."
        )
    PrefixStore(found[0], store).set(f"here/{rank}", "")
    return found[0]


def _wait_for(condition: Callable[[], bool], until: float) -> bool:
    while not (done := condition()) and time.monotonic() < until:
        time.sleep(_PAUSE)
    return done
