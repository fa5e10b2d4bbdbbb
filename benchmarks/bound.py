"""A lower bound for the memory of a step: params, moments, gradients and activations of a model in units.

A unit is a layer whose params and activations are allocated and freed together. For the backward pass over the units,
last to first, the bound is the maximum of what is alive before and after each:

    params and moments                      3 P / n
    gradients of the units behind it        G_later / n     (all of P / n throughout, where microbatches are summed)
    activations of the units before it      A_before / (n k)
    before: its own activations             A_own / (n k)
    after: its own gradient                 P_own           (not with microbatches, where it can be added in place)
    its own params, gathered                P_own           (only on n > 1 processes)

with P floats of params, on n processes, in k microbatches. With remat, earlier units hold only their inputs. A step
that does not overwrite the old state holds at least 6 P, the old and the new. Inputs of the model are not counted:
they exist before the step and belong to the caller. A kernel's own workspace comes on top, as do incoming gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

FLOAT = 4  # bytes


class Unit(NamedTuple):
    """Floats of a layer: its params, what it saves for the backward pass, and its input, which is included in that."""

    params: int
    kept: int
    input: int


def mlp(widths: Sequence[int], rows: int) -> list[Unit]:
    """Linear layers with ReLU between them: each keeps its input, and the loss the log-probabilities."""
    units = []
    for at, (before, after) in enumerate(itertools.pairwise(widths)):
        kept = rows * before if at else 0
        units.append(Unit((before + 1) * after, kept, kept))
    last = units[-1]
    units[-1] = last._replace(kept=last.kept + rows * widths[-1])
    return units


def gpt(vocab: int, tokens: int, width: int, layers: int, rows: int) -> list[Unit]:
    """The GPT of tasks.py: the embedding, the blocks, and the head.

    A block keeps 16 floats per token and channel: the inputs of both norms, the norms' outputs, queries, keys and
    values, the attention's output (which is the projection's input), and four each before and after GELU.
    """
    count = rows * tokens
    block = Unit(12 * width**2 + 13 * width, 16 * width * count, width * count)
    head = Unit(2 * width + (width + 1) * vocab, (2 * width + vocab) * count, width * count)
    return [Unit((vocab + tokens) * width, 0, 0), *[block] * layers, head]


def least(
    units: Sequence[Unit], *, keeps_old: bool = False, remat: bool = False, processes: int = 1, microbatches: int = 1
) -> int:
    """Bytes of the bound."""
    params = sum(unit.params for unit in units)
    state = 3 * params / processes
    share = processes * microbatches
    most = 0.0
    for at, unit in enumerate(units):
        gradients = params if microbatches > 1 else sum(later.params for later in units[at + 1 :])
        before = sum(each.input if remat else each.kept for each in units[:at]) / share
        gathered = unit.params if processes > 1 else 0
        own = unit.params if microbatches == 1 else 0
        most = max(most, gradients / processes + before + gathered + max(unit.kept / share, own))
    return int(FLOAT * max(state + most, 2 * state if keeps_old else 0))
