"""The sampler that the arguments of a `Loader` ask for."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import ArrayLike

from lumen.data.arguments import integer
from lumen.data.length_buckets import LengthBuckets, checked_lengths
from lumen.data.mixture import Mixture
from lumen.data.samplers import EachOnce, Sampler, one_a_row
from lumen.data.weighted import Weighted, cumulative
from lumen.errors import BatchError


class Choice(NamedTuple):
    """The arguments of a Loader that decide which rows a batch has."""

    batch_size: int | None
    seed: int
    shuffle: bool
    drop_last: bool
    pad: bool
    lengths: ArrayLike | None
    tokens: int | None
    weights: ArrayLike | None


class _InOrder(EachOnce):
    """The order of a mixture."""

    def __init__(self, mixture: Mixture, batch_size: int, *, drop_last: bool) -> None:
        super().__init__(len(mixture), batch_size, None, drop_last=drop_last)
        self._mixture = mixture

    def identity(self) -> dict[str, int]:
        """A checksum of what the mixture's order depends on."""
        return self._mixture.identity()


def make_sampler(dataset: Any, rows: int, choice: Choice) -> Sampler:
    """The sampler of a data set of `rows` rows; raises BatchError for arguments that do not go together."""
    chosen = any(argument is not None for argument in (choice.tokens, choice.lengths, choice.weights))
    if chosen and isinstance(dataset, Mixture):
        raise BatchError(
            "Loader got tokens= or weights= with a Mixture, which decides how often each row comes, and when. Give"
            " Mixture the weights of its sets, and Loader a batch_size."
        )
    if choice.pad and choice.drop_last:
        raise BatchError("Loader got drop_last=True and pad=True; a smaller last batch is left out or padded.")
    if choice.tokens is not None or choice.lengths is not None:
        return _by_tokens(rows, choice)
    if choice.batch_size is None:
        raise BatchError(
            "Loader needs the rows of a batch, lm.Loader(data, batch_size=64), or a number of tokens:"
            " lm.Loader(data, tokens=16384, lengths=lengths)."
        )
    if isinstance(dataset, Mixture):
        return _InOrder(dataset, choice.batch_size, drop_last=choice.drop_last)
    if choice.weights is not None:
        return _by_weights(rows, choice.batch_size, choice.weights, choice)
    return EachOnce(rows, choice.batch_size, choice.seed if choice.shuffle else None, drop_last=choice.drop_last)


def _by_tokens(rows: int, choice: Choice) -> LengthBuckets:
    if choice.lengths is None or choice.tokens is None:
        present, absent = ("tokens", "lengths") if choice.lengths is None else ("lengths", "tokens")
        raise BatchError(
            f"Loader got {present}= without {absent}=; write lm.Loader(data, tokens=16384, lengths=lengths)."
        )
    if choice.pad or choice.drop_last:
        raise BatchError(
            f"Loader got tokens= and {'pad' if choice.pad else 'drop_last'}=True; batches of a number of tokens differ"
            " in their number of rows, so there is no smaller last one."
        )
    if choice.weights is not None:
        raise BatchError(
            "Loader got tokens= and weights=; batches by tokens have each row once an epoch. Leave one of them out."
        )
    tokens = integer("tokens", choice.tokens, 1)
    lengths = checked_lengths(one_a_row("lengths", choice.lengths, rows), tokens)
    return LengthBuckets(lengths, tokens, choice.batch_size, choice.seed if choice.shuffle else None)


def _by_weights(rows: int, batch_size: int, weights: ArrayLike, choice: Choice) -> Weighted:
    if not choice.shuffle:
        raise BatchError("Loader got weights= and shuffle=False; rows that are drawn at random have no order to keep.")
    bounds = cumulative(one_a_row("weights", weights, rows))
    return Weighted(bounds, batch_size, choice.seed, drop_last=choice.drop_last)
