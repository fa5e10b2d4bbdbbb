"""The `Sink` protocol, the numbers that sinks write, and a sink that keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Number = int | float


class Sink(Protocol):
    """Takes the values that a run logs.

    The sinks of this package open their file at the first `log`, so that every process of a run may make
    them and one of them log. They raise the I/O errors that they meet, and spread arrays over names as
    `scalars` does.
    """

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the values of a step by name: numbers, or arrays and tensors of numbers."""

    def close(self) -> None:
        """Write what is pending and let go of the file; doing so again does nothing."""


def scalars(values: Mapping[str, Any]) -> dict[str, Number]:
    """Python numbers by name; an array of several is spread over names with its indices.

    Tensors may be of any device and precision. Raises TypeError for a value that is not of real numbers.

    >>> import torch
    >>> from lumen.sinks import scalars
    >>> scalars({"loss": torch.tensor(0.5), "f1": [0.25, 1.0]})
    {'loss': 0.5, 'f1/0': 0.25, 'f1/1': 1.0}
    """
    flat: dict[str, Number] = {}
    for name, value in values.items():
        array = np.asarray(value.tolist() if hasattr(value, "tolist") else value)
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"{name!r} is {value!r} of type {type(value).__name__}; sinks take real numbers, and arrays"
                " and tensors of them: convert it, or leave it out of the metrics."
            )
        if array.dtype.kind == "b":
            array = array.astype(np.int64)
        for index in np.ndindex(array.shape):
            flat["/".join((name, *map(str, index)))] = array[index].item()
    return flat


class Memory:
    """Keeps what is logged: for notebooks and tests.

    >>> import lumen as lm
    >>> sink = lm.sinks.Memory()
    >>> sink.log(0, {"loss": 2.0})
    >>> sink.log(10, {"loss": 1.5, "lr": 0.1})
    >>> sink["loss"]
    ([0, 10], [2.0, 1.5])
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Number]]] = []

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append `(step, scalars(values))` to `rows`."""
        self.rows.append((int(step), scalars(values)))

    def close(self) -> None:
        """Do nothing: the rows stay."""

    def __getitem__(self, name: str) -> tuple[list[int], list[Number]]:
        """The steps at which `name` was logged, and its values; raises KeyError with the names there are."""
        found = [(step, values[name]) for step, values in self.rows if name in values]
        if not found:
            names = sorted({name for _, values in self.rows for name in values})
            raise KeyError(f"{name!r} was not logged; logged were {', '.join(names) or 'no values'}")
        return [step for step, _ in found], [value for _, value in found]
