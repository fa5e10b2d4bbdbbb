"""Which optimizers may run on shards."""

from __future__ import annotations

from typing import Any

from lumen.errors import HyperparameterError


def check_optimizer(tx: Any, under: str = "lm.fsdp", can_gather: bool = True) -> None:
    """Raise `HyperparameterError` if `tx` needs full tensors that are not gathered, or rows that are cut.

    `can_gather` means that the transform `under` shards by rows, and provides all-gathers for rules that use them.

    >>> import lumen as lm
    >>> check_optimizer(lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.lamb(1e-3)))
    """
    reason = getattr(tx, "needs_full_tensors", "")
    if reason and not (can_gather and tx.can_gather):
        raise HyperparameterError(
            f"this optimizer cannot run under {under}, where each rank updates its own shards: {reason}. Use"
            f" lm.optim.adamw, {'muon' if can_gather else 'lion'} or another rule of lm.optim, or train under lm.ddp()."
        )
    rows = getattr(tx, "needs_rows", "")
    if rows and not can_gather:
        raise HyperparameterError(
            f"this optimizer cannot run under {under}, where a rank may have parts of rows: {rows}. Leave out"
            " state_dtype and stochastic_rounding, or shard by rows: lm.fsdp()"
        )
