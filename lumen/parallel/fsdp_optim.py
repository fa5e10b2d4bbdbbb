"""Which optimizers may run on parts of tensors: those whose rule for an entry looks at that entry alone."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

from lumen.errors import HyperparameterError
from lumen.optim.base import Transform
from lumen.optim.interop import _TorchRule

# By the function that makes it: what it would take from a whole tensor, or from all tensors at once.
_WHOLE = {
    "muon": "the singular vectors of whole matrices",
    "adafactor": "the rows and columns of whole matrices",
    "scale_by_trust_ratio": "the norm of each whole tensor (lamb is made of it)",
    "apply_if_finite": "whether all gradients are finite; lm.guard() does that",
}
# Global norms are joined over processes: lumen.core.sharding.

_ELEMENTWISE = (
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"),
)


def check_optimizer(tx: Any, under: str = "lm.fsdp") -> None:
    """Raise `HyperparameterError`, naming it, where a part of `tx` needs more than its own entries.

    >>> import lumen as lm
    >>> check_optimizer(lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.adamw(1e-3)))
    """
    for name, needs in _refused(tx):
        raise HyperparameterError(
            f"{name} cannot run under {under}, where each process updates its own part: it needs {needs}. Use"
            " lm.optim.adamw, sgd, lion or another rule for single entries, or train under lm.ddp()."
        )


def _refused(tx: Any) -> Iterator[tuple[str, str]]:
    for found in _functions(tx):
        rule = getattr(found, "__self__", None)
        if isinstance(rule, _TorchRule):
            kind = rule.optimizer
            known = kind.__module__.startswith("torch.optim.") and kind.__name__ in _ELEMENTWISE
            if not known:
                yield f"from_torch({kind.__name__})", "to be known for a rule for single entries"
        maker = found.__qualname__.partition(".<locals>")[0]
        if found.__module__.startswith("lumen.optim.") and maker in _WHOLE:
            yield f"lm.optim.{maker}", _WHOLE[maker]


def _functions(root: Any) -> Iterator[Callable[..., Any]]:
    """The functions that a transform is made of, and those of the transforms that these close over."""
    seen: set[int] = set()
    todo = [root]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Transform):
            todo += [each.init_fn, each.update_fn, each.fused_fn, each.scale_fn]
        elif isinstance(each, types.FunctionType | types.MethodType):
            yield each
            cells = each.__closure__ or ()
            todo += [cell.cell_contents for cell in cells if _filled(cell)]
            todo += [each.__self__] if isinstance(each, types.MethodType) else []
        elif isinstance(each, tuple | list):
            todo += each
        elif isinstance(each, dict):
            todo += each.values()
        elif type(each).__module__.startswith("lumen.optim.") and hasattr(each, "__dict__"):
            todo += vars(each).values()


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
