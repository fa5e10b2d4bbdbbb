"""What a sink may do besides `log` and `close`: keep the configuration, show params, and go back to a checkpoint.

A sink of two methods is whole. Whoever drives sinks asks through the functions of this file, which pass over
what a sink does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lumen.sinks.base import Sink


@runtime_checkable
class Configurable(Protocol):
    """A sink that keeps the run's configuration."""

    def config(self, values: Mapping[str, Any]) -> None:
        """Take the configuration, versions and git commit: nested mappings of what JSON has.

        Called before the first `log`, and after `rewind`; again where a run is resumed.
        """


@runtime_checkable
class ShowsParams(Protocol):
    """A sink that shows the params themselves, now and then."""

    def take_params(self, step: int, params: Mapping[str, Tensor] | None, last: bool) -> None:
        """Take the params, which are the run's own: read them, here and now, or pass.

        Called before the first step, so that a wrong name shows there, after each `log` of training, and with `last`
        at the end of the run. They are None where this process does not hold them whole.
        """


@runtime_checkable
class Resumable(Protocol):
    """A sink that can drop what was logged after a checkpoint, for the run will log it again."""

    def position(self) -> int | None:
        """Where the sink is, with all before it on disk; None where it cannot say."""

    def rewind(self, position: int) -> None:
        """Drop what was logged after `position`; called before the first `log` of a resumed run.

        A sink that holds less than `position` (the user moved its file away) leaves it as it is.
        """


def configure(sink: Sink, values: Mapping[str, Any]) -> None:
    """Hand the run's configuration to a sink that keeps one.

    >>> import lumen as lm
    >>> sink = lm.sinks.Memory()
    >>> lm.sinks.configure(sink, {"lr": 0.1})
    >>> sink.configuration
    {'lr': 0.1}
    """
    if isinstance(sink, Configurable):
        sink.config(values)


def show_params(sink: Sink, step: int, params: Mapping[str, Tensor] | None, last: bool = False) -> None:
    """Hand the params to a sink that shows some of them.

    >>> import lumen as lm, tempfile, torch
    >>> sink = lm.sinks.TensorBoard(tempfile.mkdtemp(), embeddings=("head.weight",))
    >>> lm.sinks.show_params(sink, 100, {"head.weight": torch.randn(10, 4)}, last=True)
    >>> (sink.logdir / "00100" / "head.weight" / "tensors.tsv").exists()
    True
    """
    if isinstance(sink, ShowsParams):
        sink.take_params(step, params, last)


def position(sink: Sink) -> int | None:
    """What a checkpoint keeps of a sink, for `rewind`; None where the sink cannot go back.

    >>> import lumen as lm
    >>> sink = lm.sinks.Memory()
    >>> sink.log(0, {"loss": 1.0})
    >>> lm.sinks.position(sink)
    1
    """
    return sink.position() if isinstance(sink, Resumable) else None


def rewind(sink: Sink, position: int | None) -> None:
    """Drop what a sink got after a checkpoint that kept `position`; nothing where that is None.

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
