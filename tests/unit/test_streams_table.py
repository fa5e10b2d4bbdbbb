"""The table of streams in docs/data.md: its words, and the tests that each cell rests on."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = "", "order by (seed, epoch)", "exact resume", "sharded to ranks and workers", "unequal ends", "shuffle buffer"

SOURCES = "distributed/test_data_sources.py::"
FEED, GRAIN, WEB = "unit/test_feed.py::", "unit/test_feed_grain.py::", "unit/test_feed_webdataset.py::"
LOADER, RUNNER = "unit/test_loader.py::", "distributed/test_runner.py::"

ONCE = SOURCES + "test_one_process_and_a_run_that_goes_on", SOURCES + "test_two_processes"
ENDS = "**error** that names the rank", RUNNER + "test_data_that_ends_early_for_one"
NEVER = "cannot be: ranks share each batch"

TABLE = {
    "Hugging Face `IterableDataset`": [
        ("yes, with `shuffle(seed=…)`", FEED + "test_hugging_face_streams"),
        ("yes, by its own state", FEED + "test_hugging_face_streams"),
        ("each row once", *ONCE),
        ENDS,
        ("lost, **warns**", FEED + "test_a_shuffle_buffer_says_that_its_rows_are_lost"),
    ],
    "WebDataset": [
        ("yes, with `detshuffle`", WEB + "test_deterministic_shuffles_begin_each_epoch_by_its_number"),
        ("yes, read again, **warns**", WEB + "test_a_run_that_goes_on_reads_again_and_says_so"),
        ("each row once, with `split_by_node` and `per_rank`; else **refused**", WEB + "test_each_row_is_on_one_rank"),
        ENDS,
        ("read again", WEB + "test_deterministic_shuffles_begin_each_epoch_by_its_number"),
    ],
    "`StatefulDataLoader`": [
        ("no, by torch's generators, which checkpoints have", FEED + "test_stateful_data_loader"),
        ("yes", FEED + "test_stateful_data_loader"),
        ("each row once; `per_rank` for streams, else **refused**", *ONCE),
        ("map-style " + NEVER + "; streams: " + ENDS[0], ONCE[1], ENDS[1]),
        ("none", *ONCE),
    ],
    "Grain": [
        ("yes", GRAIN + "test_epochs_differ_and_go_on_from_any_place"),
        ("yes, by its own state", GRAIN + "test_epochs_differ_and_go_on_from_any_place"),
        (
            "each row once; slices and `per_rank` for an `IterDataset`, else **refused**",
            *ONCE,
            SOURCES + "test_what_is_declared_and_what_cannot_be_right",
        ),
        ("`MapDataset` " + NEVER + "; others: " + ENDS[0], GRAIN + "test_the_rows_of_all_ranks_are_the_batch", ENDS[1]),
        ("restored: `WindowShuffle…`", GRAIN + "test_epochs_differ_and_go_on_from_any_place"),
    ],
    "`lm.Loader`": [
        ("yes", LOADER + "test_epochs_and_seeds_differ_and_repeat"),
        ("yes, nothing is read again", LOADER + "test_a_start_reads_nothing_before_it"),
        ("each row once", *ONCE, LOADER + "test_workers_change_nothing"),
        (NEVER, LOADER + "test_the_ranks_parts_in_order_are_the_global_batch"),
        ("none: all rows are shuffled", LOADER + "test_nothing_is_lost_repeated_or_padded"),
    ],
}


def markdown() -> str:
    """The table of docs/data.md."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for name, cells in TABLE.items():
        lines.append("| " + " | ".join([name, *(words for words, *_ in cells)]) + " |")
    return "\n".join(lines).replace("|  |", "| |", 1)


def test_the_page_has_this_table() -> None:
    assert markdown() in (ROOT / "docs/data.md").read_text(), f"data.md lacks this table:\n{markdown()}"


@pytest.mark.parametrize("name", TABLE)
def test_each_cell_rests_on_tests_that_there_are(name: str) -> None:
    assert len(TABLE[name]) == len(HEAD) - 1
    for words, *tests in TABLE[name]:
        assert tests, words
        for test in tests:
            file, _, function = test.partition("::")
            assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), f"{words}: no {test}"
