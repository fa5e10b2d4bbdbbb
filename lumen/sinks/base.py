"""The `Sink` protocol, and the conversion of values to numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from lumen.errors import SinkError, ValueKindError

Number = int | float


class Sink(Protocol):
    """Receives the values that a run logs.

    The sinks of this package open their file or service at the first `log`, so that every process of a run may create
    them while only one logs. They raise I/O errors, and split arrays into names with indices as `scalars` does. Each
    documents which of `Histogram`, `Image` and `Text` it writes, and ignores the others.

    A sink may also store the configuration (`config`), show params (`take_params`) and rewind to a checkpoint
    (`position`, `rewind`): see `lumen.sinks.optional`. An error in a sink stops the run, which saves a checkpoint
    first. With the attribute `on_error = "warn"`, an argument of every sink of this package, the run warns and
    continues, and the values are missing from the sink. A custom sink needs only two methods:

    >>> import lumen as lm
    >>> class Best:
    ...     best = float("inf")
    ...     def log(self, step, values):
    ...         self.best = min(self.best, values.get("val/loss", self.best))
    ...     def close(self):
    ...         pass
    >>> lm.sinks.configure(Best(), {"lr": 0.1})  # ignored: no config method
    """

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of a step by name: numbers, arrays and tensors of them, histograms, images, texts."""

    def close(self) -> None:
        """Write pending values and close the file; further calls do nothing."""


OnError = Literal["raise", "warn"]


def check_on_error(on_error: str) -> bool:
    """Whether a sink's errors are warnings; raises SinkError for an unknown value."""
    if on_error not in ("raise", "warn"):
        raise SinkError(f"a sink's on_error={on_error!r} is unknown; give 'raise' or 'warn'.")
    return on_error == "warn"


def scalars(values: Mapping[str, Any]) -> dict[str, Number]:
    """Convert values to Python numbers by name; the elements of an array get names with their indices.

    Tensors may have any device and precision. Raises ValueKindError (a TypeError) for values that are not real
    numbers.

    >>> import torch
    >>> from lumen.sinks import scalars
    >>> scalars({"loss": torch.tensor(0.5), "f1": [0.25, 1.0]})
    {'loss': 0.5, 'f1/0': 0.25, 'f1/1': 1.0}
    """
    flat: dict[str, Number] = {}
    for name, value in values.items():
        array = np.asarray(value.tolist() if hasattr(value, "tolist") else value)
        if array.dtype.kind not in "biuf":
            raise ValueKindError(
                f"{name!r} is {value!r} of type {type(value).__name__}; sinks take real numbers, arrays and tensors of"
                " them, and lm.sinks.Text, Image and Histogram: convert it, or omit it from the metrics."
            )
        if array.dtype.kind == "b":
            array = array.astype(np.int64)
        for index in np.ndindex(array.shape):
            flat["/".join((name, *map(str, index)))] = array[index].item()
    return flat
