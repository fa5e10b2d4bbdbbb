"""`MetricAccumulator`: metrics kept on the device from step to step, read by the host only when they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lumen import tree
from lumen.checkpoint import listed
from lumen.core.metrics import GlobalMean, Mean, as_value, compute_metrics, is_value, merge_metrics
from lumen.errors import InexactWarning
from lumen.metrics.torchmetrics import MetricValue
from lumen.optim._numerics import scalar_dtype

if TYPE_CHECKING:
    from lumen.train.distributed import ProcessGroupContext

Entry = Mapping[str, Mapping[str, Tensor]]

_MERGE_AFTER = 256  # bounds what is held between two readings
_MANY = 64
_GLOBAL, _PLAIN = "global", "plain"  # kinds of metrics, in checkpoints


class MetricAccumulator:
    """Collects the metrics of steps; `read` merges them and moves all numbers to the host in one transfer."""

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._newest: Any = None  # as the step gave it: what was merged does not tell what it was
        self._saved: list[Entry] = []
        self._saved_kinds: dict[str, str] = {}

    def add(self, metrics: Any) -> None:
        """Take in one step's metrics; nothing is computed."""
        if self._saved:  # of what form they were shows only now
            self._held = [rebuilt(each, metrics) for each in self._saved]
            self._saved = []
        self._held.append(metrics)
        self._newest = metrics
        if len(self._held) >= _MERGE_AFTER:
            self._held = [merge_metrics(self._held)]

    def __bool__(self) -> bool:
        return bool(self._held)

    def read(self, prefix: str = "", everyone: ProcessGroupContext | None = None, place: str = "") -> dict[str, float]:
        """The merged numbers by name, those of all processes with `everyone`, and start anew.

        `place` is what they are called among processes, by default `prefix`.

        A metric that is a vector (one entry for each lane of an ensemble) becomes `name/0`, `name/1`, …
        """
        held, self._held, self._newest = self._held, [], None
        merged = merge_metrics(held) if held else None

        def numbers(metrics: Any) -> dict[str, float]:
            return to_floats(compute_metrics(metrics), prefix)

        if everyone is not None:
            return everyone.merged(place or prefix, merged, numbers)
        return {} if merged is None else numbers(merged)

    def state_dict(self) -> dict[str, Any]:
        """What is held, unmerged: sums of floats depend on their order, and going on must not change it."""
        entries = self._saved or [parts(each) for each in self._held]
        if not entries:
            return {}
        found = self._saved_kinds if self._saved else kinds(self._newest)
        return {**self._stacked(entries), **({"kinds": found} if found else {})}

    def _stacked(self, entries: Sequence[Entry]) -> dict[str, Any]:
        if any(_shapes(each) != _shapes(entries[0]) for each in entries):
            return {"entries": list(entries)}
        columns = {
            name: {key: torch.stack([each[name][key] for each in entries]) for key in held}
            for name, held in entries[0].items()
        }
        return {"columns": columns}  # few arrays rather than one for each number: each is a file

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Hold again what `state_dict` gave, or several gave, also as `lm.checkpoint.load` gives it."""
        self._held, self._newest = [], None
        self._saved = [entry for state in states for entry in _unstacked(state)]
        self._saved_kinds = next((dict(state["kinds"]) for state in states if state.get("kinds")), {})


def adopted(states: Sequence[Mapping[str, Any]], now: int) -> list[dict[str, Any]]:
    """What the meters of several processes held, for one of `now` processes to go on from.

    Values of a process's own rows are taken over as they are. A `GlobalMean` is the same on all, and counts once. Of
    plain numbers each process gives one for each step: they weigh as much as those that `now` processes give.
    """
    share = now / max(1, len(states))
    found = []
    for place, state in enumerate(states):
        known = state.get("kinds", {})
        entries = [
            {name: _weighed(held, known.get(name), place == 0, share) for name, held in entry.items()}
            for entry in _unstacked(state)
        ]
        found.append({"entries": entries, "kinds": known})
    return found


def _weighed(held: Mapping[str, Tensor], kind: str | None, first: bool, share: float) -> Mapping[str, Tensor]:
    if kind == _GLOBAL and not first:
        return {key: torch.zeros_like(part) for key, part in held.items()}
    if kind == _PLAIN:
        mean = Mean(held["0"], held["1"]) if "1" in held else as_value(held["0"])
        return {str(i): part * share for i, part in enumerate(tree.leaves(mean))}
    return held


def kinds(metrics: Any) -> dict[str, str]:
    """Which metrics are not of a process's own rows, by name: means of all rows, and plain numbers."""
    found = zip(tree.paths(metrics, is_leaf=is_value), tree.leaves(metrics, is_leaf=is_value), strict=True)
    said = {name or "value": _kind(value) for name, value in found}
    return {name: kind for name, kind in said.items() if kind}


def _kind(value: Any) -> str:
    if isinstance(value, GlobalMean):
        return _GLOBAL
    return "" if is_value(value) else _PLAIN


def _unstacked(state: Mapping[str, Any]) -> list[Entry]:
    columns: Mapping[str, Mapping[str, Tensor]] = state.get("columns", {})
    count = next((len(part) for held in columns.values() for part in held.values()), 0)
    rows = [
        {name: {key: part[i] for key, part in held.items()} for name, held in columns.items()} for i in range(count)
    ]
    return [*listed(state.get("entries", ())), *rows]


_REDUCE = "Reduce it in the step, to a mean or its quantiles, say."


def to_floats(metrics: Any, prefix: str = "", advice: str = _REDUCE) -> dict[str, float]:
    """Numbers of a metrics tree by their names, moved to the host in one transfer.

    Warns, with the `advice`, of a tensor of more numbers than are logged.
    """
    named = {f"{prefix}{name}": torch.as_tensor(leaf).detach() for name, leaf in _named(metrics)}
    flat: dict[str, Tensor] = {}
    for name, value in named.items():
        if value.dim() == 0:
            flat[name] = value
        elif value.numel() <= _MANY:
            flat.update({f"{name}/{i}": each for i, each in enumerate(value.flatten())})
        else:
            warnings.warn(
                f"the metric {name!r} has {value.numel()} numbers, more than the {_MANY} that are logged one by one,"
                f" so it is left out. {advice}",
                InexactWarning,
                stacklevel=2,
            )
    if not flat:
        return {}
    return dict(zip(flat, _numbers([*flat.values()]), strict=True))


def _numbers(scalars: list[Tensor]) -> list[float]:
    """0-d tensors as numbers, in one transfer from their device, or two from one that has no float64."""
    if all(scalar_dtype(each.device) == torch.float64 for each in scalars):
        return torch.stack([each.to(torch.float64) for each in scalars]).tolist()
    numbers = [0.0] * len(scalars)
    for dtype, floating in ((torch.float32, True), (torch.int64, False)):  # a count need not fit into 24 bits
        places = [i for i, each in enumerate(scalars) if each.is_floating_point() is floating]
        found = torch.stack([scalars[i].to(dtype) for i in places]).tolist() if places else []
        for place, number in zip(places, found, strict=True):
            numbers[place] = float(number)
    return numbers


def parts(metrics: Any) -> Entry:
    """The tensors that each metric is made of, by its name."""
    found = zip(tree.paths(metrics, is_leaf=is_value), tree.leaves(metrics, is_leaf=is_value), strict=True)
    return {name or "value": _taken_apart(value) for name, value in found}


def _taken_apart(value: Any) -> dict[str, Tensor]:
    if isinstance(value, MetricValue):
        return dict(value.metric.pack(value))
    return {str(i): torch.as_tensor(leaf) for i, leaf in enumerate(tree.leaves(value))}


def rebuilt(saved: Entry, like: Any) -> Any:
    """The metrics that `parts` took apart, in the form of `like`."""
    names = iter(tree.paths(like, is_leaf=is_value))

    def rebuild(value: Any) -> Any:
        held = saved[next(names) or "value"]
        device = next((leaf.device for leaf in tree.tensors(value)), None)
        placed = {key: part.to(device) for key, part in held.items()}
        if isinstance(value, MetricValue):
            return value.metric.unpack(placed)
        if not is_value(value) and len(placed) > 1:  # several plain numbers that were merged
            return Mean(placed["0"], placed["1"])
        return tree.unflatten(tree.structure(value), [placed[str(i)] for i in range(len(placed))])

    return tree.map(rebuild, like, is_leaf=is_value)


def _shapes(entry: Entry) -> Any:
    return {name: {k: (part.shape, part.dtype) for k, part in held.items()} for name, held in entry.items()}


def _named(metrics: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(metrics, Mapping):
        return [pair for key, value in metrics.items() for pair in _named(value, f"{path}/{key}" if path else str(key))]
    leaves = tree.leaves(metrics)
    if len(leaves) == 1 and leaves[0] is metrics:
        return [(path or "value", metrics)]
    return [(f"{path}/{i}" if path else str(i), leaf) for i, leaf in enumerate(leaves)]
