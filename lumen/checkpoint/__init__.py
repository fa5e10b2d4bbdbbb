"""Checkpoints in Orbax's format: written in the background, visible only when complete, verified when read."""

from lumen.checkpoint import rng
from lumen.checkpoint._export import export
from lumen.checkpoint._load import listed, load, metadata
from lumen.checkpoint._restore import restore
from lumen.checkpoint._save import save
from lumen.checkpoint.store import Store

__all__ = [
    "Store",
    "export",
    "listed",
    "load",
    "metadata",
    "restore",
    "rng",
    "save",
]


def __dir__() -> list[str]:
    return sorted(__all__)
