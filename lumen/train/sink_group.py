"""`SinkGroup`: the sinks of one run, and what becomes of their errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lumen.errors import InexactWarning
from lumen.sinks import Sink, configure, position, rewind, show_params
from lumen.sinks.base import check_on_error
from lumen.train.callbacks import by_class

Positions = list[dict[str, Any]]


class SinkGroup:
    """Calls all sinks of a run. Where one fails, the others are called all the same.

    Its error is then raised, and ends the run, unless the sink has `on_error="warn"`.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._tolerated = {id(sink) for sink in self._sinks if check_on_error(getattr(sink, "on_error", "raise"))}
        self._warned: set[tuple[int, str]] = set()  # of the tolerated, whose last call of which kind failed
        self._broken: set[int] = set()  # those whose error ends the run

    def __iter__(self) -> Iterator[Sink]:
        return iter(self._sinks)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand them the values of a step."""
        self._each("log", f"take the values of step {step}", lambda sink: sink.log(step, values))

    def configure(self, values: Mapping[str, Any]) -> None:
        """Hand the configuration to those that keep one."""
        self._each("config", "keep the configuration", lambda sink: configure(sink, values))

    def show_params(self, step: int, params: Mapping[str, Tensor] | None, last: bool) -> None:
        """Hand the params to those that show some of them."""
        self._each("params", "show the params", lambda sink: show_params(sink, step, params, last))

    def close(self) -> None:
        """Close all of them."""
        self._each("close", "close", lambda sink: sink.close())

    def positions(self) -> Positions:
        """Where each sink is; None where it cannot go back, or has failed."""
        found: dict[int, int | None] = {}

        def note(sink: Sink) -> None:
            if id(sink) not in self._broken:
                found[id(sink)] = position(sink)

        self._each("position", "say where it is", note)
        return [{"kind": type(sink).__name__, "position": found.get(id(sink))} for sink in self._sinks]

    def rewind(self, positions: Positions) -> None:
        """Cut off what each sink took in after that."""
        after = {id(sink): each["position"] for each, sink in by_class(positions, self._sinks) if sink is not None}
        self._each("rewind", "go back", lambda sink: rewind(sink, after.get(id(sink))))

    def _each(self, kind: str, what: str, call: Callable[[Sink], object]) -> None:
        first: Exception | None = None
        try:
            for sink in self._sinks:
                try:
                    call(sink)
                except Exception as error:
                    if id(sink) in self._tolerated:
                        self._warn(sink, kind, what, error)
                        continue
                    self._broken.add(id(sink))
                    error.add_note(f"The sink {type(sink).__name__} could not {what}; on_error='warn' trains on.")
                    first = first or error
                else:
                    self._warned.discard((id(sink), kind))
            if first is not None:
                raise first
        finally:
            del first  # its traceback has this frame, and would keep the run alive

    def _warn(self, sink: Sink, kind: str, what: str, error: Exception) -> None:
        """Once, until it works again."""
        if (id(sink), kind) in self._warned:
            return
        self._warned.add((id(sink), kind))
        warnings.warn(
            f"the sink {type(sink).__name__} could not {what} ({type(error).__name__}: {error}). Training goes on;"
            " what it does not take is lost to it, and it is asked again each time.",
            InexactWarning,
            stacklevel=4,
        )
