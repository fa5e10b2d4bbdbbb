"""The Python blocks of a page run in their order, and print what the page says they print."""

import contextlib
import io
import re
from pathlib import Path

# A block, and the ```text block that follows it where the page shows what it prints.
BLOCK = re.compile(
    r"^```(python|\{ \.python \.peer \})\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", flags=re.DOTALL | re.MULTILINE
)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?|\d{4,}")


def section(page: Path, heading: str) -> str:
    """The first Python block under a heading of a page."""
    _, _, text = page.read_text().partition(f"\n## {heading}\n")
    return next(code for kind, code, _ in BLOCK.findall(text) if kind == "python")


def run_blocks(page: Path, *, least: int = 3, peers: bool = False, setup: str = "") -> dict:
    """Run the blocks of a page in one session, after `setup`, and return the session's names.

    Blocks marked `.peer` use other libraries, and run only with `peers`. `lm.compile()` only traces here: other tests
    cover the compiled code, which takes the C++ compiler many seconds.
    """
    blocks = [(code, said) for kind, code, said in BLOCK.findall(page.read_text()) if kind == "python" or peers]
    assert len(blocks) >= least
    session: dict = {"__name__": "__main__"}
    exec(compile(setup, f"setup of {page.name}", "exec"), session)
    for number, (block, said) in enumerate(blocks, 1):
        name = f"{page.name}, block {number}"
        code = block if page.name == "README.md" else _traced(block)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), session)
        if said:
            found = printed.getvalue().replace(', backend="eager"', "").replace("backend='eager'", "")
            assert alike(found, said), f"{name} printed\n{found}"
    return session


def _traced(code: str) -> str:
    code = code.replace("lm.compile()", 'lm.compile(backend="eager")')
    return code.replace("lm.compile(blocks=", 'lm.compile(backend="eager", blocks=')


def alike(found: str, said: str) -> bool:
    """Whether a text is what a page says: numbers to a tenth, times and rates of any size, `…` for anything.

    >>> alike("loss 0.512 after 3.1s, steps/s 88.1", "loss 0.50 after 0.2s, steps/s 1200.5")
    True
    >>> alike("loss 0.512", "loss 0.7")
    False
    """
    pattern, numbers = "", []
    for word in re.split(r"(\s+)", said.strip()):
        parts = re.split(f"({NUMBER.pattern})", word)
        for part in parts:
            if NUMBER.fullmatch(part):
                pattern += f"({NUMBER.pattern}|\\d+)"
                numbers.append(part)
            else:
                pattern += r"\s+" if part.isspace() else re.escape(part).replace("…", ".*?")
    match = re.fullmatch(pattern, found.strip(), flags=re.DOTALL)
    if match is None:
        return False
    for place, (a, b) in enumerate(zip(match.groups(), numbers, strict=True), 1):
        timed = re.match(r" ?s\b", found.strip()[match.end(place) :]) or re.search(
            r"/s\s+$", found.strip()[: match.start(place)]
        )
        if not timed and abs(float(a) - float(b)) > 0.02 + 0.1 * abs(float(b)):
            return False
    return True
