"""Checks integer arguments; an error names the value, the allowed range and the fix."""

from __future__ import annotations

from typing import Any

from lumen.core.annotations import integer_of
from lumen.errors import BatchError

SEEDS = (-(2**63), 2**63)


def integer(name: str, value: Any, low: int, end: int | None = None) -> int:
    """`value` as an int in [`low`, `end`); raises BatchError for what is not one."""
    number = integer_of(value)
    if number is None:
        raise BatchError(f"{name} is {value!r} of type {type(value).__name__}; it must be an integer: use int({name}).")
    if number < low or (end is not None and number >= end):
        allowed = f"at least {low}" if end is None else f"in [{low}, {end})"
        raise BatchError(f"{name} is {number}; it must be {allowed}.")
    return number
