"""Typed values: merging parts, in any grouping, gives what the whole would have given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lumen as lm

KINDS = [lm.Mean, lm.Sum, lm.Max, lm.Min]
# Small integers add up exactly in any order, so that equality may be bitwise.
ROWS = st.lists(st.integers(-50, 50).map(float), min_size=1, max_size=6).map(torch.tensor)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@settings(max_examples=30)
@given(parts=st.lists(ROWS, min_size=1, max_size=5))
def test_merged_parts_are_the_whole(kind: Any, parts: list[torch.Tensor]) -> None:
    merged = kind.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(kind.of(part))
    assert torch.equal(merged.compute(), kind.of(torch.cat(parts)).compute())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_a_part_without_rows_counts_nothing(kind: Any, dtype: torch.dtype) -> None:
    part = torch.tensor([1, 0, 1]).to(dtype)
    for rows in (part, part[:1], part[1:2]):
        empty, found = kind.of(rows[:0]), kind.of(rows)
        for merged in (empty.merge(found), found.merge(empty), kind.merge_all([empty, found, empty])):
            assert torch.equal(merged.compute(), found.compute())
            assert merged.compute().dtype == found.compute().dtype


@pytest.mark.parametrize("kind", [*KINDS, lm.Last], ids=lambda k: k.__name__)
@settings(max_examples=30)
@given(a=ROWS, b=ROWS, c=ROWS)
def test_merge_is_associative(kind: Any, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    x, y, z = kind.of(a), kind.of(b), kind.of(c)
    assert torch.equal(x.merge(y).merge(z).compute(), x.merge(y.merge(z)).compute())


@settings(max_examples=30)
@given(rows=ROWS, data=st.data())
def test_a_masked_mean_counts_what_is_not_masked(rows: torch.Tensor, data: st.DataObject) -> None:
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    mask[0] = True
    torch.testing.assert_close(lm.Mean.of(rows, mask).compute(), rows[mask].mean())


def test_masked_elements_may_be_nan() -> None:
    values = torch.tensor([1.0, torch.nan, torch.inf, 3.0])
    assert float(lm.Mean.of(values, values.isfinite()).compute()) == 2.0


def test_weights_broadcast() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert float(lm.Mean.of(values, torch.tensor([[1.0], [3.0]])).compute()) == 5.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_are_counted_wide(dtype: torch.dtype) -> None:
    merged = lm.merge_metrics([{"n": lm.Sum.of(torch.ones(1, dtype=dtype))} for _ in range(3000)])
    assert float(merged["n"].compute()) == 3000.0
    assert float(lm.Mean.of(torch.ones(3000, dtype=dtype)).weight) == 3000.0


def test_last_is_the_newest() -> None:
    assert int(lm.merge_metrics([lm.Last(torch.tensor(i)) for i in range(4)]).compute()) == 3


def test_plain_numbers_are_averaged() -> None:
    merged = lm.merge_metrics([{"a": 1, "b": torch.tensor(2.0)}, {"a": 2, "b": torch.tensor(4.0)}])
    assert {k: float(v) for k, v in lm.compute_metrics(merged).items()} == {"a": 1.5, "b": 3.0}
