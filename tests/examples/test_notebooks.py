"""Every notebook runs from its first cell to its last. `make notebooks` runs this file."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

CELL_SECONDS = 240


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, f"no *.ipynb in {FOLDER.name}/: nothing would be checked"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    # Run from the notebook's own folder, as a reader would. A failing cell raises with its traceback.
    NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_without_machine_paths(path: Path) -> None:
    text = path.read_text()
    assert "/home/" not in text
    assert "/Users/" not in text
