"""Every relative link and anchor of README, CHANGELOG, CONTRIBUTING, examples/ and docs/ leads somewhere.

mkdocs checks the pages that it builds; it neither sees README, CHANGELOG, CONTRIBUTING and examples/ nor raw HTML.
"""

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples/README.md"])
LINK = re.compile(r"!?\[[^\]\[]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|(?:href|src)=\"([^\"]+)\"")
REFERENCE = re.compile(r"^\[[^\]^]+\]:\s+(\S+)", flags=re.MULTILINE)


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The ids of its headings."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def broken(page: Path, text: str) -> list[str]:
    """What is wrong with the relative links in `text`, as part of `page`."""
    wrong = []
    targets = [a or b for a, b in LINK.findall(text)] + REFERENCE.findall(text)
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(f"{target}: there is no {file}")
        elif not file.is_relative_to(ROOT):
            wrong.append(f"{target}: leads out of the repository")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            wrong.append(f"{target}: {file.name} has no heading {anchor}; it has {', '.join(sorted(anchors(file)))}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, prose(page)) == []


def test_a_broken_link_is_found() -> None:
    page = ROOT / "docs/runner.md"
    fine = '[a](metrics.md#sinks) [b](#validation) [c](https://x.org/y) <img src="images/architecture.svg">'
    assert broken(page, fine) == []
    for link in ("[a](metric.md)", "[a](metrics.md#sink)", "[a](#none)", '<a href="gone.md">', "[r]: gone.md"):
        assert len(broken(page, link)) == 1, link


def test_every_example_and_notebook_is_listed() -> None:
    targets = {a for a, _ in LINK.findall((ROOT / "examples/README.md").read_text())}
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} | {"hydra/train.py", "slurm/train.sbatch"}
    assert targets == scripts | {f"../notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_every_page_is_reached_from_the_first_one() -> None:
    seen, todo = set(), [ROOT / "docs/index.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        for a, b in LINK.findall(prose(page)):
            path = (a or b).partition("#")[0]
            if path and ":" not in path:
                todo.append((page.parent / path).resolve())
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} <= seen
