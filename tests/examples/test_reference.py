"""Every public name has a docstring, an example that runs (or a reason for none), and a place in the reference."""

import ast
import inspect
import re
import types
from pathlib import Path

import pytest

import lumen as lm

API = "\n".join(page.read_text() for page in sorted((Path(__file__).parents[2] / "docs/api").glob("*.md")))
PACKAGES_WITH_ALL = (
    *(lm, lm.bridges, lm.checkpoint, lm.data, lm.extend, lm.metrics, lm.optim, lm.parallel, lm.planner, lm.random),
    lm.sinks,
)
DEFINING = (lm.tree, lm.checkpoint.rng, lm.parallel.plans, lm.bridges.huggingface, lm.bridges.lora)

# Names without an example of their own, by the reason.
RETURNED = "it is met as the answer of another, whose example shows it"
RECEIVED = "a rule receives or returns it: the example of with_rules shows it"
RAISED = "it is met as an error or a warning"
BASE = "it is a protocol or a base, and those that follow it have examples"
HUB = "it needs a model of transformers: docs/huggingface.md runs it"
TORCHRUN = "it needs processes: tests/distributed runs it"
NO_EXAMPLE = {
    **dict.fromkeys(("LRFinderResult", "HalvingResult", "Trial", "Summary", "CallbackContext"), RETURNED),
    **dict.fromkeys(("Bridged", "Mesh", "Plan"), RETURNED),
    **dict.fromkeys(("ApplyCall", "GradientCall", "Gradient", "UpdateCall"), RECEIVED),
    **dict.fromkeys(("LumenError", "NonFiniteError", "SpikeError", "DonatedError", "Interrupted"), RAISED),
    **dict.fromkeys(("GraphBreakWarning", "InexactWarning"), RAISED),
    **dict.fromkeys(("Style", "Configurable", "Resumable", "ShowsParams"), BASE),
    **dict.fromkeys(("save_pretrained", "save_adapters"), HUB),
    "measure": TORCHRUN,
}


def exported(package: types.ModuleType) -> list[str]:
    """The names in the `__all__` of a package, or those that a module defines without an underscore."""
    if package in PACKAGES_WITH_ALL:
        return list(package.__all__)
    tree = ast.parse(Path(str(package.__file__)).read_text())
    kinds = ast.FunctionDef | ast.ClassDef
    return [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


PACKAGES = pytest.mark.parametrize("package", [*PACKAGES_WITH_ALL, *DEFINING], ids=lambda each: each.__name__)


def has_example(thing: object) -> bool:
    members = vars(thing).values() if isinstance(thing, type) else ()
    return any(">>> " in (inspect.getdoc(each) or "") for each in (thing, *members))


@PACKAGES
def test_public_names_are_explained_and_shown(package: types.ModuleType) -> None:
    things = {name: getattr(package, name) for name in exported(package)}
    shown = {name: thing for name, thing in things.items() if isinstance(thing, type | types.FunctionType)}
    assert [name for name, thing in shown.items() if not thing.__doc__] == []
    without = {name for name, thing in shown.items() if not has_example(thing)}
    assert without == NO_EXAMPLE.keys() & shown.keys(), "add an example, or a reason to NO_EXAMPLE"


def test_a_reason_is_given_for_public_names_alone() -> None:
    assert NO_EXAMPLE.keys() <= {name for package in (*PACKAGES_WITH_ALL, *DEFINING) for name in exported(package)}


@PACKAGES
def test_public_names_are_in_the_reference(package: types.ModuleType) -> None:
    for name in exported(package):
        thing = getattr(package, name)
        page = thing.__name__ if isinstance(thing, types.ModuleType) else package.__name__
        entry = re.search(rf"^::: {re.escape(page)}\n((?: {{4}}.*\n)*)", API, flags=re.MULTILINE)
        assert entry is not None, f"docs/api lacks ::: {page}"
        members = re.search(r"members: \[(.*)\]", entry[1])
        assert members is None or isinstance(thing, types.ModuleType) or name in members[1].split(", "), name
