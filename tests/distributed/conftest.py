"""Worlds of 2 and 4 processes, shared by all tests of a session."""

from __future__ import annotations

import pytest

from tests.distributed import pool


@pytest.fixture(scope="session")
def worlds():
    """The world of a given size, started when it is first asked for."""
    made = {}

    def get(size):
        if size not in made:
            made[size] = pool.World(size)
        return made[size]

    yield get
    for world in made.values():
        world.close()


@pytest.fixture
def world2(worlds):
    """Two processes."""
    return worlds(2)


@pytest.fixture
def world4(worlds):
    """Four processes."""
    return worlds(4)
