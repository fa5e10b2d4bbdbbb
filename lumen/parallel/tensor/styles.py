"""How a module of a plan is cut: the vocabulary of `torch.distributed.tensor.parallel`, for plain local tensors.

Between modules a tensor is "whole" (the same on every process), "cut" along its last dim, or a part of the "sequence":
cut along dim 1, as of `[batch, time, width]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lumen.errors import HyperparameterError

SEQUENCE = 1  # the dim of [batch, time, width] that sequence parallelism cuts


@dataclass(frozen=True)
class Style:
    """Base of all styles; one with its defaults is written without arguments."""

    def __repr__(self) -> str:
        said = [f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True, repr=False)
class Colwise(Style):
    """A linear layer whose output features are cut, or an embedding whose width is.

    `groups` says of how many blocks the output consists, each of which is cut: 3 for a fused query, key and value. What
    a `Rowwise` layer then reads must be one block again. With
    `input="sequence"` the input is a part of the sequence and is gathered; with `output="whole"` the output is.

    >>> Colwise(groups=3)
    Colwise(groups=3)
    """

    groups: int = 1
    input: Literal["whole", "sequence"] = "whole"
    output: Literal["cut", "whole"] = "cut"

    def __post_init__(self) -> None:
        if type(self.groups) is not int or self.groups < 1:
            raise HyperparameterError(f"Colwise(groups={self.groups!r}) must be a number of blocks, from 1.")
        _check(self, input=("whole", "sequence"), output=("cut", "whole"))


@dataclass(frozen=True, repr=False)
class Rowwise(Style):
    """A linear layer whose input features are cut, as they come from a `Colwise` one, or an embedding whose rows are.

    Outputs are summed over the processes: to the whole, or with `output="sequence"` to each process's part of the
    sequence. A bias stays whole. `input="whole"` cuts an input that is whole.

    >>> Rowwise(output="sequence")
    Rowwise(output='sequence')
    """

    input: Literal["cut", "whole"] = "cut"
    output: Literal["whole", "sequence"] = "whole"

    def __post_init__(self) -> None:
        _check(self, input=("cut", "whole"), output=("whole", "sequence"))


@dataclass(frozen=True, repr=False)
class SequenceParallel(Style):
    """A module that works on each position by itself (a norm, dropout), given a part of the sequence.

    Its own params are whole; their gradients are summed over the parts. `input="whole"` cuts its first tensor along the
    sequence, which is how a model's first block begins; `output="whole"` gathers what comes out, as the last norm does.

    >>> SequenceParallel(output="whole")
    SequenceParallel(output='whole')
    """

    input: Literal["sequence", "whole"] = "sequence"
    output: Literal["sequence", "whole"] = "sequence"

    def __post_init__(self) -> None:
        _check(self, input=("sequence", "whole"), output=("sequence", "whole"))


@dataclass(frozen=True, repr=False)
class Region(Style):
    """A module, such as attention, that reads sizes around its `Colwise` and `Rowwise` layers.

    `divide` names its attributes that count heads or widths: within the region they are divided by the number of
    processes. `unit` names one, such as "head_dim", of which each `Colwise` layer inside must have a multiple. With
    `input="sequence"` the module is given a part of the sequence and sees all of it.

    >>> Region(divide=("n_head", "n_embd"))
    Region(divide=('n_head', 'n_embd'))
    """

    divide: str | Sequence[str] = ()
    unit: str | None = None
    input: Literal["whole", "sequence"] = "whole"

    def __post_init__(self) -> None:
        _check(self, input=("whole", "sequence"))

    @property
    def divided(self) -> tuple[str, ...]:
        """The names in `divide`."""
        return (self.divide,) if isinstance(self.divide, str) else tuple(self.divide)


def _check(style: Style, **allowed: Sequence[Any]) -> None:
    for name, values in allowed.items():
        value = getattr(style, name)
        if value not in values:
            known = " or ".join(map(repr, values))
            raise HyperparameterError(f"{type(style).__name__}({name}={value!r}) is unknown; give {known}.")
