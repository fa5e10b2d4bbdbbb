"""Optional methods of a sink: store the configuration, show params, and rewind to a checkpoint.

A sink needs only `log` and `close`. The functions of this file call the optional methods, and do nothing for a sink
without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lumen.sinks.base import Sink


@runtime_checkable
class Configurable(Protocol):
    """A sink that stores the run's configuration."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Store the configuration, versions and git commit: nested mappings of JSON values.

        Called before the first `log`, and after `rewind`; again when a run resumes.
        """


@runtime_checkable
class ShowsParams(Protocol):
    """A sink that shows params."""

    def take_params(self, step: int, params: Mapping[str, Tensor] | None, last: bool) -> None:
        """Read the params during the call, without keeping or changing them: they are those of the run.

        Called before the first step, so that a wrong name fails early, after each `log` of training, and with `last`
        at the end of the run. `params` is None if this process does not have the full params.
        """


@runtime_checkable
class Resumable(Protocol):
    """A sink that can drop the values logged after a checkpoint, which the resumed run logs again."""

    def position(self) -> int | None:
        """The current position, after syncing to disk; None if unknown."""

    def rewind(self, position: int) -> None:
        """Drop the values logged after `position`; called before the first `log` of a resumed run.

        A sink that is shorter than `position` (the user moved its file) changes nothing.
        """


def configure(sink: Sink, values: Mapping[str, Any]) -> None:
    """Pass the run's configuration to a sink that stores it.

    >>> import lumen as lm
    >>> sink = lm.sinks.Memory()
    >>> lm.sinks.configure(sink, {"lr": 0.1})
    >>> sink.configuration
    {'lr': 0.1}
    """
    if isinstance(sink, Configurable):
        sink.config(values)


def show_params(sink: Sink, step: int, params: Mapping[str, Tensor] | None, last: bool = False) -> None:
    """Pass the params to a sink that shows them.

    >>> import lumen as lm, tempfile, torch
    >>> sink = lm.sinks.TensorBoard(tempfile.mkdtemp(), embeddings=("head.weight",))
    >>> lm.sinks.show_params(sink, 100, {"head.weight": torch.randn(10, 4)}, last=True)
    >>> (sink.logdir / "00100" / "head.weight" / "tensors.tsv").exists()
    True
    """
    if isinstance(sink, ShowsParams):
        sink.take_params(step, params, last)


def position(sink: Sink) -> int | None:
    """The position that a checkpoint stores for `rewind`; None if the sink cannot rewind.

    >>> import lumen as lm
    >>> sink = lm.sinks.Memory()
    >>> sink.log(0, {"loss": 1.0})
    >>> lm.sinks.position(sink)
    1
    """
    return sink.position() if isinstance(sink, Resumable) else None


def rewind(sink: Sink, position: int | None) -> None:
    """Drop the values logged after `position`, as stored in a checkpoint; does nothing if it is None.

    >>> import lumen as lm
    >>> sink = lm.sinks.Memory()
    >>> for step in range(3):
    ...     sink.log(step, {"loss": 1.0})
    >>> lm.sinks.rewind(sink, 2)
    >>> sink["loss"]
    ([0, 1], [1.0, 1.0])
    """
    if position is not None and isinstance(sink, Resumable):
        sink.rewind(position)
