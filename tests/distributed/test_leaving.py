"""Leaving the world: no thread of it lives on, whoever holds what was made in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


def free_ports(count):
    with ExitStack() as open_ones:
        probes = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


def test_no_thread_outlives_the_world(tmp_path):
    ports = ",".join(free_ports(2))
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.leaving", ports, str(tmp_path)]
    jobs = [
        subprocess.Popen(
            command, cwd=ROOT, env={**world, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    said = [job.communicate(timeout=240)[1] for job in jobs]
    for rank, job in enumerate(jobs):
        assert job.returncode == 1, said[rank]
        assert "Invalid scalar type" in said[rank]
        assert "terminate" not in said[rank]
        assert "still referred to" not in said[rank]
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sum("gloo_tcp" in name for name in found["in it"]) > 1, "this test looks for what is not there"
        assert found["left"] == found["at exit"] == []
        assert all("processes that this one has left" in text for text in found["refused"]), found["refused"]
        index, size, old, *sizes = found["again"]
        assert (index, size, sizes) == (rank, 2, [2, 1, 1])
        assert "lm.mesh(data=2) belongs to a world" in old
