"""Finding each other over a store that an earlier attempt has used."""

from __future__ import annotations

import datetime as dt
import threading

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore

import lumen as lm
from lumen.parallel.comm import rendezvous

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def meet(monkeypatch):
    """`meet(store, ranks, size)`: what each of these ranks gets, from threads in place of processes."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    here = threading.local()
    monkeypatch.setattr(rendezvous, "torch_rendezvous", lambda *args, **options: iter([here.given]))

    def run(store, ranks, size, seconds=20.0):
        found = {}

        def each(rank):
            here.given = (store, rank, size)
            try:
                found[rank] = rendezvous.rendezvous(dt.timedelta(seconds=seconds))
            except lm.LumenError as error:
                found[rank] = error

        threads = [threading.Thread(target=each, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


def test_an_attempt_sees_nothing_of_those_before(meet):
    store = HashStore()
    for attempt, size in enumerate((3, 3, 2, 4)):
        found = meet(store, range(size), size)
        for rank in range(size):
            mine, *place = found[rank]
            assert place == [rank, size]
            assert not mine.check([f"address/{rank}"]), f"attempt {attempt} sees an older one's"
            mine.set(f"address/{rank}", str(attempt))
        assert all(found[rank][0].get(f"address/{r}") == b"%d" % attempt for rank in range(size) for r in range(size))


def test_an_attempt_that_only_some_came_to(meet):
    store = HashStore()
    found = meet(store, [0, 2], 3, seconds=0.3)
    assert "ranks [1] of 3" in str(found[0])
    assert isinstance(found[2][0], PrefixStore), "it was answered"
    assert "rank 0 has not joined" in str(meet(store, [1, 2], 3, seconds=0.3)[1])
    found = meet(store, range(3), 3)
    found[1][0].set("address", "new")
    assert [found[rank][0].get("address") for rank in range(3)] == [b"new"] * 3
