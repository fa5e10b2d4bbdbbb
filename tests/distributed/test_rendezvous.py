"""Finding each other over a store that an earlier attempt has used, or at an address where something else is."""

from __future__ import annotations

import datetime as dt
import socket
import threading

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore

import lumen as lm
from lumen.parallel.comm import rendezvous
from lumen.parallel.comm.launchers import Launch
from tests.zygote import free_ports

pytestmark = pytest.mark.timeout(60)


def come(launches, seconds=20.0, before=lambda launch: None):
    """What each process of `launches` gets, from threads in place of processes: its store, or its error."""
    found = [None] * len(launches)

    def each(index, launch):
        before(launch)
        try:
            found[index] = rendezvous.rendezvous(launch, dt.timedelta(seconds=seconds))
        except lm.LumenError as error:
            found[index] = error

    threads = [threading.Thread(target=each, args=each_launch) for each_launch in enumerate(launches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def launch(rank, size, port, run="", launcher="srun"):
    return Launch(launcher, rank, size, rank, "127.0.0.1", port, run)


@pytest.fixture
def meet(monkeypatch):
    """`meet(store, ranks, size)`: what each of these ranks gets from the store of torchrun's agent."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    here = threading.local()
    monkeypatch.setattr(rendezvous, "torch_rendezvous", lambda *args, **options: iter([here.given]))

    def run(store, ranks, size, seconds=20.0):
        launches = [launch(rank, size, 0, launcher="torchrun") for rank in ranks]
        found = come(launches, seconds, lambda each: setattr(here, "given", (store, each.rank, size)))
        return dict(zip(ranks, found, strict=True))

    return run


def test_an_attempt_sees_nothing_of_those_before(meet):
    store = HashStore()
    for attempt, size in enumerate((3, 3, 2, 4)):
        found = meet(store, range(size), size)
        for rank in range(size):
            mine = found[rank]
            assert not mine.check([f"address/{rank}"]), f"attempt {attempt} sees an older one's"
            mine.set(f"address/{rank}", str(attempt))
        assert all(found[rank].get(f"address/{r}") == b"%d" % attempt for rank in range(size) for r in range(size))


def test_an_attempt_that_only_some_came_to(meet):
    store = HashStore()
    found = meet(store, [0, 2], 3, seconds=0.3)
    assert "ranks [1] of 3" in str(found[0])
    assert isinstance(found[2], PrefixStore), "it was answered"
    assert "rank 0 has not joined" in str(meet(store, [1, 2], 3, seconds=0.3)[1])
    found = meet(store, range(3), 3)
    found[1].set("address", "new")
    assert [found[rank].get("address") for rank in range(3)] == [b"new"] * 3


# ------------------------------------------------------------------------------------- without an agent's store


@pytest.fixture
def port():
    return free_ports(1)[0]


def test_ranks_of_one_run_meet_again_and_again(port):
    for value in (b"1", b"2"):
        found = come([launch(rank, 3, port, "job 1") for rank in range(3)])
        assert not found[0].check(["address"]), "what an earlier world of these processes has left"
        found[1].set("address", value)
        assert [store.get("address") for store in found] == [value] * 3


def test_a_process_of_another_run_is_told_and_does_no_harm(port):
    found = come([launch(0, 2, port, "job 1"), launch(1, 2, port, "job 2"), launch(1, 2, port, "job 1")])
    expected = f"one of 2 processes of job 2, but rank 0, at 127.0.0.1:{port}, serves 2 processes of job 1"
    assert expected in str(found[1])
    found[0].set("address", "here")
    assert found[2].get("address") == b"here"


def test_ranks_that_count_differently_all_say_so(port):
    zero, one = come([launch(0, 2, port), launch(1, 3, port)])
    assert "rank 1 is one of 3 processes of one run, and rank 0 one of 2" in str(zero)
    assert "one of 3 processes of one run, but rank 0" in str(one)


def test_a_rank_is_that_of_one_process(port, monkeypatch):
    here = threading.local()
    monkeypatch.setattr(rendezvous.os, "getpid", lambda: here.pid)
    launches = [launch(0, 2, port), launch(1, 2, port), launch(1, 2, port)]
    pids = iter([1, 2, 3])
    _, *ones = come(launches, before=lambda _: setattr(here, "pid", next(pids)))
    errors = [str(error) for error in ones if isinstance(error, lm.LumenError)]
    assert len(errors) == 1
    assert f"on {socket.gethostname()} has rank 1, which process" in errors[0]


def test_who_does_not_come_is_named(port):
    (zero,) = come([launch(0, 3, port)], seconds=0.3)
    assert "ranks [1, 2] of 3 have not joined" in str(zero)


def test_a_port_in_use_is_told():
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        (zero,) = come([launch(0, 2, port)], seconds=0.2)
    assert f"rank 0 cannot listen on port {port}" in str(zero)


def test_a_store_that_does_not_answer_is_told_in_time(port, monkeypatch):
    given_up = threading.Event()
    monkeypatch.setattr(rendezvous, "TCPStore", lambda *args, **options: given_up.wait())
    (one,) = come([launch(1, 2, port)], seconds=0.2)
    given_up.set()
    assert f"rank 1 has not reached rank 0, at 127.0.0.1:{port}, in time" in str(one)
