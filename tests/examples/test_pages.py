"""The guides: every Python block runs, in order, and prints what the page says."""

from pathlib import Path

import pytest

from tests.examples.blocks import run_blocks

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("tutorial", "pure_steps", "extending", "debugging", "performance")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(DOCS / f"{page}.md")
