"""`lm.summary`: what a state holds, module by module, and what a step costs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lumen import tree
from lumen.core.flops import count as count_flops
from lumen.core.flops import flops_of as flops_of
from lumen.core.flops import peak_flops as peak_flops
from lumen.core.inspect import human_bytes
from lumen.core.step import StepFn
from lumen.errors import StepError, printable
from lumen.optim._hyperparams import check_count

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("name", "kind", "trainable", "frozen", "buffers", "bytes", "dtypes")
_NUMBERS = ("trainable", "frozen", "buffers", "elements", "bytes")
_OF_A_TREE = ("name", "elements", "bytes", "dtypes")


@dataclass(frozen=True)
class Part:
    """One line of a summary: a module with all that is below it, or an entry of a state that has no module.

    `trainable`, `frozen` and `buffers` are numbers of elements: those of params, of parameters with
    `requires_grad=False`, and of buffers; all zero where there is no module to tell them apart. `elements` are all.
    """

    name: str
    kind: str
    trainable: int
    frozen: int
    buffers: int
    elements: int
    nbytes: int
    dtypes: tuple[str, ...]

    @property
    def depth(self) -> int:
        """How far below the whole it stands."""
        return _depth(self.name)


@dataclass(frozen=True, repr=False)
class Summary:
    """What `lm.summary` found; `print` it, or `show` it with colors on a terminal.

    `parts` are its lines, the whole model first. `nbytes` has the bytes of each field of the state. `flops` are those
    of one step, None where no step was given or where it cannot be counted, for the `reason`.
    """

    parts: tuple[Part, ...]
    nbytes: Mapping[str, int]
    flops: int | None = None
    reason: str = ""

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return self.parts[0].trainable

    @property
    def frozen(self) -> int:
        """The number of parameters with `requires_grad=False`."""
        return self.parts[0].frozen

    @property
    def buffers(self) -> int:
        """The number of elements of all buffers."""
        return self.parts[0].buffers

    def __str__(self) -> str:
        columns, rows = self._table()
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        return "\n".join([*(_line(columns, row, widths) for row in (columns, *rows)), "", *self._footer()])

    __repr__ = __str__  # a notebook's last line, or the prompt's answer, is for reading

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        columns, rows = self._table()
        table = Table(caption=Text("\n".join(self._footer())), caption_justify="left", caption_style="")
        for name in columns:
            table.add_column(name, justify="right" if name in _NUMBERS else "left", overflow="fold")
        for part, row in zip(self.parts, rows, strict=True):
            table.add_row(*map(Text, row), style="" if part.name else "bold", end_section=not part.name)
        return table

    def show(self) -> None:
        """Write it to standard output: as a table on a terminal, as plain text elsewhere."""
        if not sys.stdout.isatty():
            sys.stdout.write(f"{self}\n")
            return
        from rich.console import Console

        Console().print(self)

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        columns = _COLUMNS if self.parts[0].kind else _OF_A_TREE
        return columns, [tuple(_cells(part)[name] for name in columns) for part in self.parts]

    def _footer(self) -> list[str]:
        each = [f"{printable(name)} {human_bytes(size)}" for name, size in self.nbytes.items() if size]
        lines = [f"state: {human_bytes(sum(self.nbytes.values()))}" + (f" ({', '.join(each)})" if each else "")]
        if self.flops is not None:
            lines.append(f"one step: {human_flops(self.flops)}")
        elif self.reason:
            lines.append(f"one step: its FLOPs are unknown; {self.reason}")
        return lines


def summary(state: Any, step: StepFn | None = None, batch: Any = None, *, depth: int = 1) -> Summary:
    """What `state` holds, module by module down to `depth`, and with `step` and `batch` the FLOPs of one step.

    Of an `lm.TrainState` it lists the modules, each with all that is below it; tied parameters count where they
    stand first. Of any other pytree it lists the entries by their paths. FLOPs are counted as by `lm.flops_of`.

    Raises:
        HyperparameterError: `depth` is no whole number from 0.
        StepError: `step` without `batch`, or `batch` without `step`.

    >>> import lumen as lm, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))
    >>> lm.summary(lm.TrainState.create(net, lm.optim.adamw(1e-3)))
    name   kind         trainable  frozen  buffers    bytes  dtypes
    .      Sequential         244       0       33  1.1 KiB  float32, int64
      0    Linear             144       0        0    576 B  float32
      1    BatchNorm1d         32       0       33    264 B  float32, int64
      2    Linear              68       0        0    272 B  float32
    <BLANKLINE>
    state: 3.0 KiB (step 8 B, params 976 B, buffers 136 B, opt_state 1.9 KiB, seed 8 B)
    """
    check_count("depth", depth, low=0)
    if (step is None) != (batch is None):
        raise StepError("FLOPs need a step and a batch to run it on: lm.summary(state, step, batch).")
    sizes = {name: tree.nbytes(value) for name, value in _fields(state).items()}
    flops, reason = (None, "") if step is None else count_flops(step, state, batch)
    return Summary(tuple(_parts(state, depth)), sizes, flops, reason)


def human_flops(count: float) -> str:
    """`count` operations in decimal units.

    >>> human_flops(12_300_000)
    '12.3 MFLOP'
    """
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.0f} FLOP" if not unit else f"{count:.1f} {unit}FLOP"
        count /= 1000
    return f"{count:.1f} PFLOP"


def _fields(state: Any) -> dict[str, Any]:
    """The top level of a state by name."""
    if hasattr(type(state), "_fields_"):
        found = {path.split(".")[0].split("[")[0] for path in tree.paths(state)}
        return {name: value for name, value in vars(state).items() if name in found}
    return dict(state) if isinstance(state, Mapping) else {"state": state}


def _parts(state: Any, depth: int) -> list[Part]:
    apply = getattr(state, "apply_fn", None)
    module = getattr(apply, "module", None)
    if module is None or not isinstance(getattr(state, "params", None), Mapping):
        return _entries(state, depth)
    frozen: frozenset[str] = getattr(apply, "frozen", frozenset())
    buffers = {name: t for name, t in state.buffers.items() if name not in frozen}
    held = {name: t for name, t in state.buffers.items() if name in frozen}
    return [
        _part(name, type(sub).__name__, *(_below(name, each) for each in (state.params, held, buffers)), [])
        for name, sub in module.named_modules()
        if _depth(name) <= depth
    ]


def _entries(state: Any, depth: int) -> list[Part]:
    """A pytree without a module: its leaves, gathered by the first parts of their paths."""
    groups: dict[str, list[Tensor]] = {"": []}
    for path, tensor in tree.named_tensors(state):
        steps = path.replace("[", ".").replace("]", "").split(".") if path else []
        for i in range(min(depth, len(steps)) + 1):
            groups.setdefault(".".join(steps[:i]), []).append(tensor)
    return [_part(name, "", [], [], [], tensors) for name, tensors in groups.items()]


def _part(name: str, kind: str, *held: list[Tensor]) -> Part:
    everything = [t for tensors in held for t in tensors]
    trainable, frozen, buffers, _ = (sum(t.numel() for t in tensors) for tensors in held)
    elements = sum(t.numel() for t in everything)
    dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in everything)
    return Part(name, kind, trainable, frozen, buffers, elements, tree.nbytes(everything), tuple(dtypes))


def _below(name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [t for path, t in tensors.items() if not name or path.startswith(f"{name}.")]


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _cells(part: Part) -> dict[str, str]:
    return {
        "name": "  " * part.depth + (printable(part.name) or "."),
        "kind": part.kind,
        "trainable": f"{part.trainable:,}",
        "frozen": f"{part.frozen:,}",
        "buffers": f"{part.buffers:,}",
        "elements": f"{part.elements:,}",
        "bytes": human_bytes(part.nbytes),
        "dtypes": ", ".join(part.dtypes),
    }


def _line(columns: tuple[str, ...], row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
        for name, cell, width in zip(columns, row, widths, strict=True)
    ]
    return "  ".join(cells).rstrip()
