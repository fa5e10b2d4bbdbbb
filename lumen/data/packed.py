"""`Packed`: documents of different lengths in rows of one length, with their boundaries and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lumen.core.arguments import checked
from lumen.data.arguments import SEEDS, integer
from lumen.data.bin_packing import Ints, RowPlan, assign, best_fit
from lumen.data.permutation import permute
from lumen.errors import BatchError

IGNORED = -100  # a target that does not count, as `torch.nn.functional.cross_entropy` has it by default
Overflow = Literal["raise", "split", "truncate"]


@checked
class Packed:
    """A data set whose rows hold several whole documents each, for an `lm.Loader` or a `DataLoader`.

    A row is a dict of int64 tensors of shape [length]:

    - `"tokens"`: the documents one after the other, then `padding`;
    - `"targets"`: the token that follows in the same document; -100, which `cross_entropy` ignores, for padding;
    - `"positions"`: each token's position in its document, from 0;
    - `"documents"`: the number of its document in the row, from 1; 0 for padding.

    A document of n tokens takes n - 1 places, since its last token is only a target. Attention must not cross
    documents: `lm.data.document_mask(batch["documents"])` is the mask. Then the loss of a packed row is that of its
    documents, each alone.

    Rows are filled by best fit: the longest documents first, each into the fullest row that has room. The number of
    rows depends on the lengths only. Which documents of equal length share a row, and with which others, is a pure
    function of (`seed`, epoch): `set_epoch`, which a Loader calls, packs anew.

    Args:
        documents: a list or a map-style data set of documents: 1-D integer tensors, arrays or lists, or dicts that
            contain them, such as the rows of a Hugging Face data set.
        length: places in a row.
        lengths: the number of tokens of each document; without it, each document is read once to count them.
        tokens: the entry of a dict that has the tokens.
        labels: the entry of a dict that has what is to be predicted, as long as the tokens and not shifted; tokens
            with the label -100 are context only. By default all tokens are to be predicted.
        overflow: what to do with a document of more than `length` + 1 tokens. "raise" a `BatchError`; "split" it into
            parts of `length` places, which do not attend to each other, so that each target occurs once; "truncate" it.
        seed: an integer in [-2**63, 2**63).
        padding: the token of places without a document.

    Raises `BatchError` for documents that are too long, not 1-D or not of integers, that have another length than
    `lengths` says, for no document of two tokens, and for arguments out of range.

    >>> import lumen as lm
    >>> rows = lm.data.Packed([[1, 2, 3, 4], [5, 6, 7], [8, 9]], length=4)
    >>> len(rows), rows.filled
    (2, 0.75)
    >>> {name: row.tolist() for name, row in rows[0].items()}
    {'tokens': [1, 2, 3, 8], 'targets': [2, 3, 4, 9], 'positions': [0, 1, 2, 0], 'documents': [1, 1, 1, 2]}
    """

    def __init__(
        self,
        documents: Any,
        length: int,
        *,
        lengths: ArrayLike | None = None,
        tokens: str = "input_ids",
        labels: str | None = None,
        overflow: Overflow = "raise",
        seed: int = 0,
        padding: int = 0,
    ) -> None:
        self._length = integer("length", length, 1)
        self._seed = integer("seed", seed, *SEEDS)
        self._padding = integer("padding", padding, -(2**63), 2**63)
        if overflow not in ("raise", "split", "truncate"):
            raise BatchError(f'Packed got overflow={overflow!r}; it is "raise", "split" or "truncate".')
        if isinstance(documents, Mapping) or not (hasattr(documents, "__len__") and hasattr(documents, "__getitem__")):
            raise BatchError(
                f"Packed got a {type(documents).__name__}; it takes a list or a map-style data set of documents. Read a"
                " stream into a list first: Packed(list(stream), ...)"
            )
        self._documents, self._tokens, self._labels = documents, tokens, labels
        self._counts = self._count() if lengths is None else _checked_lengths(lengths, len(documents))
        self._owners, self._starts, sizes = self._segments(overflow)
        if not len(sizes):
            raise BatchError(f"Packed got {len(documents)} documents, and none has two tokens: a token and its target.")
        self._sizes = sizes
        self._groups = best_fit(*np.unique(sizes, return_counts=True), self._length)
        self._epoch = -1
        self._plan: RowPlan
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Pack the documents as for this epoch; the number of rows stays the same."""
        if epoch != self._epoch:
            order = permute(len(self._sizes), self._seed, epoch, np.arange(len(self._sizes)))
            self._plan, self._epoch = assign(self._groups, self._sizes, order), epoch

    @property
    def filled(self) -> float:
        """The share of places that are not padding, in (0, 1]."""
        return float(self._sizes.sum()) / (len(self) * self._length)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._plan.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row."""
        row = range(len(self))[index]  # as a list: IndexError outside
        first, last = self._plan.offsets[row : row + 2]
        out = np.zeros((4, self._length), np.int64)
        out[0], out[1] = self._padding, IGNORED
        start = 0
        for number, segment in enumerate(self._plan.documents[first:last], 1):
            size = self._sizes[segment]
            end = start + size
            out[0, start:end], out[1, start:end] = self._pairs(segment)
            out[2, start:end] = np.arange(size)
            out[3, start:end] = number
            start = end
        tokens, targets, positions, documents = torch.from_numpy(out)
        return {"tokens": tokens, "targets": targets, "positions": positions, "documents": documents}

    def _pairs(self, segment: int) -> tuple[Ints, Ints]:
        """The tokens of a segment of a document, and their targets."""
        document, start, size = int(self._owners[segment]), int(self._starts[segment]), int(self._sizes[segment])
        value = self._documents[document]
        tokens = _integers(_entry(value, self._tokens, document), document)
        if len(tokens) != self._counts[document]:
            raise BatchError(
                f"document {document} has {len(tokens)} tokens, and `lengths` says {self._counts[document]}. Count them"
                " again, or leave lengths= out."
            )
        targets = tokens if self._labels is None else _integers(_entry(value, self._labels, document), document)
        if len(targets) != len(tokens):
            raise BatchError(
                f"document {document} has {len(tokens)} tokens and {len(targets)} labels ({self._labels!r}). There is"
                " one label for each token, not shifted."
            )
        return tokens[start : start + size], targets[start + 1 : start + 1 + size]

    def _count(self) -> Ints:
        documents = self._documents
        return np.array([_size(_entry(documents[i], self._tokens, i), i) for i in range(len(documents))], np.int64)

    def _segments(self, overflow: Overflow) -> tuple[Ints, Ints, Ints]:
        """What the rows hold: segments of which document, from which token on, and how many tokens of it."""
        sizes = self._counts - 1
        too_long = np.flatnonzero(sizes > self._length)
        if len(too_long) and overflow == "raise":
            raise BatchError(
                f"{len(too_long)} documents are longer than a row: document {too_long[0]} has"
                f" {self._counts[too_long[0]]} tokens, and a row of length {self._length} has room for"
                f' {self._length + 1}. Write Packed(..., overflow="split") or "truncate", or a greater length.'
            )
        if overflow == "truncate":
            sizes = np.minimum(sizes, self._length)
        counts = -(-np.maximum(sizes, 0) // self._length)  # a document of one token has none
        owners = np.repeat(np.arange(len(sizes)), counts)
        starts = (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)) * self._length
        return owners, starts, np.minimum(sizes[owners] - starts, self._length)


@checked
def document_mask(documents: Tensor, *, causal: bool = True) -> Tensor:
    """The attention mask of packed rows: bool [B, 1, T, T] for document numbers [B, T]; True where query sees key.

    Each token sees those of its own document, with `causal` only itself and earlier ones. The middle dim stands for
    the heads: `torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)`. Padding, whose number is 0,
    counts as one more document, so that no row of the mask is empty.

    Raises `BatchError` for numbers that are not [B, T].

    >>> import lumen as lm, torch
    >>> lm.data.document_mask(torch.tensor([[1, 1, 2]]))[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    if documents.dim() != 2:
        raise BatchError(f"document_mask takes the numbers of documents [B, T]; got {tuple(documents.shape)}.")
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return (same.tril() if causal else same).unsqueeze(1)


def _entry(value: Any, name: str, document: int) -> Any:
    """The entry of a document that is a dict; one that is an array, itself."""
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        names = ", ".join(map(repr, value))
        raise BatchError(f"document {document} has no entry {name!r}; it has {names}. Write Packed(..., tokens=…).")
    return value[name]


def _size(value: Any, document: int) -> int:
    if not isinstance(value, Sequence | np.ndarray | Tensor) or isinstance(value, str | bytes):
        raise BatchError(
            f"document {document} is a {type(value).__name__}; documents are lists or 1-D arrays of tokens. Tokenize"
            " texts first: [tokenizer(text)['input_ids'] for text in texts]"
        )
    return len(value) if not hasattr(value, "ndim") or value.ndim else -1


def _integers(value: Any, document: int) -> Ints:
    array = value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BatchError(
            f"document {document} is an array of shape {array.shape} and {array.dtype}; documents are 1-D arrays of"
            " integers."
        )
    return array.astype(np.int64, copy=False)


def _checked_lengths(lengths: ArrayLike, count: int) -> Ints:
    array = np.asarray(lengths)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise BatchError(
            f"lengths has the shape {array.shape} and {array.dtype}; it is one integer for each of {count} documents."
        )
    return array.astype(np.int64, copy=False)
