"""Each recipe runs by itself, after the shared setup, and prints what the page says."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

from tests.examples.blocks import BLOCK, alike, section

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
SETUP = section(PAGE, "Shared setup")
RECIPES = [title for title in re.findall(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE) if title != "Shared setup"]
LOGGED = re.compile(r"^\[\d{4}-.*\n", flags=re.MULTILINE)  # by packages that log to stdout as they are imported
OPTIONAL = ("optuna", "onnxruntime")  # what a reader installs for one recipe, and `make test` does not


def blocks(title: str) -> list[tuple[str, str]]:
    """The Python blocks of a recipe, each with what it prints."""
    _, _, text = PAGE.read_text().partition(f"\n## {title}\n")
    return [(code, said) for _, code, said in BLOCK.findall(text.partition("\n## ")[0])]


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning")  # of torch's export to ONNX
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # of torch.export.load in 2.11
@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session: dict = {"__name__": "__main__"}
    exec(compile(SETUP, "shared setup", "exec"), session)
    assert blocks(title)
    for code, said in blocks(title):
        for name in OPTIONAL:
            if f"import {name}\n" in code and importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, title, "exec"), session)
        text = LOGGED.sub("", printed.getvalue())
        assert said, f"{title}: a recipe prints something that would differ if it did not work"
        assert alike(text, said), f"{title} printed\n{text}"


def test_the_overview_leads_to_each_recipe() -> None:
    opening = PAGE.read_text().partition("\n## Shared setup\n")[0]
    linked = set(re.findall(r"\(#([\w-]+)\)", opening))
    assert linked == {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in RECIPES}
