"""Families of transformers, unmodified, with each transform beside a raw loop: the table of docs/huggingface.md."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import lumen as lm
from tests.tiers import in_turns, pick

pytest.importorskip("transformers")

from tests.parity.hf_families import (
    COLUMNS,
    DEFAULT_TOLERANCE,
    FAMILIES,
    REFUSED,
    batches,
    cell,
    make_net,
    step_of,
    table,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers; `cell` looks at those of Lumen

PAGE = Path(__file__).parents[2] / "docs/huggingface.md"
HERE = [name for name in COLUMNS if name != "fsdp"]  # tests/distributed/test_huggingface.py has that one


def test_the_page_shows_this_table():
    assert table() in PAGE.read_text()


@pytest.mark.parametrize(("family", "column"), in_turns(list(FAMILIES), HERE))
def test_each_transform_is_the_raw_loop_or_is_refused_by_name(family, column):
    answer = cell(family, column)
    assert answer.partition(":")[0] == ("refused" if column in REFUSED.get(family, ()) else "equal"), answer


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", pick(["mixtral"], ["t5", "mixtral"]))
def test_the_whole_step_compiles_with_the_default_attention_and_cache(family):
    """A `cat` with an empty cache, and experts for which transformers asks whether it is compiled."""
    batch = batches(family, 1)[0]
    state = lm.TrainState.create(make_net(family), lm.optim.sgd(0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("error", lm.GraphBreakWarning)
        found, _ = lm.compile(backend=pick("eager", "inductor"))(step_of(family))(state, batch)
    wanted, _ = step_of(family)(state, batch)
    for name, param in wanted.params.items():
        torch.testing.assert_close(found.params[name], param, rtol=0, atol=DEFAULT_TOLERANCE)
