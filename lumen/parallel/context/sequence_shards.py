"""How the sequences of a batch are sharded: which leaves have positions, along which dim, and this rank's share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lumen import tree
from lumen.errors import BatchError, printable


class SequenceShards(NamedTuple):
    """The dim of positions of each sharded leaf of a batch, by its path; all have `length` positions in all."""

    dims: Mapping[str, int]
    length: int
    size: int

    @classmethod
    def of(
        cls, batch: Any, sequence_dims: Mapping[str, int] | None, documents: str | None, size: int
    ) -> SequenceShards:
        """The sharding of `batch` over `size` ranks; raises `BatchError` for a batch that cannot be sharded so."""
        leaves = dict(tree.named_tensors(batch))
        if documents is not None:
            _check_documents(leaves, documents)
        dims = {path: 1 for path, leaf in leaves.items() if leaf.dim() > 1 and path != documents}
        if sequence_dims is not None:
            dims = {path: _checked_dim(leaves, path, dim) for path, dim in sequence_dims.items()}
        lengths = {path: leaves[path].shape[dim] for path, dim in dims.items()}
        if not lengths:
            raise BatchError(
                f"no leaf of the batch ({_listed(leaves)}) has positions along its dim 1, and lm.context_parallel"
                ' shards positions. Name a dim: lm.context_parallel(mesh, sequence_dims={"input_ids": 1}).'
            )
        if len({*lengths.values()}) > 1:
            text = ", ".join(f"{path or 'the batch'!s}: {length}" for path, length in lengths.items())
            raise BatchError(
                f"the leaves to shard have different numbers of positions ({text}). Name those that have positions:"
                f" lm.context_parallel(mesh, sequence_dims={{{next(iter(lengths))!r}: 1}})."
            )
        length = next(iter(lengths.values()))
        if length % size or not length:
            raise BatchError(
                f"sequences of {length} positions cannot be sharded over the {size} ranks along context, which do not"
                f" divide it. Pad them to {max(1, -(-length // size)) * size}, with labels that the loss ignores."
            )
        if documents is not None and leaves[documents].shape[1] != length:
            raise BatchError(
                f"documents={documents!r} has {leaves[documents].shape[1]} positions, and the batch has {length}."
            )
        return cls(dims, length, size)

    @property
    def local(self) -> int:
        """The number of positions of one rank."""
        return self.length // self.size

    def shard(self, batch: Any, index: int) -> Any:
        """The batch with the positions of rank `index`; leaves without positions stay as they are."""
        return self._map(batch, lambda x, dim: x.narrow(dim, index * self.local, self.local).contiguous())

    def excerpt(self, batch: Any, local: int, number: int = 0) -> tuple[Any, SequenceShards]:
        """The first row, with `local` positions for each rank, and how that is sharded; other ones for each `number`.

        Any dim that is as long as the sequences is shortened, also in leaves that are not sharded.
        """
        length = local * self.size
        start = number * length % (self.length - length + 1)

        def shorten(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            row = leaf[:1]
            for dim in range(1, row.dim()):
                if row.shape[dim] == self.length:
                    row = row.narrow(dim, start, length)
            return row.contiguous()

        return tree.map(shorten, batch), self._replace(length=length)

    def _map(self, batch: Any, change: Callable[[Tensor, int], Tensor]) -> Any:
        leaves, spec = tree.flatten(batch)
        paths = tree.paths(batch)
        changed = [
            change(leaf, self.dims[path]) if path in self.dims else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        return tree.unflatten(spec, changed)


def leaf_of(batch: Any, path: str) -> Tensor:
    """The leaf at `path`."""
    return dict(tree.named_tensors(batch))[path]


def _checked_dim(leaves: Mapping[str, Tensor], path: str, dim: int) -> int:
    if path not in leaves:
        raise BatchError(
            f"sequence_dims names {path!r}, and the batch that lm.value_and_grad was given has no such tensor; it has"
            f" {_listed(leaves)}."
        )
    if not 0 < dim < leaves[path].dim():
        raise BatchError(
            f"sequence_dims={{{path!r}: {dim}}} is not a dim of positions of a tensor of shape"
            f" {tuple(leaves[path].shape)}: it has those from 1 to {leaves[path].dim() - 1}, after its rows."
        )
    return dim


def _check_documents(leaves: Mapping[str, Tensor], path: str) -> None:
    if path not in leaves:
        raise BatchError(
            f"documents={path!r} is not in the batch that lm.value_and_grad was given; it has {_listed(leaves)}."
        )
    leaf = leaves[path]
    if leaf.dim() != 2 or leaf.is_floating_point():
        raise BatchError(
            f"documents={path!r} must number the document of each position, as integers of shape [rows, positions]; it"
            f" is of shape {tuple(leaf.shape)} and {leaf.dtype}."
        )


def _listed(leaves: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{printable(path) or 'a tensor'}: {tuple(leaf.shape)}" for path, leaf in leaves.items()) or "none"
