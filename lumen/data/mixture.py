"""`Mixture`: several data sets in fixed proportions, each in its own order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lumen.core.arguments import checked
from lumen.data import permutation
from lumen.data.arguments import SEEDS, integer
from lumen.data.fetch import read_rows, row_reader
from lumen.data.nested import listeners
from lumen.data.permutation import Indices
from lumen.data.proportions import counts, schedule
from lumen.data.samplers import digest
from lumen.errors import BatchError

Draws = tuple[Indices, Indices, Indices]
StoppingStrategy = Literal["first_exhausted", "all_exhausted"]


@checked
class Mixture:
    """A data set that draws from several ones, in proportion to weights, for an `lm.Loader` or a `DataLoader`.

    After any number i of rows, each set has been drawn less than one time more or less than its share of i. Each set is
    read in its own shuffled order, a new one for each pass over it; where an epoch ends within a pass, the next epoch
    continues it. So the rows of a set are drawn equally often, up to one time. Row i of an epoch is a pure function of
    (`seed`, epoch, i). A Loader keeps this order, whatever its `shuffle`.

    Args:
        datasets: the sets by name: map-style data sets, lists, tensors, or trees of equally long columns.
        weights: for each name how often to draw from its set; any sum. If the shares have no common denominator of at
            most 65,536, they are rounded to multiples of 1/65,536: `proportions` are exact.
        seed: an integer in [-2**63, 2**63).
        shuffle: whether to reorder the rows of each set.
        stopping_strategy: an epoch ends when the first set has been read once ("first_exhausted"), or all have
            ("all_exhausted"), in which case smaller ones are read several times. The words are those of Hugging
            Face's `interleave_datasets`. Later epochs have as many rows as the first.
        source: the entry under which a row, which is a dict then, gets the number of its set, in the order of
            `datasets`.

    A set that has a `set_epoch` is passed the number of its own pass.

    Raises `BatchError` for sets without rows or row numbers, for names that differ, for weights that are not above 0,
    and for arguments out of range.

    >>> import lumen as lm
    >>> web, code = ["w0", "w1", "w2", "w3", "w4", "w5"], ["c0", "c1"]
    >>> mixture = lm.data.Mixture({"web": web, "code": code}, weights={"web": 3, "code": 1}, shuffle=False)
    >>> [mixture[i] for i in range(len(mixture))]
    ['w0', 'w1', 'w2', 'c0', 'w3', 'w4', 'w5']
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        *,
        weights: Mapping[str, float],
        seed: int = 0,
        shuffle: bool = True,
        stopping_strategy: StoppingStrategy = "first_exhausted",
        source: str | None = None,
    ) -> None:
        if not datasets or set(datasets) != set(weights):
            raise BatchError(
                f"Mixture got the sets {list(datasets)} and the weights of {list(weights)}; each set has one weight:"
                ' lm.data.Mixture({"web": web, "code": code}, weights={"web": 0.7, "code": 0.3})'
            )
        if stopping_strategy not in ("first_exhausted", "all_exhausted"):
            raise BatchError(
                f'Mixture got stopping_strategy={stopping_strategy!r}; it is "first_exhausted" or "all_exhausted".'
            )
        self._seed = integer("seed", seed, *SEEDS)
        self._datasets = [row_reader(dataset, f"set {name!r}") for name, dataset in datasets.items()]
        self._sizes = [len(dataset) for dataset in self._datasets]
        self._seeds = [permutation.derived_seed(self._seed, i) if shuffle else None for i in range(len(datasets))]
        self._counts = counts({name: weights[name] for name in datasets})
        self._slots = schedule(self._counts)
        self._draws = _occurrences(self._slots, len(datasets))
        ends = [self._slot_of(number, size - 1) + 1 for number, size in enumerate(self._sizes)]
        self._length = min(ends) if stopping_strategy == "first_exhausted" else max(ends)
        self._names, self._source = list(datasets), source
        self._listeners = [listeners(dataset) for dataset in self._datasets]
        self.set_epoch(0)

    @property
    def proportions(self) -> dict[str, float]:
        """The share of each set, by name."""
        return {name: count / len(self._slots) for name, count in zip(self._names, self._counts, strict=True)}

    def set_epoch(self, epoch: int) -> None:
        """Continue after `epoch` epochs. A Loader calls it."""
        self._epoch = integer("epoch", epoch, 0)
        self._passes = [-1] * len(self._datasets)
        self._block: tuple[int, Draws] | None = None  # the last one: a Loader reads one batch after the other
        periods = self._epoch * self._length // len(self._slots)
        # The pass over each set in which this period begins, and the position in it.
        self._starts = [divmod(periods * count, size) for count, size in zip(self._counts, self._sizes, strict=True)]

    def identity(self) -> dict[str, int]:
        """A checksum of what the order depends on."""
        shuffled = [int(seed is not None) for seed in self._seeds]
        return {"mixture": digest(np.array([self._seed, self._length, *self._counts, *self._sizes, *shuffled]))}

    def __len__(self) -> int:
        """The rows of an epoch."""
        return self._length

    def __getitem__(self, index: int) -> Any:
        """Row `index` of this epoch."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """These rows of this epoch; those of one set are read together."""
        epoch = range(self._length)
        numbers, passes, rows = self._drawn([epoch[index] for index in indices])
        groups: dict[tuple[int, int], list[int]] = {}
        for i, group in enumerate(zip(numbers.tolist(), passes.tolist(), strict=True)):
            groups.setdefault(group, []).append(i)
        samples: list[Any] = [None] * len(indices)
        row_numbers = rows.tolist()
        for (number, done), chosen in sorted(groups.items()):
            read = self._read(number, done, [row_numbers[i] for i in chosen])
            for i, sample in zip(chosen, read, strict=True):
                samples[i] = sample
        return samples

    def _drawn(self, positions: list[int]) -> Draws:
        """Of each position its set, the pass over that counted from the epoch's first, and the row."""
        first, count = positions[0] if positions else 0, len(positions)
        number, offset = divmod(first, permutation.BLOCK)
        if offset + count > permutation.BLOCK or count < 2 or positions != list(range(first, first + count)):
            return self._draw(np.array(positions, np.int64))
        block = self._block
        if block is None or block[0] != number:
            block = number, self._draw(np.arange(*permutation.block_bounds(number, self._length)))
            self._block = block
        numbers, passes, rows = block[1]
        of_batch = slice(offset, offset + count)
        return numbers[of_batch], passes[of_batch], rows[of_batch]

    def _draw(self, positions: Indices) -> Draws:
        periods, slots = np.divmod(self._epoch * self._length % len(self._slots) + positions, len(self._slots))
        numbers, rows = self._slots[slots], np.empty_like(positions)
        draws = periods * np.array(self._counts)[numbers] + self._draws[slots]
        begun = np.array([position for _, position in self._starts])
        passes, in_pass = np.divmod(begun[numbers] + draws, np.array(self._sizes)[numbers])
        for chosen in _groups(numbers, passes):
            number, later = int(numbers[chosen[0]]), int(passes[chosen[0]])
            order = self._sizes[number], self._seeds[number], self._starts[number][0] + later
            rows[chosen] = permutation.take(*order, in_pass[chosen])
        return numbers, passes, rows

    def _read(self, number: int, later: int, rows: list[int]) -> list[Any]:
        """These rows of a set, in the pass `later` counted from the epoch's first."""
        done = self._starts[number][0] + later
        if self._passes[number] != done:
            self._passes[number] = done
            for listener in self._listeners[number]:
                listener.set_epoch(done)
        try:
            samples = read_rows(self._datasets[number], rows)
        except Exception as error:
            error.add_note(f"The set is {self._names[number]!r} of a Mixture.")
            raise
        return samples if self._source is None else [self._with_source(sample, number) for sample in samples]

    def _with_source(self, sample: Any, number: int) -> dict[str, Any]:
        if not isinstance(sample, Mapping) or self._source in sample:
            kind = type(sample).__name__ if not isinstance(sample, Mapping) else f"dict that has {self._source!r}"
            raise BatchError(
                f"Mixture(source={self._source!r}) adds the number of its set to a row that is a dict, and a row of"
                f" {self._names[number]!r} is a {kind}. Leave source= out, or write another name."
            )
        return {**sample, str(self._source): number}

    def _slot_of(self, number: int, draw: int) -> int:
        """When a set is drawn for the `draw`-th time, from 0."""
        period, rest = divmod(draw, self._counts[number])
        return period * len(self._slots) + int(np.flatnonzero(self._slots == number)[rest])


def _occurrences(slots: np.ndarray[Any, np.dtype[np.int64]], sets: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How often the set of each slot came before it."""
    before = np.empty_like(slots)
    for number in range(sets):
        mask = slots == number
        before[mask] = np.arange(mask.sum())
    return before


def _groups(numbers: Indices, passes: Indices) -> list[Indices]:
    """The positions that draw from the same pass over the same set, by set and pass."""
    order = np.lexsort((passes, numbers))
    numbers, passes = numbers[order], passes[order]
    ends = np.flatnonzero((numbers[1:] != numbers[:-1]) | (passes[1:] != passes[:-1])) + 1
    bounds = [0, *ends.tolist(), len(order)]
    return [order[start:stop] for start, stop in itertools.pairwise(bounds) if start < stop]
