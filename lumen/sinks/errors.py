"""What sinks refuse."""

from __future__ import annotations

from lumen.errors import LumenError


class ValueKindError(LumenError, TypeError):
    """A value that no sink can write, or an image or configuration that is not one."""


class SinkError(LumenError, ValueError):
    """A file that is another table, or a value that takes the name of a sink's own column."""
