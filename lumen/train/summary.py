"""`lm.summary`: what a state holds, module by module, and what a step costs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

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
_TREE_COLUMNS = ("name", "elements", "bytes", "dtypes")


@dataclass(frozen=True)
class SummaryRow:
    """One row of a summary: a module with its submodules, or an entry of a state that has no module.

    `trainable`, `frozen` and `buffers` count the elements of params, of parameters with `requires_grad=False`, and of
    buffers. All three are zero for a state without a module, which does not tell them apart. `elements` counts all.
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
        """How many levels it is below the model."""
        return _depth(self.name)


@dataclass(frozen=True, repr=False)
class Summary:
    """The result of `lm.summary`; `print` it, or `show` it with colors on a terminal.

    `rows` has one entry for each line, the model first. `nbytes` has the bytes of each field of the state. `flops` are
    those of one step: None without a step, or if they cannot be counted, for the `reason`.
    """

    rows: tuple[SummaryRow, ...]
    nbytes: Mapping[str, int]
    flops: int | None = None
    reason: str = ""

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return self.rows[0].trainable

    @property
    def frozen(self) -> int:
        """The number of parameters with `requires_grad=False`."""
        return self.rows[0].frozen

    @property
    def buffers(self) -> int:
        """The number of elements of all buffers."""
        return self.rows[0].buffers

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
        for row, cells in zip(self.rows, rows, strict=True):
            table.add_row(*map(Text, cells), style="" if row.name else "bold", end_section=not row.name)
        return table

    def show(self) -> None:
        """Write it to standard output: as a table on a terminal, as plain text elsewhere."""
        if not sys.stdout.isatty():
            sys.stdout.write(f"{self}\n")
            return
        from rich.console import Console

        Console().print(self)

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        columns = _COLUMNS if self.rows[0].kind else _TREE_COLUMNS
        return columns, [tuple(_cells(row)[name] for name in columns) for row in self.rows]

    def _footer(self) -> list[str]:
        fields = [f"{printable(name)} {human_bytes(size)}" for name, size in self.nbytes.items() if size]
        lines = [f"state: {human_bytes(sum(self.nbytes.values()))}" + (f" ({', '.join(fields)})" if fields else "")]
        if self.flops is not None:
            lines.append(f"one step: {human_flops(self.flops)}")
        elif self.reason:
            lines.append(f"one step: its FLOPs are unknown; {self.reason}")
        return lines


@overload
def summary(state: Any, /, *, depth: int = 1) -> Summary: ...


@overload
def summary(step: StepFn, state: Any, batch: Any, /, *, depth: int = 1) -> Summary: ...


def summary(*args: Any, depth: int = 1) -> Summary:
    """The contents of a state, module by module down to `depth`: `summary(state)` or `summary(step, state, batch)`.

    The second form adds the FLOPs of one step, counted as by `lm.flops_of`. For an `lm.TrainState` the rows are
    modules, each with its submodules; tied parameters count where they occur first. For any other pytree the rows are
    its entries by their paths.

    Raises:
        HyperparameterError: `depth` is not an integer from 0.
        StepError: neither a state alone, nor a step, a state and a batch.

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
    if len(args) not in (1, 3):
        raise StepError(
            f"summary takes a state, or a step with its state and batch, but got {len(args)} arguments. Write"
            " lm.summary(state) or lm.summary(step, state, batch)."
        )
    state = args[len(args) // 2]
    sizes = {name: tree.nbytes(value) for name, value in _fields(state).items()}
    flops, reason = count_flops(*args) if len(args) == 3 else (None, "")
    return Summary(tuple(_rows(state, depth)), sizes, flops, reason)


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
    """The top level of a state, by name."""
    if hasattr(type(state), "_fields_"):
        names = {path.split(".")[0].split("[")[0] for path in tree.paths(state)}
        return {name: value for name, value in vars(state).items() if name in names}
    return dict(state) if isinstance(state, Mapping) else {"state": state}


def _rows(state: Any, depth: int) -> list[SummaryRow]:
    apply = getattr(state, "apply_fn", None)
    module = getattr(apply, "module", None)
    if module is None or not isinstance(getattr(state, "params", None), Mapping):
        return _entries(state, depth)
    frozen: frozenset[str] = getattr(apply, "frozen", frozenset())
    buffers = {name: t for name, t in state.buffers.items() if name not in frozen}
    frozen_params = {name: t for name, t in state.buffers.items() if name in frozen}
    return [
        _row(name, type(sub).__name__, *(_below(name, ts) for ts in (state.params, frozen_params, buffers)), [])
        for name, sub in module.named_modules()
        if _depth(name) <= depth
    ]


def _entries(state: Any, depth: int) -> list[SummaryRow]:
    """The rows of a pytree without a module: its leaves, grouped by the first keys of their paths."""
    groups: dict[str, list[Tensor]] = {"": []}
    for path, tensor in tree.named_tensors(state):
        keys = path.replace("[", ".").replace("]", "").split(".") if path else []
        for i in range(min(depth, len(keys)) + 1):
            groups.setdefault(".".join(keys[:i]), []).append(tensor)
    return [_row(name, "", [], [], [], tensors) for name, tensors in groups.items()]


def _row(name: str, kind: str, *groups: list[Tensor]) -> SummaryRow:
    """The row of tensors that are trainable, frozen, buffers, or of an unknown group."""
    tensors = [t for group in groups for t in group]
    trainable, frozen, buffers, _ = (sum(t.numel() for t in group) for group in groups)
    elements = sum(t.numel() for t in tensors)
    dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors)
    return SummaryRow(name, kind, trainable, frozen, buffers, elements, tree.nbytes(tensors), tuple(dtypes))


def _below(name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [t for path, t in tensors.items() if not name or path.startswith(f"{name}.")]


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _cells(row: SummaryRow) -> dict[str, str]:
    return {
        "name": "  " * row.depth + (printable(row.name) or "."),
        "kind": row.kind,
        "trainable": f"{row.trainable:,}",
        "frozen": f"{row.frozen:,}",
        "buffers": f"{row.buffers:,}",
        "elements": f"{row.elements:,}",
        "bytes": human_bytes(row.nbytes),
        "dtypes": ", ".join(row.dtypes),
    }


def _line(columns: tuple[str, ...], row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
        for name, cell, width in zip(columns, row, widths, strict=True)
    ]
    return "  ".join(cells).rstrip()
