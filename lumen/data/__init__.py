"""Data: a loader whose order is a pure function of (seed, epoch), and whose cursor is plain data."""

from lumen.data._per_rank import per_rank
from lumen.data.loader import Cursor, Loader
from lumen.data.mixture import Mixture
from lumen.data.packed import Packed, document_mask
from lumen.data.permutation import permute
from lumen.data.weighted import balanced

__all__ = [
    "Cursor",
    "Loader",
    "Mixture",
    "Packed",
    "balanced",
    "document_mask",
    "per_rank",
    "permute",
]


def __dir__() -> list[str]:
    return sorted(__all__)
