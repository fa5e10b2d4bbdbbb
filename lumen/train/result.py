"""`Result`: how a run ended, shown on one line at a prompt and as HTML in a notebook."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumen.core.step import Step
from lumen.core.urls import join, parse_location
from lumen.errors import printable
from lumen.sinks import Sink
from lumen.sinks.format import numbers, short
from lumen.train.checkpointer import Checkpointer
from lumen.train.clock import Clock
from lumen.train.curves import Line, Panel, grouped, measures
from lumen.train.curves_svg import svg
from lumen.train.goodput import Goodput
from lumen.train.history import History

_MAX_PANELS, _MAX_ROWS, _MAX_NAMES = 12, 40, 6
# Inherit the colors: a notebook may be light or dark.
_CELL = "text-align:right;padding:1px 10px;background:none;color:inherit"
_NAME = "text-align:left;padding:1px 10px;background:none;color:inherit"


@dataclass(frozen=True, repr=False)
class Result:
    """The end of a run: its last `state`, the newest number of each of its `metrics`, its `clock`, and the `reason`.

    The state still has the slots of the run's transforms (`lm.ema.params(result.state)`), and can be passed to
    `Runner.fit` again; `export()` returns the plain state.

    `history` has what this call of `fit` logged: `steps, losses = result.history["train/loss"]`, and
    `result.history.best("val/loss")`. `files` has the paths of the run's checkpoints and of its sinks' files. A
    notebook shows all of this, with curves. `goodput` says where the time of the run went, all its restarts included:
    `goodput.ratio` is the share of training steps, and `goodput.seconds` has the parts by name.

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
    files: Mapping[str, Path | str] = field(default_factory=dict, compare=False)
    goodput: Goodput = field(default_factory=Goodput, compare=False)

    def __repr__(self) -> str:
        return line(self)

    def _repr_html_(self) -> str:
        return page(self)

    def export(self) -> Any:
        """The plain state: unsharded and without slots."""
        return self.step.export(self.state)


def line(result: Result) -> str:
    """The repr of a result: why and when the run ended, and its first few metrics."""
    clock, measured = result.clock, measures(list(result.metrics))
    shown = numbers({name: result.metrics[name] for name in measured[:_MAX_NAMES]})
    more = f"  … {len(measured) - _MAX_NAMES} more" if len(measured) > _MAX_NAMES else ""
    when = f"step {clock.step}, epoch {clock.epoch}, {clock.seconds:.1f} s"
    return f"Result({result.reason}: {when}{f'; {shown}{more}' if shown else ''})"


def page(result: Result) -> str:
    """The result as self-contained HTML: how far the run came, its curves, its numbers and its files."""
    return (
        '<div style="font-family:sans-serif;font-size:13px">'
        f"<div><b>{html.escape(result.reason)}</b> · {_progress(result)}</div>"
        f'<div style="display:flex;flex-wrap:wrap;gap:12px;margin:8px 0">{"".join(map(svg, panels(result)))}</div>'
        f"{_table(result)}{_files(result)}</div>"
    )


def _progress(result: Result) -> str:
    clock = result.clock
    texts = [f"{clock.step:,} steps", f"{clock.epoch:,} epochs", f"{clock.seconds:,.1f} s"]
    if clock.rows and clock.seconds > 0:
        texts.append(f"{clock.rows / clock.seconds:,.0f} rows/s")
    if clock.tokens and clock.seconds > 0:
        texts.append(f"{clock.tokens / clock.seconds:,.0f} tokens/s")
    if result.goodput.total > 0:
        lost = "".join(f", {name} {share:.0%}" for name, share in result.goodput.lost().items() if share >= 0.005)
        texts.append(f"goodput {result.goodput.ratio:.0%}{lost}")
    return " · ".join(texts)


def files_of(checkpoint: Checkpointer | None, sinks: Iterable[Sink]) -> dict[str, Path | str]:
    """The paths of a run's checkpoints and of its sinks' files."""
    files: dict[str, Path | str] = {}
    if checkpoint is not None:
        newest = checkpoint.latest()
        files["checkpoints"] = join(checkpoint.directory, "checkpoints")
        files |= {} if newest is None else {"newest checkpoint": newest}
    for sink in sinks:
        path = getattr(sink, "url", None) or getattr(sink, "path", None) or getattr(sink, "logdir", None)
        if isinstance(path, str | os.PathLike):
            files[type(sink).__name__] = parse_location(os.fspath(path))
    return files


def panels(result: Result) -> list[Panel]:
    """The curves of the metrics of this call of `fit`."""
    result_panels = []
    for title, members in grouped(measures(result.history.names)).items():
        is_single = len(members) == 1
        lines = [
            Line("" if is_single else printable(label), *result.history[name], color=i)
            for i, (name, label) in enumerate(members)
        ]
        result_panels.append(Panel(printable(members[0][0] if is_single else title), lines))
    return result_panels[:_MAX_PANELS]


def _table(result: Result) -> str:
    names = list(result.metrics)
    if not names:
        return ""
    head = "".join(f'<th style="{_NAME if title == "metric" else _CELL}">{title}</th>' for title in _COLUMNS)
    rows = "".join(f"<tr>{''.join(_cells(result, name))}</tr>" for name in names[:_MAX_ROWS])
    more = (
        f"<div>and {len(names) - _MAX_ROWS} more in <code>result.metrics</code></div>" if len(names) > _MAX_ROWS else ""
    )
    return f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}'


_COLUMNS = ("metric", "last", "lowest", "at step", "highest", "at step")


def _cells(result: Result, name: str) -> Iterator[str]:
    """A row of the table, with the best number in bold."""
    yield f'<td style="{_NAME}">{html.escape(printable(name))}</td>'
    yield f'<td style="{_CELL}">{short(result.metrics[name])}</td>'
    if name not in result.history.names:  # logged before this call of `fit`
        return
    extremes, best = result.history.extremes(name), result.history.best(name)
    for point in (extremes.lowest, extremes.highest):
        value, step = ("", "") if point is None else (short(point[1]), f"{int(point[0]):,}")
        bold = ";font-weight:bold" if point is not None and point == best else ""
        yield f'<td style="{_CELL}{bold}">{value}</td><td style="{_CELL};opacity:.7">{step}</td>'
    if extremes.gaps:
        yield f'<td style="{_NAME}">{extremes.gaps} NaN or infinite</td>'


def _files(result: Result) -> str:
    rows = (
        f"<div>{html.escape(name)}: <code>{html.escape(str(path))}</code></div>" for name, path in result.files.items()
    )
    return f'<div style="margin-top:8px">{"".join(rows)}</div>' if result.files else ""
