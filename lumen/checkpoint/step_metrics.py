"""The metrics that a checkpoint was saved with, as floats and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumen.checkpoint import json_tree
from lumen.errors import CheckpointError


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as floats; raises `CheckpointError` for a value that is not a number."""
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"metrics must be numbers: {error}. Write: metrics=lm.compute_metrics(metrics), or float(value) for each."
        ) from error


def to_json(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """The metrics as JSON, with NaN and infinities as strings."""
    return {name: json_tree.number(value) for name, value in metrics.items()}


def from_json(metrics: Any) -> dict[str, float]:
    """The inverse of `to_json`; empty for anything else."""
    try:
        return {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, AttributeError):
        return {}
