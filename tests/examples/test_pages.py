"""The guides: every Python block runs, in order, and prints what the page says."""

import os
import runpy
from pathlib import Path

import pytest

from tests.examples.blocks import run_blocks

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (
    "tutorial",
    "pure_steps",
    "extending",
    "debugging",
    "performance",
    "architecture",
    "security",
    "migration",
    "faq",
)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(DOCS / f"{page}.md", least=1)


@pytest.mark.skipif(not os.environ.get("LUMEN_PEERS"), reason="LUMEN_PEERS=1 runs pages beside Fabric and Accelerate")
def test_migration_gives_what_other_libraries_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(DOCS / "migration.md", peers=True)


def test_the_picture_is_what_its_script_draws() -> None:
    script = DOCS / "images/architecture.py"
    assert runpy.run_path(str(script))["picture"]() == script.with_suffix(".svg").read_text()
