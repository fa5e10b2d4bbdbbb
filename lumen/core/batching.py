"""Rows of a batch: counting them, splitting a batch into microbatches, and merging the results of these."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen import tree
from lumen.core.buffer_rules import STATISTICS
from lumen.core.buffers import Origin, merge_microbatches
from lumen.core.metrics import Mean, Metric, is_value
from lumen.core.primitives import Aux, Gradient
from lumen.errors import BatchError, LossError, printable


def count(batch: Any) -> int:
    """The number of rows of `batch`: the size of the first dim that all its leaves share.

    Raises `BatchError` where there is no such number.
    """
    kind = type(batch)
    leaves = batch.values() if kind is dict else batch if kind is tuple or kind is list else ()
    if {*map(type, leaves)} == {Tensor}:  # the usual ones, by a shorter way
        firsts = {leaf.shape[:1] for leaf in leaves}
        if len(firsts) == 1 and (first := firsts.pop()):
            return int(first[0])
    sizes = {_rows_of(leaf, batch) for leaf in tree.leaves(batch)} - {None}
    if len(sizes) == 1:
        return sizes.pop()  # type: ignore[return-value]
    if not sizes:
        raise BatchError("the batch has no tensor, so it has no rows to count or split.")
    listed = ", ".join(f"{printable(path) or 'batch'}: {tuple(leaf.shape)}" for path, leaf in tree.named_tensors(batch))
    raise BatchError(
        f"the leaves of the batch have different leading sizes ({listed}), so its rows cannot be counted or split."
        " What belongs to no row goes in as a further argument: lm.value_and_grad(loss_fn)(params, batch, extra)"
    )


def split(batch: Any, n: int) -> list[Any]:
    """`batch` in `n` microbatches along the first dim, as even as possible and in order (`torch.tensor_split`).

    Raises `BatchError` for a sparse tensor whose rows cannot be taken apart; those of torch.sparse_coo can.
    """
    leaves, spec = tree.flatten(batch)
    columns = [
        (torch.tensor_split(leaf, n) if leaf.layout is torch.strided else _split_sparse(leaf, n))
        if isinstance(leaf, Tensor)
        else (np.array_split(leaf, n) if isinstance(leaf, np.ndarray) else [leaf] * n)
        for leaf in leaves
    ]
    return [tree.unflatten(spec, chunk) for chunk in zip(*columns, strict=True)]


def _split_sparse(leaf: Tensor, n: int) -> list[Tensor]:
    if leaf.layout is not torch.sparse_coo:
        raise BatchError(
            f"the batch has a {leaf.layout} tensor of shape {tuple(leaf.shape)}, whose rows cannot be split into"
            " microbatches. Write x.to_sparse_coo() or x.to_dense(), or leave out the transform that splits batches."
        )
    bounds = [*torch.tensor_split(torch.arange(leaf.shape[0], device="cpu"), n)]
    starts = itertools.accumulate(map(len, bounds), initial=0)
    return [torch.narrow_copy(leaf, 0, start, len(rows)) for start, rows in zip(starts, bounds, strict=False)]


def add_gradients(results: Sequence[Gradient], origins: Sequence[Origin] | None = None) -> Gradient:
    """The summed result for a batch, from those for its microbatches; `origins` is as in `merge_aux`."""
    losses = [result.loss for result in results]
    first = results[0]
    loss = losses[0]
    assert isinstance(loss, Mean)
    if len(losses) > 1:
        loss = loss.merge_all(losses)  # type: ignore[arg-type]
    sizes = [result.rows or 0 for result in results]
    return first.replace(loss=loss, aux=merge_aux([result.aux for result in results], sizes, origins), rows=sum(sizes))


def merge_aux(values: Sequence[Any], sizes: Sequence[int], origins: Sequence[Origin] | None = None) -> Any:
    """The aux that a loss function would have returned for the full batch.

    Typed values merge by their type; floating scalars are averaged by rows; tensors with one entry for each row are
    concatenated in order. Buffers merge by the rules in `origins` (see `lumen.core.buffers.BufferTracker`); without
    these, BatchNorm's statistics are known by their names, and other buffers must be equal in all microbatches.
    """
    if len(values) == 1:
        return values[0]
    if all(isinstance(value, Aux) for value in values):
        return values[0].replace(
            buffers=_merge_buffers([value.buffers for value in values], sizes, origins),
            metrics=_merge_tree([value.metrics for value in values], sizes),
        )
    return _merge_tree(values, sizes)


def _merge_tree(trees: Sequence[Any], sizes: Sequence[int]) -> Any:
    if all(type(values) is dict for values in trees) and any(values.keys() != trees[0].keys() for values in trees):
        return _merge_differing(trees, sizes)
    names = iter(tree.paths(trees[0], is_leaf=is_value))
    return tree.map(lambda *leaves: _merge_leaf(next(names), leaves, sizes), *trees, is_leaf=is_value)


def _merge_differing(dicts: Sequence[dict[Any, Any]], sizes: Sequence[int]) -> dict[Any, Any]:
    """Dicts that have not all the same names: each name is merged over the microbatches that have it."""
    merged: dict[Any, Any] = {}
    for name in dict.fromkeys(name for values in dicts for name in values):
        present = [({name: values[name]}, size) for values, size in zip(dicts, sizes, strict=True) if name in values]
        if len(present) < len(dicts):
            _check_optional(present[0][0])
        merged |= _merge_tree(*zip(*present, strict=True))
    return merged


def _check_optional(values: Any) -> None:
    """Raise `LossError` for what some microbatches lack and is no metric: rows of a batch, say, would be missing."""
    for path, leaf in zip(tree.paths(values, is_leaf=is_value), tree.leaves(values, is_leaf=is_value), strict=True):
        if not isinstance(leaf, Metric | int | float) and not (isinstance(leaf, Tensor) and leaf.dim() == 0):
            raise LossError(
                f"aux[{path!r}] is returned by some of the microbatches only. Only metrics may come and go: return it"
                " always, or as a metric such as lm.Mean.of(x)."
            )


def _merge_leaf(path: str, leaves: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = leaves[0]
    if isinstance(first, Metric):
        merged = first
        for other in leaves[1:]:
            merged = merged.merge(other)
        return merged
    if isinstance(first, Tensor) and first.dim() == 0 and first.is_floating_point():
        return _weighted(leaves, sizes)
    if isinstance(first, Tensor) and all(x.dim() and x.shape[0] == n for x, n in zip(leaves, sizes, strict=True)):
        return torch.cat(list(leaves))
    if isinstance(first, int | float | str | bool) and all(leaf == first for leaf in leaves):
        return first
    if isinstance(first, Mapping):  # no pytree, such as an output of transformers
        raise LossError(
            f"{f'aux[{path!r}]' if path else 'the aux'} is an object of type {type(first).__name__}, which is no"
            " pytree, so Lumen cannot merge those of the microbatches. Return a dict of what is needed:"
            " return loss, {'logits': out.logits}"
        )
    shape = f"tensor of shape {tuple(first.shape)} and {first.dtype}" if isinstance(first, Tensor) else repr(first)
    raise LossError(
        f"aux[{path!r}] is a {shape}, and Lumen does not know how to merge those of the microbatches."
        " Say what it is: lm.Mean.of(x), lm.Sum.of(x), lm.Max.of(x) or lm.Last(x)."
    )


def _merge_buffers(microbatches: Sequence[Any], sizes: Sequence[int], origins: Sequence[Origin] | None) -> Any:
    columns = list(zip(*(tree.leaves(buffers) for buffers in microbatches), strict=True))
    if origins is None:
        origins = [_named(path, column) for path, column in zip(tree.paths(microbatches[0]), columns, strict=True)]
    merged = [
        merge_microbatches(origin, column, functools.partial(_weighted, column, sizes))
        for origin, column in zip(origins, columns, strict=True)
    ]
    return tree.unflatten(tree.structure(microbatches[0]), merged)


def _named(path: str, leaves: Sequence[Any]) -> Origin:
    """What a buffer is by its name alone."""
    merge = next((merge for name, merge in STATISTICS.items() if path.endswith(name)), None)
    same = all(torch.equal(leaf, leaves[0]) for leaf in leaves[1:]) if merge is None else None
    return Origin(path, leaves[0], merge, changed=None if same is None else not same, foreign=merge is None)


def _weighted(leaves: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The mean by rows, written as differences from the first leaf: equal leaves give that leaf bit for bit."""
    total = sum(sizes)
    mean = leaves[0]
    for leaf, size in zip(leaves[1:], sizes[1:], strict=True):
        mean = mean + (leaf - leaves[0]) * (size / total)
    return mean


def _rows_of(leaf: Any, batch: Any) -> int | None:
    if isinstance(leaf, Tensor | np.ndarray):
        if leaf.ndim == 0:
            raise BatchError(
                "the batch has a leaf without dims (a scalar tensor), which has no rows. Pass it as a further argument:"
                " lm.value_and_grad(loss_fn)(params, batch, scalar)"
            )
        return int(leaf.shape[0])
    if isinstance(leaf, bool | int | float):
        return None
    raise BatchError(
        f"the batch has a leaf of type {type(leaf).__name__} ({leaf!r:.40}), which has no rows to count or split."
        " Make it a tensor, or pass it as a further argument: lm.value_and_grad(loss_fn)(params, batch, extra)"
    )
