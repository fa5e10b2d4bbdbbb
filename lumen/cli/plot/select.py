"""Of what several runs logged: which numbers are drawn, over what, and how the curves are called."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lumen.cli.plot.read_logs import Logged, Row
from lumen.errors import LumenError, printable
from lumen.train.curves import Line, Panel, grouped, measures

X = Literal["step", "seconds", "epoch"]
_TOLD = 2  # values of the configuration in a name
_SHOWN = 12


def chosen(runs: Sequence[Logged], wanted: Sequence[str]) -> list[str]:
    """The metrics to draw: those `wanted`, each a name, its last part or a pattern; else what measures the model.

    Raises `LumenError`, with the names there are, for one that none of the runs has.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.names if name != "epoch"))
    if not names:
        raise LumenError("no number has been logged" + ("." if len(runs) == 1 else " in any of these runs."))
    if not wanted:
        return measures(names)
    titles = {title: [name for name, _ in members] for title, members in grouped(names).items()}
    found = []
    for each in wanted:
        exact = [each] if each in names else titles.get(each, [])
        matched = exact or fnmatch.filter(names, each)
        if not matched:
            raise LumenError(f"{_nobody(runs)} logged {each!r}; {_there(each, [*titles, *names])}.")
        found += matched
    return list(dict.fromkeys(found))


def _nobody(runs: Sequence[Logged]) -> str:
    return str(runs[0].path) + " has not" if len(runs) == 1 else "None of these runs has"


def _there(wanted: str, names: Iterable[str]) -> str:
    """The names there are, near misses first."""
    names = list(dict.fromkeys(names))
    near = difflib.get_close_matches(wanted, names, n=3)
    rest = [name for name in names if name not in near]
    more = len(near) + len(rest) - _SHOWN
    listed = ", ".join([*near, *rest][:_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"did you mean {' or '.join(near)}? There is {listed}" if near else f"there is {listed}"


# --------------------------------------------------------------------------------------------- panels


def panels(runs: Sequence[Logged], wanted: Sequence[str], x: X, smooth: float, log: bool) -> list[Panel]:
    """A panel for each metric, in which training and validation of all runs lie over each other."""
    names, labels = chosen(runs, wanted), run_names(runs)
    found_at = [places(run, x) for run in runs]
    groups = grouped(names)
    found = []
    for title, members in groups.items():
        lines = []
        for number, run in enumerate(runs):
            for part, (name, split) in enumerate(members):
                across, up = curve(run.rows, found_at[number], name)
                if not up:
                    continue
                one = len(runs) == 1
                label = printable(split if one else f"{labels[number]} {split}".rstrip())
                smoothed = smoothing(up, smooth)
                raw = up if smooth else None
                lines.append(Line(label, across, smoothed, part if one else number, 0 if one else part, raw))
        whole = printable(title if len(members) > 1 else members[0][0])
        single = len(lines) == 1 and len(runs) == 1
        found.append(Panel(whole, [replace(lines[0], name="")] if single else lines, log, x))
    return found


def curve(rows: Sequence[Row], at: Sequence[float], name: str) -> tuple[list[float], list[float]]:
    """One metric, where the rows lie `at` these places."""
    points = [(place, row.values[name]) for place, row in zip(at, rows, strict=True) if name in row.values]
    return [x for x, _ in points], [y for _, y in points]


def smoothing(values: Sequence[float], weight: float) -> list[float]:
    """The running mean that TensorBoard draws: `weight` of what was, the rest of what is. Gaps stay gaps.

    >>> smoothing([1.0, float("nan"), 2.0], 0.5)
    [1.0, nan, 1.6666666666666667]
    """
    found, mean, count = [], 0.0, 0
    for value in values:
        if weight and math.isfinite(value):
            mean, count = weight * mean + (1 - weight) * value, count + 1
            # The mean began at zero, and would stay too small for a long time.
            value = mean / (1 - weight**count)
        found.append(value)
    return found


def places(run: Logged, x: X) -> list[float]:
    """Where each row lies on the horizontal axis; raises `LumenError` where that was not logged."""
    if x == "step":
        return [float(row.step) for row in run.rows]
    if x == "seconds":
        times = [math.nan if row.time is None else row.time for row in run.rows]
        begin = next((time for time in times if math.isfinite(time)), None)
        if begin is None and times:
            raise LumenError(f"{run.path} does not say when its rows were logged: draw them over --x step.")
        return [time - (begin or 0.0) for time in times]
    return epochs(run)


def epochs(run: Logged) -> list[float]:
    """Epochs with their fractions: each is as long in steps as until the next begins, the last as the one before.

    Raises `LumenError` where epochs were not logged.
    """
    begins: dict[float, int] = {}
    for row in run.rows:
        if "epoch" in row.values:
            begins.setdefault(row.values["epoch"], row.step)
    if not begins and run.rows:
        raise LumenError(f"{run.path} has no epochs: draw it over --x step.")
    known = [(step, epoch) for epoch, step in begins.items() if math.isfinite(epoch)]
    if not known or known[0][1] == 0:  # the first row comes some steps after the beginning of epoch 0
        known[:1] = [(0, 0.0)]
    known = [known[0], *(b for a, b in itertools.pairwise(known) if b[0] > a[0] and b[1] > a[1])]
    steps, numbers = zip(*known, strict=True)
    if len(known) > 1:
        slope = (numbers[-1] - numbers[-2]) / (steps[-1] - steps[-2])
        last = max(row.step for row in run.rows)
        steps, numbers = (*steps, last + 1), (*numbers, numbers[-1] + slope * (last + 1 - steps[-1]))
    placed: list[float] = np.interp([float(row.step) for row in run.rows], steps, numbers).tolist()
    return placed


# ---------------------------------------------------------------------------------------------- names


def run_names(runs: Sequence[Logged]) -> list[str]:
    """What each run is called beside the others: the parts of its path, and of its configuration, that differ."""
    paths = [tuple(run.path.absolute().parts) for run in runs]
    if len(runs) < 2:
        return [run.path.parent.name if run.path.stem == "metrics" else run.path.name for run in runs]
    shared = len(_common(paths))
    ends = [path[shared:] for path in paths]
    tail = min(len(_common([end[::-1] for end in ends])), *(max(len(end) - 1, 0) for end in ends))
    names = ["/".join(end[: len(end) - tail]) or path[-1] for end, path in zip(ends, paths, strict=True)]
    told = [_told(run.config, runs) for run in runs]
    return [f"{name} ({said})" if said else name for name, said in zip(names, told, strict=True)]


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    same = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in same]


def _told(config: Mapping[str, Any], runs: Sequence[Logged]) -> str:
    """The values by which the configurations differ, where these are few and short."""
    known = [_settings(run.config) for run in runs]
    if not all(known):
        return ""
    names = [name for name in known[0] if len({str(each.get(name)) for each in known}) > 1]
    said = ", ".join(f"{name} {_settings(config).get(name)}" for name in names)
    return said if len(names) <= _TOLD and len(said) <= 30 else ""


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("config")
    if not isinstance(found, Mapping):
        return {}
    # A path is that of the run more often than not, which the name has already.
    return {str(k): v for k, v in found.items() if isinstance(v, str | int | float) and "/" not in str(v)}
