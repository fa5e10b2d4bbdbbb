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


def install_extra(name: str) -> str:
    """The command that installs an extra of Lumen, of which there is no release on PyPI yet.

    >>> install_extra("quant")
    "pip install '.[quant]' in the clone of Lumen"
    """
    return f"pip install '.[{name}]' in the clone of Lumen"


def own_version() -> str | None:
    """Lumen's own version."""
    return version_of("lumen-torch")
