"""Scripts of `findings/` have the form that CONTRIBUTING.md states; they install packages, so none is run here."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FINDINGS = sorted((ROOT / "findings").glob("*"))


@pytest.mark.parametrize("script", FINDINGS, ids=lambda path: path.name)
def test_a_finding_states_what_it_shows_and_pins_what_it_installs(script: Path) -> None:
    text = script.read_text()
    head = re.findall(r"^# (\w+):", text, flags=re.MULTILINE)
    assert head[:4] == ["Package", "Input", "Behavior", "Output"]
    assert head[4:] in ([], ["Upstream"])
    (install,) = re.findall(r"pip\" install --quiet --no-compile (.+)", text)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in install.split())
    code = text.partition("<<'PY'\n")[2].removesuffix("PY\n")
    compile(code, script.name, "exec")
    assert 'raise SystemExit("the behavior has changed")' in code
    assert "lumen" not in text.lower()
    assert os.access(script, os.X_OK)


def test_the_page_on_surprises_names_every_finding() -> None:
    named = re.findall(r"`(\w+\.sh)`", (ROOT / "docs" / "surprises.md").read_text())
    assert sorted(named) == [script.name for script in FINDINGS]
    assert len(FINDINGS) >= 8
