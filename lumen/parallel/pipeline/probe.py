"""The check of a split before anything is sent: which values pass from stage to stage, and their forms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumen.core import _torch_compat
from lumen.errors import LossError, ParamsError
from lumen.parallel.pipeline.absent import Absent


class Form(NamedTuple):
    """The shape and dtype of what one stage sends to the next."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Tensor) -> Form:
        """That of a tensor."""
        return cls(tuple(value.shape), value.dtype)


class Probed(BaseException):
    """Leaves the loss function when the model has been checked."""


class Probe:
    """Follows one microbatch through all stages, where every param is `Absent`.

    It raises `LossError` or `ParamsError` where a stage would need anything of another but the one tensor it receives.
    """

    stage = None  # it has no param of any

    def __init__(self, count: int) -> None:
        self._count = count
        self.forms: list[Form] = []

    def enter(self, index: int, name: str, value: Tensor) -> Tensor:
        """What stage `index` sees of the `value` that enters its first module."""
        stage = len(self.forms)
        if index <= stage:
            raise LossError(
                f"the model runs {name!r}, with which stage {index} begins, more than once. A split point is a module"
                " that runs once in a forward pass; choose another."
            )
        if index != stage + 1:
            raise _out_of_order(name, index, stage)
        _check_value(value, stage, f"what enters {name!r}")
        if not value.dtype.is_floating_point:
            raise ParamsError(f"{value.dtype} values enter {name!r}, which have no gradient. Split the model later.")
        self.forms.append(Form.of(value))
        assert isinstance(value, Absent)
        return Absent.of(value.fake, [index], value.mode)

    def leave(self, out: Any) -> None:
        """Check what the model returns."""
        stage = len(self.forms)
        if stage != self._count - 1:
            raise LossError(
                f"the forward pass ended in stage {stage} of {self._count}, without running the first module of stage"
                f" {stage + 1}. Choose split points that every forward pass goes through."
            )
        for leaf in _torch_compat.torch_pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                _check_value(leaf, stage, "what the model returns")
        raise Probed


def _check_value(value: Tensor, stage: int, what: str) -> None:
    if not isinstance(value, Absent):
        raise LossError(
            f"{what} does not depend on stage {stage}, so there is nothing to send. Choose another split point."
        )
    others = sorted(value.stages - {stage})
    if others:
        raise LossError(
            f"{what} depends on params or activations of stage {' and '.join(map(str, others))} by another way than the"
            f" one tensor that stage {stage} receives: lm.pipeline splits a sequence of blocks, without connections"
            " that skip a split point. Params belong to stages in the order in which modules are registered. Split the"
            " model elsewhere, or register its modules in the order in which they run."
        )


def _out_of_order(name: str, index: int, stage: int) -> LossError:
    return LossError(
        f"the model runs {name!r}, with which stage {index} begins, right after stage {stage}: stages must run in the"
        " order in which their modules are registered. Choose other split points."
    )
