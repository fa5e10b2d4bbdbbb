"""What a function holds of its surroundings: the values of its cells, and the functions defined in it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any


def cell_value(cell: types.CellType) -> Any:
    """What a cell of a closure holds, or None where nothing has been assigned to it yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function, then that of each function defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)
