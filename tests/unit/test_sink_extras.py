"""A sink whose package is missing names the extra to install."""

import sys

import pytest

import lumen as lm

SINKS = {
    "aim": lambda: lm.sinks.Aim("runs"),
    "clearml": lambda: lm.sinks.ClearML("digits", "first"),
    "comet_ml": lambda: lm.sinks.Comet("digits"),
    "trackio": lambda: lm.sinks.Trackio("digits"),
}


@pytest.mark.parametrize("module", SINKS)
def test_a_missing_package_says_how_to_install_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    extra = module.removesuffix("_ml")
    with pytest.raises(ImportError, match=rf"needs {module}, which is not installed: pip install '\.\[{extra}\]'"):
        SINKS[module]()
