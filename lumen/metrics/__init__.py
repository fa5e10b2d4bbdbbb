"""Metrics of other libraries as Lumen metrics."""

from lumen.metrics.torchmetrics import from_torchmetrics

__all__ = [
    "from_torchmetrics",
]


def __dir__() -> list[str]:
    return sorted(__all__)
