"""`Result`: how a run ended, and how that looks: on one line at a prompt, and as HTML in a notebook."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumen.core.step import Step
from lumen.errors import printable
from lumen.sinks import Sink
from lumen.sinks.format import numbers, short
from lumen.train.checkpointer import Checkpointer
from lumen.train.clock import Clock
from lumen.train.curves import Line, Panel, grouped, measures
from lumen.train.curves_svg import svg
from lumen.train.history import History

_PANELS, _ROWS, _NAMED = 12, 40, 6
# Colors are those of the text round it: a notebook may be light or dark.
_CELL = "text-align:right;padding:1px 10px;background:none;color:inherit"
_NAME = "text-align:left;padding:1px 10px;background:none;color:inherit"


@dataclass(frozen=True, repr=False)
class Result:
    """How a run ended: its last `state`, the newest of each of its `metrics`, its `clock`, and the `reason`.

    The state still has the slots of the run's transforms (`lm.ema.params(result.state)`), and can be given to
    `Runner.fit` again; `export()` gives the plain one.

    `history` has what this call of `fit` logged: `steps, losses = result.history["train/loss"]`, and
    `result.history.best("val/loss")`. `files` says where the run's checkpoints and its sinks' files are. A notebook
    shows all of it, with curves.

    >>> import lumen as lm, torch
    >>> result = lm.Runner(lambda state, batch: (state, {"loss": batch.sum()}), log_every=1, progress=False).fit(
    ...     {}, [torch.ones(1), torch.zeros(1)], until=lm.Epochs(1)
    ... )
    >>> result.history["train/loss"], result.history.best("train/loss")
    (([1, 2], [1.0, 0.0]), (2, 0.0))
    """

    state: Any
    metrics: dict[str, float]
    clock: Clock
    reason: str
    step: Step
    history: History = field(default_factory=History, compare=False)
    files: Mapping[str, Path] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return line(self)

    def _repr_html_(self) -> str:
        return page(self)

    def export(self) -> Any:
        """The plain state, without slots and in ordinary places."""
        return self.step.export(self.state)


def line(result: Result) -> str:
    """What `repr` says: why and when the run ended, and the first few of its metrics."""
    clock, measured = result.clock, measures(list(result.metrics))
    shown = numbers({name: result.metrics[name] for name in measured[:_NAMED]})
    more = f"  … {len(measured) - _NAMED} more" if len(measured) > _NAMED else ""
    when = f"step {clock.step}, epoch {clock.epoch}, {clock.seconds:.1f} s"
    return f"Result({result.reason}: {when}{f'; {shown}{more}' if shown else ''})"


def page(result: Result) -> str:
    """The run as a piece of HTML that needs nothing else: how far it came, its numbers, its curves, where it lies."""
    return (
        '<div style="font-family:sans-serif;font-size:13px">'
        f"<div><b>{html.escape(result.reason)}</b> · {_far(result)}</div>"
        f'<div style="display:flex;flex-wrap:wrap;gap:12px;margin:8px 0">{"".join(map(svg, panels(result)))}</div>'
        f"{_table(result)}{_files(result)}</div>"
    )


def _far(result: Result) -> str:
    clock = result.clock
    said = [f"{clock.step:,} steps", f"{clock.epoch:,} epochs", f"{clock.seconds:,.1f} s"]
    if clock.rows and clock.seconds > 0:
        said.append(f"{clock.rows / clock.seconds:,.0f} rows/s")
    if clock.tokens and clock.seconds > 0:
        said.append(f"{clock.tokens / clock.seconds:,.0f} tokens/s")
    return " · ".join(said)


def files_of(checkpoint: Checkpointer | None, sinks: Iterable[Sink]) -> dict[str, Path]:
    """Where a run's checkpoints and the files of its sinks are."""
    files: dict[str, Path] = {}
    if checkpoint is not None:
        newest = checkpoint.latest()
        files["checkpoints"] = checkpoint.directory / "checkpoints"
        files |= {} if newest is None else {"newest checkpoint": newest}
    for sink in sinks:
        path = getattr(sink, "path", None) or getattr(sink, "logdir", None)
        if isinstance(path, str | os.PathLike):
            files[type(sink).__name__] = Path(path)
    return files


def panels(result: Result) -> list[Panel]:
    """Curves of what was measured in this fit."""
    found = []
    for title, members in grouped(measures(result.history.names)).items():
        one = len(members) == 1
        lines = [
            Line("" if one else printable(part), *result.history[name], color=i)
            for i, (name, part) in enumerate(members)
        ]
        found.append(Panel(printable(members[0][0] if one else title), lines))
    return found[:_PANELS]


def _table(result: Result) -> str:
    names = list(result.metrics)
    if not names:
        return ""
    head = "".join(f'<th style="{_NAME if each == "metric" else _CELL}">{each}</th>' for each in _COLUMNS)
    rows = "".join(f"<tr>{''.join(_cells(result, name))}</tr>" for name in names[:_ROWS])
    more = f"<div>and {len(names) - _ROWS} more in <code>result.metrics</code></div>" if len(names) > _ROWS else ""
    return f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}'


_COLUMNS = ("metric", "last", "lowest", "at step", "highest", "at step")


def _cells(result: Result, name: str) -> Iterator[str]:
    """A row of the table: the best of the numbers is bold."""
    yield f'<td style="{_NAME}">{html.escape(printable(name))}</td>'
    yield f'<td style="{_CELL}">{short(result.metrics[name])}</td>'
    if name not in result.history.names:  # of an earlier part of the run
        return
    found, best = result.history.extremes(name), result.history.best(name)
    for point in (found.lowest, found.highest):
        value, step = ("", "") if point is None else (short(point[1]), f"{int(point[0]):,}")
        bold = ";font-weight:bold" if point is not None and point == best else ""
        yield f'<td style="{_CELL}{bold}">{value}</td><td style="{_CELL};opacity:.7">{step}</td>'
    if found.gaps:
        yield f'<td style="{_NAME}">{found.gaps} NaN or infinite</td>'


def _files(result: Result) -> str:
    rows = (
        f"<div>{html.escape(name)}: <code>{html.escape(str(path))}</code></div>" for name, path in result.files.items()
    )
    return f'<div style="margin-top:8px">{"".join(rows)}</div>' if result.files else ""
