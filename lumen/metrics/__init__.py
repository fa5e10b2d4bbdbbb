"""Metrics from other libraries as Lumen's typed values."""

from lumen.metrics.torchmetrics import from_torchmetrics as from_torchmetrics

__all__ = ["from_torchmetrics"]
