"""`SinkGroup`: the sinks of one run, and how their errors are handled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lumen.errors import InexactWarning
from lumen.sinks import Sink, configure, position, rewind, show_params
from lumen.sinks.base import check_on_error
from lumen.train.callbacks import match_by_class

Positions = list[dict[str, Any]]


class SinkGroup:
    """Calls all sinks of a run, also if one of them fails.

    The error is raised after that, and ends the run, unless the sink has `on_error="warn"`.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._tolerated = {id(sink) for sink in self._sinks if check_on_error(getattr(sink, "on_error", "raise"))}
        self._warned: set[tuple[int, str]] = set()  # sinks with on_error="warn" whose last call of a kind failed
        self._broken: set[int] = set()  # sinks whose error ends the run

    def __iter__(self) -> Iterator[Sink]:
        return iter(self._sinks)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass the values of a step to all sinks."""
        self._call_all("log", f"log the values of step {step}", lambda sink: sink.log(step, values))

    def configure(self, values: Mapping[str, Any]) -> None:
        """Pass the configuration to the sinks that log it."""
        self._call_all("config", "log the configuration", lambda sink: configure(sink, values))

    def show_params(self, step: int, params: Mapping[str, Tensor] | None, last: bool) -> None:
        """Pass the params to the sinks that log some of them."""
        self._call_all("params", "log the params", lambda sink: show_params(sink, step, params, last))

    def close(self) -> None:
        """Close all of them."""
        self._call_all("close", "close", lambda sink: sink.close())

    def positions(self) -> Positions:
        """The position of each sink; None if it cannot be rewound, or has failed."""
        by_sink: dict[int, int | None] = {}

        def read_position(sink: Sink) -> None:
            if id(sink) not in self._broken:
                by_sink[id(sink)] = position(sink)

        self._call_all("position", "return its position", read_position)
        return [{"kind": type(sink).__name__, "position": by_sink.get(id(sink))} for sink in self._sinks]

    def rewind(self, positions: Positions) -> None:
        """Remove what each sink wrote after its position."""
        matches = match_by_class(positions, self._sinks)
        by_sink = {id(sink): entry["position"] for entry, sink in matches if sink is not None}
        self._call_all("rewind", "be rewound", lambda sink: rewind(sink, by_sink.get(id(sink))))

    def _call_all(self, kind: str, what: str, call: Callable[[Sink], object]) -> None:
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
        """Warn once, until the sink works again."""
        if (id(sink), kind) in self._warned:
            return
        self._warned.add((id(sink), kind))
        warnings.warn(
            f"the sink {type(sink).__name__} could not {what} ({type(error).__name__}: {error}). Training continues"
            " without these values; the sink is called again each time.",
            InexactWarning,
            stacklevel=4,
        )
