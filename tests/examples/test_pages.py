"""The guides: every Python block runs, in order, and prints what the page says."""

import os
import re
import runpy
from pathlib import Path

import pytest

import lumen as lm
from tests.examples.blocks import alike, run_blocks, section

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (
    "tutorial",
    "pure_steps",
    "data",
    "extending",
    "debugging",
    "performance",
    "architecture",
    "security",
    "migration",
    "faq",
)
TRANSFORMS = sorted(page.stem for page in (DOCS / "transforms").glob("*.md"))
LAW = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
SOURCE = re.compile(r"\b((?:lumen|checkpoint|core|optim|parallel|planner|train|transforms)/[a-z0-9_/]+\.py)\b")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(DOCS / f"{page}.md", least=1)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", TRANSFORMS)
def test_transforms_page_runs_and_names_tests_that_there_are(page: str) -> None:
    run_blocks(DOCS / f"transforms/{page}.md", least=1, setup=section(DOCS / "transforms.md", "Shared setup"))
    named = LAW.findall((DOCS / f"transforms/{page}.md").read_text())
    assert named
    for file, test in named:
        assert f"\ndef {test}(" in (DOCS.parent / file).read_text(), f"{file} has no {test}"


@pytest.mark.parametrize("page", TRANSFORMS)
def test_transforms_page_opens_with_a_short_example(page: str) -> None:
    text = (DOCS / f"transforms/{page}.md").read_text()
    opening, _, rest = text.partition("```python\n")
    assert "\n## " not in opening
    example = rest.partition("\n```")[0].splitlines()
    assert len(example) <= 8
    assert any(f"lm.{page}(" in line or "lm.sweep(" in line for line in example)


def test_transforms_all_have_pages_that_the_overview_leads_to() -> None:
    text = (DOCS / "transforms.md").read_text()
    rows = re.findall(r"^\| (\[`.*?) \|", text, flags=re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"\[`(\w+)[^`]*`", row)}
    public = [getattr(lm, name) for name in lm.__all__]
    classes = [value for value in public if isinstance(value, type) and issubclass(value, lm.Transform)]
    assert names == {cls.name if cls is not lm.sweep else "sweep" for cls in classes if cls is not lm.Transform}
    assert {f"transforms/{page}.md" for page in TRANSFORMS} == set(re.findall(r"\((transforms/\w+\.md)\)", text))


@pytest.mark.skipif(not os.environ.get("LUMEN_PEERS"), reason="LUMEN_PEERS=1 runs pages beside Fabric and Accelerate")
def test_migration_gives_what_other_libraries_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(DOCS / "migration.md", peers=True)


@pytest.mark.parametrize(
    ("found", "same"),
    [
        ("step 2  3.1s  loss 0.512  steps/s 88.1", True),
        ("step 2  0.0s  loss 0.49  steps/s 4.4e+05", True),
        ("step 2  3.1s  loss 0.612  steps/s 88.1", False),
        ("step 3  3.1s  loss 0.512  steps/s 88.1", False),
        ("step 2  3.1s  loss 0.512", False),
    ],
)
def test_what_counts_as_printing_what_the_page_says(found: str, same: bool) -> None:
    assert alike(found, "step 2  0.2s  loss 0.50  steps/s 1200.5") == same


@pytest.mark.parametrize("page", ["architecture", "design", "compatibility", "testing"])
def test_source_files_that_a_page_names_exist(page: str) -> None:
    named = set(SOURCE.findall((DOCS / f"{page}.md").read_text()))
    assert named
    missing = [file for file in sorted(named) if not (DOCS.parent / "lumen" / file.removeprefix("lumen/")).is_file()]
    assert missing == []


def test_the_picture_is_what_its_script_draws() -> None:
    script = DOCS / "images/architecture.py"
    assert runpy.run_path(str(script))["picture"]() == script.with_suffix(".svg").read_text()
