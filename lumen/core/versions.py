"""The versions of what a process runs."""

from __future__ import annotations

import importlib.metadata


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None for one that is not, as a checkout on the path.

    >>> version_of("torch") is None, version_of("no such distribution")
    (False, None)
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_version() -> str | None:
    """Lumen's own version."""
    return version_of("lumen-torch")
