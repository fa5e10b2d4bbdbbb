"""Format numbers as short text on one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumen.errors import printable
from lumen.sinks.media import Media


def short(value: float) -> str:
    """Four significant digits, or all digits of an integer below a million.

    >>> from lumen.sinks.format import short
    >>> short(0.123456), short(50.0), short(float("nan"))
    ('0.1235', '50', 'nan')
    """
    if abs(value) < 1e6 and value == int(value):
        return str(int(value))
    return f"{value:.4g}"


def numbers(values: Mapping[str, Any]) -> str:
    """Format all numbers with their names on one line; histograms, images and texts are omitted.

    >>> from lumen.sinks.format import numbers
    >>> numbers({"train/loss": 0.25, "lr": 1e-3})
    'loss 0.25  lr 0.001'
    """
    pairs = ((name, value) for name, value in values.items() if not isinstance(value, Media))
    return "  ".join(f"{_short_name(name)} {short(value)}" for name, value in pairs)


def _short_name(name: str) -> str:
    return printable(name).removeprefix("train/").replace("_per_second", "/s")
