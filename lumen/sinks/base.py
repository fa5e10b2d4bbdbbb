"""The `Sink` protocol, and the numbers that sinks write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from lumen.errors import SinkError, ValueKindError

Number = int | float


class Sink(Protocol):
    """Takes the values that a run logs.

    The sinks of this package open their file or service at the first `log`, so that every process of a run may make
    them and one of them log. They raise the I/O errors that they meet, and spread arrays over names as `scalars`
    does. Each says which of `Histogram`, `Image` and `Text` it writes, and leaves out the others.

    A sink may also keep the configuration (`config`), show params (`take_params`) and go back to a checkpoint
    (`position`, `rewind`): see `lumen.sinks.optional`. An error of a sink ends the run, which saves where it stands,
    unless the sink has an attribute `on_error = "warn"`, an argument of each sink of this package: then the run warns
    and trains on, and the sink has a gap. For a sink of your own, two methods are enough:

    >>> import lumen as lm
    >>> class Best:
    ...     best = float("inf")
    ...     def log(self, step, values):
    ...         self.best = min(self.best, values.get("val/loss", self.best))
    ...     def close(self):
    ...         pass
    >>> lm.sinks.configure(Best(), {"lr": 0.1})  # it keeps none
    """

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the values of a step by name: numbers, arrays and tensors of them, histograms, images, texts."""

    def close(self) -> None:
        """Write what is pending and let go of the file; doing so again does nothing."""


OnError = Literal["raise", "warn"]


def check_on_error(on_error: str) -> bool:
    """Whether a sink's errors are only warned of; raises SinkError for what says neither."""
    if on_error not in ("raise", "warn"):
        raise SinkError(f"a sink's on_error={on_error!r} is unknown; give 'raise' or 'warn'.")
    return on_error == "warn"


def scalars(values: Mapping[str, Any]) -> dict[str, Number]:
    """Python numbers by name; an array of several is spread over names with its indices.

    Tensors may be of any device and precision. Raises ValueKindError (a TypeError) for a
    value that is not of real numbers.

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
                " them, and lm.sinks.Text, Image and Histogram: convert it, or leave it out of the metrics."
            )
        if array.dtype.kind == "b":
            array = array.astype(np.int64)
        for index in np.ndindex(array.shape):
            flat["/".join((name, *map(str, index)))] = array[index].item()
    return flat
