"""`lm.inspect` shows what a step works on; `lm.check_purity` proves that it is a function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lumen import tree
from lumen.core.step import StepFn, as_step
from lumen.errors import PurityError


def inspect(step: StepFn, state: Any, batch: Any = None) -> str:
    """Print, and return, the rule stack of `step` and the leaves of `state` and `batch`.

    One line for each leaf: path, dtype, shape, device (with its sharding, for a distributed tensor) and bytes.

    >>> import lumen as lm, torch
    >>> def step(state, batch):
    ...     return state, {}
    >>> text = lm.inspect(lm.accumulate(2)(step), {"w": torch.zeros(2, 3)}, torch.zeros(4))
    lm.accumulate(2)(step)
    state: 1 tensor, 24 B
      w  float32  [2, 3]  cpu  24 B
    batch: 1 tensor, 16 B
      .  float32  [4]     cpu  16 B
    """
    lines = [repr(as_step(step)), *_table("state", state)]
    if batch is not None:
        lines += _table("batch", batch)
    text = "\n".join(lines)
    print(text)
    return text


def check_purity(step: StepFn, state: Any, batch: Any) -> None:
    """Run `step` twice on the same input, and raise `PurityError` unless it behaves as a function.

    It must leave `state` and `batch` bitwise as they were and give the same answer both times. A step that draws from
    torch's global generators (dropout without `lm.seeded()`) is not pure; one that donates its state is, but
    cannot be run twice: check it without `lm.donate()`.

    >>> import lumen as lm, torch
    >>> lm.check_purity(lambda state, batch: (state + batch.sum(), {}), torch.zeros(()), torch.ones(3))
    >>> lm.check_purity(lambda state, batch: (state + torch.rand(()), {}), torch.zeros(()), torch.ones(3))
    Traceback (most recent call last):
        ...
    lumen.errors.PurityError: the step gave another state when it was called again with the same input. ...
    """
    given = (state, batch)
    before = [(path, tensor, tensor.clone()) for path, tensor in tree.named_tensors(given)]
    first = step(state, batch)
    for path, tensor, copy in before:
        if not _same(tensor, copy):
            raise PurityError(
                f"the step changed {_side(path)} in place. Make a changed copy instead: state.replace(...), x + 1 for"
                " x.add_(1)."
            )
    second = step(state, batch)
    if tree.structure(first) != tree.structure(second):
        raise PurityError("the step returned another structure when it was called again with the same input.")
    for (path, a), (_, b) in zip(tree.named_tensors(first), tree.named_tensors(second), strict=True):
        if not _same(a, b):
            where = path.replace("0", "state", 1) if path.startswith("0") else path.replace("1", "metrics", 1)
            raise PurityError(
                f"the step gave another {where} when it was called again with the same input. It reads something"
                " outside its arguments: torch's global random generator (wrap it in lm.seeded(), or draw from"
                " lm.random with state.key), a global, or a module's own buffers."
            )


def human_bytes(count: float) -> str:
    """`count` bytes in binary units.

    >>> human_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _table(title: str, values: Any) -> list[str]:
    named = tree.named_tensors(values)
    rows = [(path or ".", _dtype(t), str(list(t.shape)), _place(t), human_bytes(_bytes(t))) for path, t in named]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    head = f"{title}: {len(rows)} tensor{'s' * (len(rows) != 1)}, {human_bytes(tree.nbytes(values))}"
    return [head, *("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(tensor: Tensor) -> str:
    placements = getattr(tensor, "placements", None)
    return str(tensor.device) if placements is None else f"{tensor.device} {placements}"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _side(path: str) -> str:
    return ("state" if path.startswith("0") else "batch") + path[1:]
