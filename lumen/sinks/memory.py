"""A sink that stores values in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumen.sinks.config import as_json
from lumen.sinks.media import split


class Memory:
    """Stores logged values of every kind, for notebooks and tests.

    `rows` contains pairs of a step and its values; `configuration` is the last argument of `config`.

    >>> import lumen as lm
    >>> sink = lm.sinks.Memory()
    >>> sink.log(0, {"loss": 2.0})
    >>> sink.log(10, {"loss": 1.5, "lr": 0.1})
    >>> sink["loss"]
    ([0, 10], [2.0, 1.5])
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.configuration: dict[str, Any] = {}

    def config(self, values: Mapping[str, Any]) -> None:
        """Store a copy as `configuration`."""
        self.configuration = as_json(values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the step and its values to `rows`."""
        numbers, media = split(values)
        self.rows.append((int(step), {**numbers, **media}))

    def position(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def rewind(self, position: int) -> None:
        """Keep the first `position` rows."""
        del self.rows[position:]

    def close(self) -> None:
        """Do nothing: the rows stay."""

    def __getitem__(self, name: str) -> tuple[list[int], list[Any]]:
        """The steps at which `name` was logged, and its values; raises KeyError, which lists the logged names."""
        points = [(step, values[name]) for step, values in self.rows if name in values]
        if not points:
            names = sorted({name for _, values in self.rows for name in values})
            raise KeyError(f"{name!r} was not logged; logged were {', '.join(names) or 'no values'}")
        return [step for step, _ in points], [value for _, value in points]
