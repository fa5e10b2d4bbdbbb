"""How a module of a plan is sharded: the terms of `torch.distributed.tensor.parallel`, for plain local tensors.

Between modules a tensor is "replicate" (the same on every rank), "shard" (sharded along its last dim), or "sequence"
(sharded along dim 1 of `[batch, time, width]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lumen.core.annotations import integer_of
from lumen.core.arguments import describe
from lumen.errors import ArgumentError, HyperparameterError

SEQUENCE = 1  # the dim of [batch, time, width] that sequence parallelism shards


@dataclass(frozen=True)
class Style:
    """Base of all styles; `repr` shows the arguments that differ from the defaults."""

    def __repr__(self) -> str:
        arguments = [f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(arguments)})"


@dataclass(frozen=True, repr=False)
class Colwise(Style):
    """A linear layer whose output features are sharded, or an embedding whose width is.

    `groups` is the number of blocks in the output, each of which is sharded: 3 for a fused query, key and value. A
    `Rowwise` layer after it must read one block. With `input="sequence"` the input is a shard of the sequence and is
    gathered; with `output="replicate"` the output is gathered.

    >>> Colwise(groups=3)
    Colwise(groups=3)
    """

    groups: int = 1
    input: Literal["replicate", "sequence"] = "replicate"
    output: Literal["shard", "replicate"] = "shard"

    def __post_init__(self) -> None:
        groups = integer_of(self.groups, low=1)
        if groups is None:
            raise HyperparameterError(f"Colwise(groups={self.groups!r}) must be a number of blocks, from 1.")
        object.__setattr__(self, "groups", groups)
        _check(self, input=("replicate", "sequence"), output=("shard", "replicate"))


@dataclass(frozen=True, repr=False)
class Rowwise(Style):
    """A linear layer whose input features are sharded, as from a `Colwise` layer, or an embedding whose rows are.

    Outputs are summed over the ranks: all-reduced, or with `output="sequence"` reduce-scattered to each rank's shard of
    the sequence. A bias is replicated. `input="replicate"` shards a replicated input.

    >>> Rowwise(output="sequence")
    Rowwise(output='sequence')
    """

    input: Literal["shard", "replicate"] = "shard"
    output: Literal["replicate", "sequence"] = "replicate"

    def __post_init__(self) -> None:
        _check(self, input=("shard", "replicate"), output=("replicate", "sequence"))


@dataclass(frozen=True, repr=False)
class SequenceParallel(Style):
    """A module that computes each position separately (a norm, dropout), on a shard of the sequence.

    Its own params are replicated; their gradients are summed over the ranks. `input="replicate"` shards its first
    tensor along the sequence, as for a model's first block; `output="replicate"` gathers the output, as for the last
    norm.

    >>> SequenceParallel(output="replicate")
    SequenceParallel(output='replicate')
    """

    input: Literal["sequence", "replicate"] = "sequence"
    output: Literal["sequence", "replicate"] = "sequence"

    def __post_init__(self) -> None:
        _check(self, input=("sequence", "replicate"), output=("sequence", "replicate"))


@dataclass(frozen=True, repr=False)
class ReplicatedParams(Style):
    """A module inside a region with params of its own, such as a norm of each head's queries.

    It computes on this rank's shard of heads or features. Its params are replicated, and their gradients summed over
    the ranks.

    >>> ReplicatedParams()
    ReplicatedParams()
    """


@dataclass(frozen=True, repr=False)
class Region(Style):
    """A module, such as attention, that reads sizes around its `Colwise` and `Rowwise` layers.

    `divide` names its attributes that count heads or widths: in the region they are divided by the number of ranks.
    `unit` names an attribute, such as "head_dim"; the output of each `Colwise` layer inside must have a multiple of it
    on each rank. With `input="sequence"` the module receives a shard of the sequence, which is gathered for it.

    >>> Region(divide=("n_head", "n_embd"))
    Region(divide=('n_head', 'n_embd'))
    """

    divide: str | Sequence[str] = ()
    unit: str | None = None
    input: Literal["replicate", "sequence"] = "replicate"

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.divided) or not isinstance(self.unit, str | None):
            raise _not_names(self)
        _check(self, input=("replicate", "sequence"))

    @property
    def divided(self) -> tuple[str, ...]:
        """The names in `divide`."""
        names: Any = self.divide
        return tuple(names) if isinstance(names, list | tuple) else (names,)


def _not_names(region: Region) -> ArgumentError:
    return ArgumentError(
        f"lm.parallel.Region: divide is {describe(region.divide)}, and unit is {describe(region.unit)}; they name"
        ' attributes. Write: lm.parallel.Region(divide=("n_head", "n_embd"), unit="head_dim")'
    )


def _check(style: Style, **allowed: Sequence[Any]) -> None:
    for name, values in allowed.items():
        value = getattr(style, name)
        if value not in values:
            choices = " or ".join(map(repr, values))
            raise HyperparameterError(f"{type(style).__name__}({name}={value!r}) is unknown; give {choices}.")
