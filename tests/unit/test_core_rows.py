"""Rows of a batch: counting, splitting, and joining what the parts gave."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lumen as lm
from lumen.core import batching
from lumen.errors import BatchError, LossError, MergeError


def test_count_is_the_shared_leading_size() -> None:
    assert batching.count({"x": torch.zeros(3, 2), "y": np.zeros(3), "scale": 2.0}) == 3


def test_split_is_even_and_in_order() -> None:
    batch = {"x": torch.arange(5), "n": np.arange(5), "scale": 2.0}
    parts = batching.split(batch, 2)
    assert [p["x"].tolist() for p in parts] == [[0, 1, 2], [3, 4]]
    assert [p["n"].tolist() for p in parts] == [[0, 1, 2], [3, 4]]
    assert [p["scale"] for p in parts] == [2.0, 2.0]


def test_merge_by_what_a_leaf_is() -> None:
    parts = [
        {
            "value": lm.Mean.of(torch.ones(2)),
            "scalar": torch.tensor(1.0),
            "rows": torch.tensor([1, 2]),
            "same": "a",
        },
        {
            "value": lm.Mean.of(torch.zeros(1)),
            "scalar": torch.tensor(4.0),
            "rows": torch.tensor([3]),
            "same": "a",
        },
    ]
    merged = batching.merge_aux(parts, [2, 1])
    assert float(merged["value"].compute()) == pytest.approx(2 / 3)
    assert float(merged["scalar"]) == 2.0
    assert merged["rows"].tolist() == [1, 2, 3]
    assert merged["same"] == "a"


def test_equal_parts_average_to_that_part_bitwise() -> None:
    x = torch.tensor(0.1)
    assert torch.equal(batching.merge_aux([{"x": x}, {"x": x.clone()}, {"x": x.clone()}], [1, 5, 3])["x"], x)


def test_statistics_are_known_by_name_and_other_buffers_are_not() -> None:
    def merged(name: str, *values: float) -> torch.Tensor:
        parts = [lm.Aux(buffers={name: torch.tensor(value)}) for value in values]
        return batching.merge_aux(parts, [1] * len(parts)).buffers[name]

    assert int(merged("1.num_batches_tracked", 3, 4)) == 4
    assert float(merged("1.running_mean", 3.0, 4.0)) == 3.5
    assert int(merged("n", 3, 3)) == 3
    with pytest.raises(MergeError, match=r"a leaf 'n' that no module returned"):
        merged("n", 3, 4)


def test_python_values_that_differ_cannot_be_merged() -> None:
    with pytest.raises(LossError, match=r"aux\['k'\] is a 1"):
        batching.merge_aux([{"k": 1}, {"k": 2}], [1, 1])


def test_leaves_that_are_no_rows() -> None:
    with pytest.raises(BatchError, match="leaf of type object"):
        batching.count([torch.zeros(2), object()])
