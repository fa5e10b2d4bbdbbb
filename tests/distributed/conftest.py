"""Worlds of 2 and 4 processes, shared by all tests of a session."""

from __future__ import annotations

import pytest

from tests.distributed import pool


def modules_of(items):
    """The modules of all tests that ask for a world."""
    return sorted({pool.module_name(item.path) for item in items if "worlds" in item.fixturenames})


@pytest.fixture(scope="session")
def worlds(request):
    """The world of a given size, started when it is first asked for."""
    made, modules = {}, modules_of(request.session.items)

    def get(size):
        if size not in made:
            made[size] = pool.World(size, modules)
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
