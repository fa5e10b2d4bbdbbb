"""Which optimizers may run on parts of tensors."""

from __future__ import annotations

from typing import Any

from lumen.errors import HyperparameterError


def check_optimizer(tx: Any, under: str = "lm.fsdp", gathers: bool = True) -> None:
    """Raise `HyperparameterError`, naming it, where a part of `tx` needs whole tensors, and nobody gathers them.

    A rule may do that by itself where the transform that cuts `gathers` for it.

    >>> import lumen as lm
    >>> check_optimizer(lm.optim.chain(lm.optim.clip_by_global_norm(1.0), lm.optim.lamb(1e-3)))
    """
    needs = getattr(tx, "whole", "")
    if needs and not (gathers and tx.gathers):
        raise HyperparameterError(
            f"this optimizer cannot run under {under}, where each process updates its own part: {needs}. Use"
            f" lm.optim.adamw, {'muon' if gathers else 'lion'} or another rule of lm.optim, or train under lm.ddp()."
        )
