"""Select the metrics to plot from the logs of several runs, their horizontal axis, and the labels of the curves."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lumen.cli.plot.read_logs import Row, RunLog
from lumen.errors import LumenError, printable
from lumen.train.curves import Line, Panel, grouped, measures

X = Literal["step", "seconds", "epoch"]
_MAX_SETTINGS = 2  # settings of the configuration in a label
_SHOWN = 12


def select_metrics(runs: Sequence[RunLog], patterns: Sequence[str]) -> list[str]:
    """The metrics to plot: those matching `patterns` (a name, a name without its split, or a glob), or all.

    Raises `LumenError`, which lists the logged names, if a pattern matches no metric.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.names if name != "epoch"))
    if not names:
        raise LumenError("no number has been logged" + ("." if len(runs) == 1 else " in any of these runs."))
    if not patterns:
        return measures(names)
    titles = {title: [name for name, _ in members] for title, members in grouped(names).items()}
    selected = []
    for pattern in patterns:
        exact = [pattern] if pattern in names else titles.get(pattern, [])
        matched = exact or fnmatch.filter(names, pattern)
        if not matched:
            raise LumenError(f"{_no_run_text(runs)} logged {pattern!r}; {_suggest_names(pattern, [*titles, *names])}.")
        selected += matched
    return list(dict.fromkeys(selected))


def _no_run_text(runs: Sequence[RunLog]) -> str:
    return str(runs[0].path) + " has not" if len(runs) == 1 else "None of these runs has"


def _suggest_names(pattern: str, names: Iterable[str]) -> str:
    """List the logged names, close matches first."""
    names = list(dict.fromkeys(names))
    matches = difflib.get_close_matches(pattern, names, n=3)
    remaining = [name for name in names if name not in matches]
    omitted = len(matches) + len(remaining) - _SHOWN
    listing = ", ".join([*matches, *remaining][:_SHOWN]) + (f" and {omitted} more" if omitted > 0 else "")
    return f"did you mean {' or '.join(matches)}? Available: {listing}" if matches else f"available: {listing}"


# --------------------------------------------------------------------------------------------- panels


def panels(runs: Sequence[RunLog], patterns: Sequence[str], x: X, smooth: float, log: bool) -> list[Panel]:
    """One panel per metric, with the training and validation curves of all runs."""
    names, labels = select_metrics(runs, patterns), run_names(runs)
    positions = [x_positions(run, x) for run in runs]
    groups = grouped(names)
    result = []
    for title, members in groups.items():
        lines = []
        for i, run in enumerate(runs):
            for j, (name, split) in enumerate(members):
                xs, ys = curve(run.rows, positions[i], name)
                if not ys:
                    continue
                single_run = len(runs) == 1
                label = printable(split if single_run else f"{labels[i]} {split}".rstrip())
                smoothed = smooth_curve(ys, smooth)
                raw = ys if smooth else None
                lines.append(Line(label, xs, smoothed, j if single_run else i, 0 if single_run else j, raw))
        heading = printable(title if len(members) > 1 else members[0][0])
        unlabeled = len(lines) == 1 and len(runs) == 1
        result.append(Panel(heading, [replace(lines[0], name="")] if unlabeled else lines, log, x))
    return result


def curve(rows: Sequence[Row], xs: Sequence[float], name: str) -> tuple[list[float], list[float]]:
    """The points of one metric, for rows at the horizontal positions `xs`."""
    points = [(x, row.values[name]) for x, row in zip(xs, rows, strict=True) if name in row.values]
    return [x for x, _ in points], [y for _, y in points]


def smooth_curve(values: Sequence[float], weight: float) -> list[float]:
    """TensorBoard's running mean: `weight` times the old mean plus `1 - weight` times the value. Gaps stay gaps.

    >>> smooth_curve([1.0, float("nan"), 2.0], 0.5)
    [1.0, nan, 1.6666666666666667]
    """
    smoothed, mean, count = [], 0.0, 0
    for value in values:
        if weight and math.isfinite(value):
            mean, count = weight * mean + (1 - weight) * value, count + 1
            # Correct the bias toward the initial mean of zero.
            value = mean / (1 - weight**count)
        smoothed.append(value)
    return smoothed


def x_positions(run: RunLog, x: X) -> list[float]:
    """The horizontal position of each row; raises `LumenError` if it was not logged."""
    if x == "step":
        return [float(row.step) for row in run.rows]
    if x == "seconds":
        times = [math.nan if row.time is None else row.time for row in run.rows]
        start = next((time for time in times if math.isfinite(time)), None)
        if start is None and times:
            raise LumenError(f"{run.path} has no times: plot it over --x step.")
        return [time - (start or 0.0) for time in times]
    return epochs(run)


def epochs(run: RunLog) -> list[float]:
    """Fractional epochs, interpolated between the first steps of the epochs; the last one is extrapolated.

    Raises `LumenError` if epochs were not logged.
    """
    starts: dict[float, int] = {}
    for row in run.rows:
        if "epoch" in row.values:
            starts.setdefault(row.values["epoch"], row.step)
    if not starts and run.rows:
        raise LumenError(f"{run.path} has no epochs: plot it over --x step.")
    knots = [(step, epoch) for epoch, step in starts.items() if math.isfinite(epoch)]
    if not knots or knots[0][1] == 0:  # the first row is logged a few steps after the start of epoch 0
        knots[:1] = [(0, 0.0)]
    knots = [knots[0], *(b for a, b in itertools.pairwise(knots) if b[0] > a[0] and b[1] > a[1])]
    steps, numbers = zip(*knots, strict=True)
    if len(knots) > 1:
        slope = (numbers[-1] - numbers[-2]) / (steps[-1] - steps[-2])
        last = max(row.step for row in run.rows)
        steps, numbers = (*steps, last + 1), (*numbers, numbers[-1] + slope * (last + 1 - steps[-1]))
    positions: list[float] = np.interp([float(row.step) for row in run.rows], steps, numbers).tolist()
    return positions


# ---------------------------------------------------------------------------------------------- names


def run_names(runs: Sequence[RunLog]) -> list[str]:
    """Label each run by the path components and settings in which the runs differ."""
    paths = [tuple(run.path.absolute().parts) for run in runs]
    if len(runs) < 2:
        return [run.path.parent.name if run.path.stem == "metrics" else run.path.name for run in runs]
    prefix = len(_common_prefix(paths))
    ends = [path[prefix:] for path in paths]
    suffix = min(len(_common_prefix([end[::-1] for end in ends])), *(max(len(end) - 1, 0) for end in ends))
    names = ["/".join(end[: len(end) - suffix]) or path[-1] for end, path in zip(ends, paths, strict=True)]
    settings = [_differing_settings(run.config, runs) for run in runs]
    return [f"{name} ({text})" if text else name for name, text in zip(names, settings, strict=True)]


def _common_prefix(paths: Sequence[Sequence[str]]) -> list[str]:
    shared = itertools.takewhile(lambda components: len({*components}) == 1, zip(*paths, strict=False))
    return [components[0] for components in shared]


def _differing_settings(config: Mapping[str, Any], runs: Sequence[RunLog]) -> str:
    """The settings in which the configurations differ, if these are few and short."""
    all_settings = [_settings(run.config) for run in runs]
    if not all(all_settings):
        return ""
    names = [name for name in all_settings[0] if len({str(settings.get(name)) for settings in all_settings}) > 1]
    text = ", ".join(f"{name} {_settings(config).get(name)}" for name in names)
    return text if len(names) <= _MAX_SETTINGS and len(text) <= 30 else ""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = config.get("config")
    if not isinstance(settings, Mapping):
        return {}
    # A path is usually that of the run, which the label already shows.
    return {str(k): v for k, v in settings.items() if isinstance(v, str | int | float) and "/" not in str(v)}
